"""Parameters and floating-point operations of a model, counted from its configuration alone.

A multiply-add counts as two operations. Only matrix products count: LayerNorm, GELU and softmax are below 2%. The
scores of GPT-2's causal attention count in full, as its modules compute them.
"""

from transformers import PretrainedConfig

from detransformer.models.configuration import architecture, ffn_size, layer_kinds


def _widths(config: PretrainedConfig, kind: str) -> tuple[int, int, int]:
    """(sub-blocks P, slice width d, attention width A of one sub-block) of a layer."""
    if kind == "decoupled":
        return config.num_divisions, config.slice_width, config.slice_attention_width
    return 1, config.hidden_size, config.hidden_size


def layer_parameters(config: PretrainedConfig, kind: str) -> int:
    """Weights and biases of one `"original"` or `"decoupled"` layer."""
    blocks, width, attention = _widths(config, kind)
    intermediate = ffn_size(config)
    attention_part = 3 * (width * attention + attention) + attention * width + width
    ffn_part = width * intermediate + intermediate + intermediate * width + width
    return blocks * (attention_part + ffn_part + 4 * width)  # two LayerNorms of weight and bias


def embedding_parameters(config: PretrainedConfig) -> int:
    """Parameters outside the layers, with one LayerNorm (GPT-2's last one); GPT-2's LM head is the embeddings."""
    token_types = getattr(config, "type_vocab_size", 0)
    return (config.vocab_size + config.max_position_embeddings + token_types + 2) * config.hidden_size


def model_parameters(config: PretrainedConfig) -> int:
    """Embeddings, layers and pooler: 109.48 M for BERT-Base, 109.61 M decoupled (Nb=4, Ndiv=4); 124.44 M for GPT-2."""
    layers = sum(layer_parameters(config, kind) for kind in layer_kinds(config))
    pooler = config.hidden_size**2 + config.hidden_size if architecture(config) == "bert" else 0  # others have none
    return embedding_parameters(config) + layers + pooler


def layer_flops(config: PretrainedConfig, kind: str, seq_len: int, batch_size: int = 1) -> int:
    """Matrix-product operations of one layer for X [batch_size, seq_len, D]."""
    blocks, width, attention = _widths(config, kind)
    projections = 2 * seq_len * 4 * width * attention
    scores = 2 * 2 * seq_len * seq_len * attention
    ffn = 2 * seq_len * 2 * width * ffn_size(config)
    return batch_size * blocks * (projections + scores + ffn)


def model_flops(config: PretrainedConfig, seq_len: int, batch_size: int = 1) -> int:
    """Operations of one forward pass without a head (embeddings are look-ups; BERT's pooler, 2 D^2, is counted)."""
    layers = sum(layer_flops(config, kind, seq_len, batch_size) for kind in layer_kinds(config))
    pooler = 2 * config.hidden_size**2 if architecture(config) == "bert" else 0
    return layers + batch_size * pooler
