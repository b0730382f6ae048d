"""The decoupled models: for each family one class a head, made from `transformers`' class, which the Auto classes open.

Only the layers differ from the original's class: embeddings, original layers, pooler, heads and `generate` are its own.
"""

from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, GenerationMixin, PretrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from detransformer.models import sync_gpt2
from detransformer.models.configuration import FAMILIES
from detransformer.models.decoupled_encoders import (
    DecoupledBertLayer,
    DecoupledDistilBertLayer,
    DecoupledSelfAttention,
    DecoupledViTLayer,
)
from detransformer.models.decoupled_gpt2 import DecoupledGPT2, DecoupledGPT2Block
from detransformer.models.stacked import CODE_FILE, DecoupledModel

AUTO_CLASSES = (  # those that open decoupled models; the model without a head first, since the others refer to it
    transformers.AutoModel,
    transformers.AutoModelForPreTraining,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForNextSentencePrediction,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForMultipleChoice,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForQuestionAnswering,
    transformers.AutoModelForImageClassification,
)
LAYER = {
    "bert": DecoupledBertLayer,
    "distilbert": DecoupledDistilBertLayer,
    "gpt2": DecoupledGPT2Block,
    "vit": DecoupledViTLayer,
}


def _make_classes(model_type: str) -> tuple[tuple[type, type, type], ...]:
    """For each head of a family: the AutoModel class, the original, and the decoupled class, by its name in here."""
    family, original_config = FAMILIES[model_type], CONFIG_MAPPING[model_type]
    is_decoder, layer = family.architecture == "gpt2", LAYER[family.architecture]
    made: dict[type, type] = {}
    rows = []
    for auto in AUTO_CLASSES:
        if original_config not in auto._model_mapping:
            continue
        if auto is transformers.AutoModelForCausalLM and not is_decoder:  # `transformers`' encoders can be decoders
            continue
        original = auto._model_mapping[original_config]
        if original not in made:
            original_layer = original._can_record_outputs["hidden_states"]
            fields = {
                "__module__": __name__,
                "__doc__": f"Decoupled {family.name}; outputs as `transformers.{original.__name__}`.",
                "config_class": family.decoupled,
                "layer_class": {"original": original_layer, "decoupled": layer},
                "body_class": next(iter(made.values()), None),
                "_no_split_modules": [*(original._no_split_modules or []), layer.__name__],
            }
            if not is_decoder:  # GPT-2's classes recognise the decoupled layer and attention as their own
                known = issubclass(layer, original_layer)
                fields["_can_record_outputs"] = {
                    "hidden_states": [original_layer] if known else [original_layer, layer],
                    "attentions": [original._can_record_outputs["attentions"], DecoupledSelfAttention],
                }
            mixin = DecoupledGPT2 if is_decoder else DecoupledModel
            bases = [mixin, original]
            if issubclass(original, GenerationMixin):
                bases.append(GenerationMixin)  # `transformers` asks for it as a direct base of what generates
            made[original] = type(f"Decoupled{original.__name__}", tuple(bases), fields)
        rows.append((auto, original, made[original]))
    return tuple(rows)


CLASSES: dict[type[PretrainedConfig], tuple] = {
    family.decoupled: _make_classes(model_type) for model_type, family in FAMILIES.items()
}
DECOUPLED_CLASS = {original: decoupled for table in CLASSES.values() for _, original, decoupled in table}
SYNC_CLASSES = {sync_gpt2.SyncGPT2Config: sync_gpt2.CLASSES}
SYNC_CLASS = {made.__name__: made for _, _, made in sync_gpt2.CLASSES}
BY_NAME = {made.__name__: made for made in (*CLASSES, *SYNC_CLASSES, *DECOUPLED_CLASS.values())}
BY_NAME |= SYNC_CLASS  # read by a checkpoint's `CODE_FILE`
globals().update(BY_NAME)


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
