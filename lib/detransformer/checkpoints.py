"""Converts a checkpoint (a folder or Hub name) to a decoupled checkpoint on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from detransformer.files import atomic_folder
from detransformer.folders import OTHER_FILES, TOKENIZER_FILES, find_folder
from detransformer.models import decouple
from detransformer.models.configuration import decoupled_config
from detransformer.opening import load_model, load_tokenizer, open_checkpoint


def decouple_checkpoint(
    source: str,
    output: str | Path,
    num_original_layers: int = 4,
    num_divisions: int = 4,
    attention_width: str = "full",
    head: str = "auto",
    force: bool = False,
    say: Callable[[str], None] = print,
    original_placement: str = "last",
) -> Path:
    """Converts the model at `source` (folder or Hub name); `output` is written completely or not at all.

    `head` names the model class to load; `auto` takes the class that the checkpoint was saved with. Tokenizer, pooling
    and generation options are copied.

    Raises:
        ValueError: if `source` is not a complete, supported checkpoint, sizes do not divide, or `output` exists.
    """
    output, folder = Path(output), find_folder(source)
    check_output(output, folder, force)
    opened = open_checkpoint(folder, None if head == "auto" else head, fresh_head=True)
    if opened.decoupled:
        raise ValueError(f"{source} is decoupled already; give the original checkpoint.")
    structure = num_original_layers, num_divisions, attention_width, original_placement
    decoupled_config(opened.config, *structure)  # checks the sizes before a large model is loaded
    original = load_model(opened)
    decoupled = decouple(original, *structure)
    with atomic_folder(output) as made:
        decoupled.save_pretrained(made)
        copied = copy_tokenizer(folder, made)
        copy_files(folder, made, OTHER_FILES)
    sizes = f"Nb={num_original_layers}, Ndiv={num_divisions}, {attention_width} attention"
    sizes += "" if original_placement == "last" else f", original layers {original_placement}"
    say(f"{type(original).__name__}: {original.num_parameters():,} parameters")
    say(f"{type(decoupled).__name__} ({sizes}): {decoupled.num_parameters():,} parameters")
    kept = {name.partition(".")[0] for name in decoupled.state_dict()} - {decoupled.base_model_prefix}
    if decoupled.base_model is not decoupled:
        say(f"Its head is kept: {', '.join(sorted(kept))}.")
    if opened.fresh:
        modules = sorted({name.rpartition(".")[0] for name in opened.fresh})
        say(f"Not in the checkpoint, so newly initialised: {', '.join(modules)}")
    if opened.note:
        say(opened.note)
    say(f"Written to {output}, {'with' if copied else 'without'} tokenizer files.")
    return output


def check_output(output: Path, source: str | Path, force: bool) -> None:
    """Raises ValueError if `output` exists and must not be replaced, or is the checkpoint `source` itself."""
    if output.exists() and not force:
        raise ValueError(f"--output {output} exists already; choose another folder, or replace it with --force.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; choose a folder.")
    if Path(source).is_dir() and output.resolve() == Path(source).resolve():
        raise ValueError(f"--output {output} is the checkpoint itself; choose another folder.")


def copy_files(source: str | Path, folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copies the files of `source` that match `patterns` and that `folder` lacks; returns their names."""
    copied = []
    for path in sorted({path for pattern in patterns for path in Path(source).glob(pattern)}):
        target = folder / path.relative_to(source)
        if path.is_file() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(target.name)
    return copied


def copy_tokenizer(source: str | Path, folder: Path) -> list[str]:
    """Copies the tokenizer's files; returns their names.

    If they name no class, transformers infers it from the model type. A decoupled model has another type, so the class
    is written down.
    """
    copied = copy_files(source, folder, TOKENIZER_FILES)
    options = folder / "tokenizer_config.json"
    fields = json.loads(options.read_text(encoding="utf-8")) if options.is_file() else {}
    if copied and "tokenizer_class" not in fields and not (folder / "tokenizer.json").is_file():
        try:
            fields["tokenizer_class"] = type(load_tokenizer(source)).__name__
        except ValueError:  # unreadable in `source` too
            return copied
        options.write_text(json.dumps(fields, indent=2), encoding="utf-8")
    return copied
