"""Names and sizes of the preset models, and options of a decoupled one. Plain data; imports without torch."""

from typing import Literal

AttentionWidth = Literal["full", "narrow"]
OriginalPlacement = Literal["last", "first", "bottom", "middle", "top"]

# The BERT models of the papers' tables.
PRESET_SIZES = {
    "bert-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "bert-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
GPT2_SIZES = {
    "gpt2": dict(n_embd=768, n_layer=12, n_head=12),
    "gpt2-medium": dict(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": dict(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": dict(n_embd=1600, n_layer=48, n_head=25),
    # OPT-6.7B's sizes (Zhang et al. 2022, Table 1) in GPT-2's architecture, for planning alone: too large to be made.
    "opt-6.7b-shape": dict(n_embd=4096, n_layer=32, n_head=32, n_inner=16384, vocab_size=50272, n_positions=2048),
}
PRESETS = (*PRESET_SIZES, *GPT2_SIZES)
PLANNING_ONLY = ("opt-6.7b-shape",)
HEADS = (
    "auto",
    "base",
    "masked-lm",
    "classification",
    "token-classification",
    "question-answering",
    "causal-lm",
)
