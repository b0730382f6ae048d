"""The table of decoupled models: the class of `transformers` each stands for, and the AutoModel class that opens it."""

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from detransformer.models import decoupled_bert, decoupled_gpt2, decoupled_relatives
from detransformer.models.configuration import DecoupledBertConfig, DecoupledGPT2Config

CLASSES: dict[type[PretrainedConfig], tuple] = {
    DecoupledBertConfig: decoupled_bert.CLASSES,
    DecoupledGPT2Config: decoupled_gpt2.CLASSES,
    **decoupled_relatives.CLASSES,
}
DECOUPLED_CLASS = {original: decoupled for table in CLASSES.values() for _, original, decoupled in table}


def register() -> None:
    """Makes `AutoConfig`, the AutoModel classes and `AutoTokenizer` know the decoupled models."""
    for config, table in CLASSES.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        (_, original, _), *_ = table
        AutoTokenizer.register(config, TOKENIZER_MAPPING[original.config_class], exist_ok=True)  # older files name none
        for auto, _, decoupled in table:
            auto.register(config, decoupled, exist_ok=True)


register()
