"""The `transformers` class that each decoupled class stands for, and the AutoModel class that opens it."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from detransformer.models import decoupled_bert, decoupled_gpt2, decoupled_relatives, decoupled_vit, sync_gpt2
from detransformer.models.configuration import DecoupledBertConfig, DecoupledGPT2Config, DecoupledViTConfig
from detransformer.models.stacked import CODE_FILE

CLASSES: dict[type[PretrainedConfig], tuple] = {
    DecoupledBertConfig: decoupled_bert.CLASSES,
    DecoupledGPT2Config: decoupled_gpt2.CLASSES,
    **decoupled_relatives.CLASSES,
    DecoupledViTConfig: decoupled_vit.CLASSES,
}
DECOUPLED_CLASS = {original: decoupled for table in CLASSES.values() for _, original, decoupled in table}
SYNC_CLASSES = {sync_gpt2.SyncGPT2Config: sync_gpt2.CLASSES}
SYNC_CLASS = {made.__name__: made for _, _, made in sync_gpt2.CLASSES}
BY_NAME = {made.__name__: made for made in (*CLASSES, *SYNC_CLASSES, *DECOUPLED_CLASS.values())}
BY_NAME |= SYNC_CLASS  # read by a checkpoint's `CODE_FILE`


def register() -> None:
    """Registers decoupled models with `AutoConfig`, AutoModel classes and `AutoTokenizer`; sets their `auto_map`."""
    module = Path(CODE_FILE).stem
    for config, table in (CLASSES | SYNC_CLASSES).items():
        auto_map = {auto.__name__: f"{module}.{decoupled.__name__}" for auto, _, decoupled in table}
        auto_map["AutoConfig"] = f"{module}.{config.__name__}"
        AutoConfig.register(config.model_type, config, exist_ok=True)
        (_, original, _), *_ = table
        if original.config_class in TOKENIZER_MAPPING:  # a ViT has none; old text checkpoints name none
            AutoTokenizer.register(config, TOKENIZER_MAPPING[original.config_class], exist_ok=True)
        for auto, _, decoupled in table:
            auto.register(config, decoupled, exist_ok=True)
            decoupled.auto_map = auto_map


register()
