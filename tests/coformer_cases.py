"""Models, sizes, policies and devices that the tests of CoFormer share."""

import copy

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from detransformer.cluster.devices import DeviceSpec
from detransformer.coformer.aggregator import make_aggregator
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.ensemble import save_ensemble
from detransformer.coformer.policy import Original, Policy, SubModelConfig
from detransformer.coformer.sampling import uniform_policy

DEIT = Original.of(ViTConfig())  # DeiT-B
SMALL = Original(6, 96, 6, 384, seq_len=17, embedding_rows=213, patch_values=192)  # 1/2, 1/8, 1/2 and 1/8 of it
JETSONS = tuple(
    DeviceSpec(preset, name=name)
    for preset, name in (("jetson-nano", "nano"), ("jetson-tx2", "tx2"), ("jetson-orin-nano", "orin"))
)
# Odd on purpose: 6 heads of size 8, 70 FFN columns, 5 layers.
BERT = BertConfig(
    hidden_size=48, num_hidden_layers=5, num_attention_heads=6, intermediate_size=70, vocab_size=101, num_labels=3
)
GPT2 = GPT2Config(
    n_embd=48, n_layer=5, n_head=6, n_inner=70, vocab_size=101, num_labels=3,
    bos_token_id=0, eos_token_id=0, pad_token_id=0, scale_attn_by_inverse_layer_idx=True,
)  # fmt: skip
VIT = ViTConfig(
    hidden_size=48, num_hidden_layers=5, num_attention_heads=6, intermediate_size=70, image_size=12, patch_size=4,
    num_labels=3,
)  # fmt: skip
CONFIGS = {BertForSequenceClassification: BERT, GPT2ForSequenceClassification: GPT2, ViTForImageClassification: VIT}
UNEQUAL = Policy(
    (SubModelConfig(3, 20, (1, 3, 2), (17, 9, 30)), SubModelConfig(5, 11, (2, 1, 3, 4, 6), (40, 31, 8, 70, 1)))
)


def random_model(model_class):
    """A model in float64 whose biases and LayerNorms are random too."""
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(CONFIGS[model_class])).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_ensemble(kind, folder):
    """A BERT of four classes as three sub-models alike, 16 wide; the second device aggregates."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=96, vocab_size=60)
    config = BertConfig(**sizes, num_labels=4, initializer_range=0.3)
    model = BertForSequenceClassification(config).eval()
    original = Original.of(config, seq_len=12)
    policy = uniform_policy(original, 3)
    aggregator = make_aggregator(kind, policy.widths, 4)
    if aggregator.learned:
        aggregator.set_means([torch.randn(9, width) for width in policy.widths])
    return save_ensemble(folder, decompose(model, policy), aggregator, policy, original, central=1)
