"""The table of decoupled models: the class of `transformers` each stands for, and the AutoModel class that opens it."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, BertTokenizer, GPT2Tokenizer

from detransformer.models import decoupled_bert, decoupled_gpt2
from detransformer.models.configuration import DecoupledBertConfig, DecoupledGPT2Config
from detransformer.models.stacked import CODE_FILE

CLASSES = {DecoupledBertConfig: decoupled_bert.CLASSES, DecoupledGPT2Config: decoupled_gpt2.CLASSES}
TOKENIZERS = {DecoupledBertConfig: BertTokenizer, DecoupledGPT2Config: GPT2Tokenizer}  # older files name no class
DECOUPLED_CLASS = {original: decoupled for table in CLASSES.values() for _, original, decoupled in table}


def register() -> None:
    """Makes `AutoConfig`, the AutoModel classes and `AutoTokenizer` know decoupled models; their folders name them."""
    module = Path(CODE_FILE).stem
    for config, table in CLASSES.items():
        auto_map = {auto.__name__: f"{module}.{decoupled.__name__}" for auto, _, decoupled in table}
        auto_map["AutoConfig"] = f"{module}.{config.__name__}"
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoTokenizer.register(config, TOKENIZERS[config], exist_ok=True)
        for auto, _, decoupled in table:
            auto.register(config, decoupled, exist_ok=True)
            decoupled.auto_map = auto_map


register()
