"""`detransformer calibrate` and `evaluate`: a BERT checkpoint of one's own, decoupled with itself as the teacher."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from detransformer.checkpoints import copy_tokenizer, read_config
from detransformer.files import atomic_folder
from detransformer.models.configuration import ATTENTION_WIDTHS, ORIGINAL_PLACEMENTS, check_decoupling
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.parse import number, one_of, whole_number
from detransformer.training.config import PRECISIONS, ModelRow, PretrainConfig
from detransformer.training.data import SOURCES, TrainingData, open_data
from detransformer.training.data.text import retokenized, text_data
from detransformer.training.distillation import CalibrationConfig, CalibrationResult, calibrate
from detransformer.training.evaluation import held_out_loss, load_masked_lm

MICRO_BATCH = 32  # sequences in one forward pass, at most
MAX_VALID_TOKENS = 200_000
VOCABULARIES = ("tokenizer.json", "vocab.txt")


def calibrate_command(
    teacher: str,
    output: str,
    num_original_layers: str,
    num_divisions: str,
    attention_width: str,
    original_placement: str,
    text: list[str] | None,
    source: str,
    steps: str,
    batch_size: str,
    seq_len: str,
    learning_rate: str,
    ce_weight: str,
    kl_weight: str,
    hidden_weight: str,
    temperature: str,
    precision: str,
    seed: str,
    force: bool,
) -> None:
    """Writes the calibrated model to `output` as a model folder; `OUTPUT.work` beside it is there while it trains.

    Raises:
        ValueError: for words that are no numbers, a teacher that is no BERT with its masked-LM head, text too short.
    """
    row = ModelRow(
        "bert-base",  # a name that nothing is built from: the sizes are the teacher's
        whole_number(num_original_layers, "--num-original-layers", 1),
        whole_number(num_divisions, "--num-divisions", 1),
        one_of(attention_width, "--attention-width", ATTENTION_WIDTHS),
        one_of(original_placement, "--original-placement", ORIGINAL_PLACEMENTS),
    )
    batch, num_steps, length = (
        whole_number(batch_size, "--batch-size", 1),
        whole_number(steps, "--steps", 1),
        whole_number(seq_len, "--seq-len", 8, 512),
    )
    config = CalibrationConfig(
        PretrainConfig(
            num_steps=num_steps,
            seq_len=length,
            global_batch_size=batch,
            micro_batch_size=max(size for size in range(1, MICRO_BATCH + 1) if batch % size == 0),
            optimizer="adamw",
            learning_rate=number(learning_rate, "--learning-rate"),
            warmup=0.1,
            decay_power=1.0,
            dropout=0.0,  # text is hardly seen twice
            max_train_tokens=num_steps * batch * length,
            max_valid_tokens=MAX_VALID_TOKENS,
            mixed_precision=one_of(precision, "--precision", PRECISIONS),
            seed=whole_number(seed, "--seed", 0),
        ),
        ce_weight=number(ce_weight, "--ce-weight"),
        kl_weight=number(kl_weight, "--kl-weight"),
        hidden_weight=number(hidden_weight, "--hidden-weight"),
        temperature=number(temperature, "--temperature"),
    )
    target, checkpoint = Path(output), Path(teacher)
    if target.exists() and not (force and target.is_dir()):
        raise ValueError(f"{target} exists already; choose another folder, or replace it with --force.")
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder; give one of a BERT checkpoint.")
    if target.resolve() == checkpoint.resolve():
        raise ValueError(f"{target} is the teacher itself; choose another folder.")
    sizes = read_config(teacher)
    if length > sizes.get("max_position_embeddings", 512):
        raise ValueError(f"--seq-len {length} is above the model's {sizes['max_position_embeddings']} positions.")
    if sizes["model_type"] == "bert":  # said before any text is read
        check_decoupling(
            *(sizes[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")),
            *(row.num_original_layers, row.num_divisions, row.attention_width, row.original_placement),
        )
    work = target.with_name(f"{target.name}.work")
    data = _read_text(checkpoint, text, one_of(source, "--source", SOURCES), work / "text")
    print(f"Text: {data.note}. Until it is done, {work} holds what an interrupted run goes on from.")
    result = calibrate(checkpoint, row, config, data, work)
    _write(result, checkpoint, target)
    shutil.rmtree(work)
    print(
        f"Loss of a masked token, held-out text: {result.sliced_valid_loss:.3f} sliced, {result.valid_loss:.3f} "
        f"calibrated ({result.method}, {result.tokens:,} tokens, {result.seconds:.0f} s), "
        f"{result.teacher_valid_loss:.3f} the teacher's, {result.unigram_loss:.3f} word frequencies alone.\n"
        f"Written to {target}."
    )


def evaluate_command(
    checkpoint: str, text: list[str] | None, source: str, seq_len: str, max_tokens: str, wire: str | None
) -> None:
    """Prints the held-out loss of a checkpoint; with `wire`, also as four devices would compute it.

    Raises:
        ValueError: for a folder that is no masked-language model, words that are no numbers, an unknown format.
    """
    length, limit = whole_number(seq_len, "--seq-len", 8, 512), whole_number(max_tokens, "--max-tokens", 8)
    wires = ["", *([one_of(wire, "--wire", WIRE_FORMATS)] if wire else [])]
    model = load_masked_lm(checkpoint)
    with tempfile.TemporaryDirectory() as cache:
        data = _read_text(Path(checkpoint), text, one_of(source, "--source", SOURCES), Path(cache))
        print(f"Text: {data.note}.")
        for name in wires:
            found = held_out_loss(model, data, length, limit, name)
            how = f"{name} messages between four devices" if name else "exact"
            print(
                f"{how}: {found['loss']:.4f} nats a masked token, perplexity {found['perplexity']:.1f} "
                f"({found['tokens']:,} tokens)"
            )


def _read_text(checkpoint: Path, text: list[str] | None, source: str, cache_dir: Path) -> TrainingData:
    """The text to train on, cut by the checkpoint's tokenizer."""
    if not any((checkpoint / name).is_file() for name in VOCABULARIES):  # or transformers would make an empty one
        raise ValueError(f"{checkpoint} has no tokenizer: copy its {' or '.join(VOCABULARIES)} there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the tokenizer of {checkpoint} cannot be read ({error}): copy its files again.") from error
    if text:
        return text_data(text, tokenizer, cache_dir)
    return retokenized(open_data(source, cache_dir), tokenizer, cache_dir)


def _write(result: CalibrationResult, teacher: Path, target: Path) -> None:
    """The model with the teacher's own tokenizer files, and how it was made."""
    facts = {
        field.name: getattr(result, field.name)
        for field in dataclasses.fields(result)
        if field.name not in ("row", "checkpoint", "history")
    }
    with atomic_folder(target) as folder:
        shutil.copytree(result.checkpoint, folder, dirs_exist_ok=True)
        copy_tokenizer(str(teacher), folder)
        result.history.to_csv(folder / "calibration.csv", index=False)
        (folder / "calibration.json").write_text(json.dumps(facts, indent=1))
