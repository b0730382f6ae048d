"""Held-out loss of a saved masked-language model, exact or with rounded messages; a small copy to share."""

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, BertForMaskedLM

import detransformer.models  # noqa: F401  (AutoModel knows decoupled BERT)
from detransformer.checkpoints import copy_tokenizer
from detransformer.files import atomic_folder
from detransformer.parallel.wire_model import wire_plan, wired
from detransformer.training.config import PretrainConfig
from detransformer.training.data import TrainingData
from detransformer.training.data.packing import MaskedBatches
from detransformer.training.objective import MaskedLmLoss
from detransformer.training.pretraining import PretrainResult, evaluate

BATCH = 32


def held_out_loss(
    model: BertForMaskedLM, data: TrainingData, seq_len: int = 128, max_tokens: int | None = 200_000, wire: str = ""
) -> dict:
    """Loss in nats a masked token of `data`'s held-out text, its perplexity and the tokens read.

    Args:
        model: a BERT or decoupled BERT with its masked-LM head, in float32.
        wire: number format of messages between four devices; none where empty.

    Raises:
        ValueError: for text shorter than a sequence.
    """
    text = data.packed("validation", seq_len, max_tokens)
    num_masked = PretrainConfig(seq_len=seq_len).num_masked
    batches = MaskedBatches(text.sequences, data.vocab_size, data.special, num_masked, seed=0)
    model.eval()
    rounded = wired(model, wire_plan(model.config, wire=wire)) if wire else nullcontext()
    with rounded:
        loss = evaluate(MaskedLmLoss(model), batches.valid_batches(BATCH))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": text.num_tokens}


def load_masked_lm(folder: str | Path) -> BertForMaskedLM:
    """The masked-language model of `folder` in float32; ValueError where it holds none, or lacks weights."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder (it has no config.json): give one that save_pretrained wrote.")
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read as a masked-language model: {error}") from error
    if model.config.model_type not in ("bert", "decoupled_bert") or info["missing_keys"]:
        lacks = sorted(info["missing_keys"])[:1] or [f"model type {model.config.model_type}"]
        raise ValueError(f"{folder} is no BERT with its masked-LM head ({lacks[0]}): give a pre-trained checkpoint.")
    return model


def export(result: PretrainResult, folder: str | Path, card: str) -> Path:
    """A copy of a pre-trained row to share: bfloat16 weights, tokenizer, and `card` as its README.md."""
    model = load_masked_lm(result.checkpoint).to(torch.bfloat16)
    with atomic_folder(Path(folder)) as temporary:
        model.save_pretrained(temporary)
        copy_tokenizer(str(result.checkpoint), temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)
