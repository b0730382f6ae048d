"""Parameters and floating-point operations of a model, counted from its configuration alone.

A multiply-add counts as two operations. Only matrix products count: LayerNorm, GELU and softmax are below 2%.
"""

from transformers import BertConfig

from detransformer.models.configuration import layer_kinds


def _widths(config: BertConfig, kind: str) -> tuple[int, int, int]:
    """(sub-blocks P, slice width d, attention width A of one sub-block) of a layer."""
    blocks = config.num_divisions if kind == "decoupled" else 1
    width = config.hidden_size // blocks
    narrow = kind == "decoupled" and config.attention_width == "narrow"
    return blocks, width, width if narrow else config.hidden_size


def layer_parameters(config: BertConfig, kind: str) -> int:
    """Weights and biases of one `"original"` or `"decoupled"` layer."""
    blocks, width, attention = _widths(config, kind)
    intermediate = config.intermediate_size
    attention_part = 3 * (width * attention + attention) + attention * width + width
    ffn_part = width * intermediate + intermediate + intermediate * width + width
    return blocks * (attention_part + ffn_part + 4 * width)  # two LayerNorms of weight and bias


def embedding_parameters(config: BertConfig) -> int:
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    return (rows + 2) * config.hidden_size


def pooler_parameters(config: BertConfig) -> int:
    return config.hidden_size**2 + config.hidden_size


def model_parameters(config: BertConfig) -> int:
    """Embeddings, encoder and pooler: 109.48 M for BERT-Base, 109.61 M decoupled (Nb=4, Ndiv=4)."""
    layers = sum(layer_parameters(config, kind) for kind in layer_kinds(config))
    return embedding_parameters(config) + layers + pooler_parameters(config)


def layer_flops(config: BertConfig, kind: str, seq_len: int, batch_size: int = 1) -> int:
    """Matrix-product operations of one layer for X [batch_size, seq_len, D]."""
    blocks, width, attention = _widths(config, kind)
    projections = 2 * seq_len * 4 * width * attention
    scores = 2 * 2 * seq_len * seq_len * attention
    ffn = 2 * seq_len * 2 * width * config.intermediate_size
    return batch_size * blocks * (projections + scores + ffn)


def model_flops(config: BertConfig, seq_len: int, batch_size: int = 1) -> int:
    """Encoder operations for one forward pass (embeddings are look-ups; the pooler's 2 D^2 are counted)."""
    layers = sum(layer_flops(config, kind, seq_len, batch_size) for kind in layer_kinds(config))
    return layers + batch_size * 2 * config.hidden_size**2
