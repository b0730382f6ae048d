"""CoFormer (2025): a large transformer decomposed into sub-models that run side by side and are aggregated.

`policy` says into which, `decomposer` cuts them out of the large model's weights, `evaluator` prices a policy and
`search` finds a good one; `booster` calibrates them, `fusion` trains the aggregator on top, and `debo` is all of it.
Importing it makes the AutoModel classes know the sub-models.
"""

from importlib import import_module

import detransformer.coformer.submodels  # noqa: F401  (AutoModel knows sub-models)

# Where each public name is; imported when first asked for, so that a device that serves a sub-model loads no search.
_PLACES = {
    "aggregator": (
        "KINDS",
        "aggregator_flops",
        "load_aggregator",
        "make_aggregator",
        "message_bytes",
        "pool_features",
        "save_aggregator",
    ),
    "booster": (
        "BoostConfig",
        "BoostResult",
        "ImageTask",
        "TextTask",
        "boost",
        "load_calibrated",
    ),
    "debo": (
        "Calibrated",
        "SearchConfig",
        "calibrate_policy",
        "make_evaluator",
        "search_policy",
    ),
    "fusion": (
        "AggregatorConfig",
        "Outputs",
        "collect_outputs",
        "ensemble_accuracy",
        "missing_table",
        "train_aggregator",
    ),
    "decomposer": (
        "Importance",
        "Parts",
        "choose_parts",
        "decompose",
        "magnitude_importance",
    ),
    "evaluator": (
        "Evaluation",
        "Evaluator",
        "Latency",
        "LatencyPredictor",
        "device_limits",
        "energy_j",
        "latency",
        "profile_pool",
        "roofline_s",
        "tdp_w",
        "validation_loss",
    ),
    "policy": (
        "Grid",
        "Limits",
        "Original",
        "Policy",
        "SubModelConfig",
        "check_policy",
        "encode",
        "flops",
        "memory_bytes",
        "mutate_policy",
        "parameters",
        "sample_policy",
        "sample_uniform_policy",
        "scale_policy",
        "uniform_policy",
        "violations",
    ),
    "search": (
        "SearchResult",
        "bayesian_search",
        "random_search",
    ),
    "submodels": (
        "CoformerBertConfig",
        "CoformerBertForSequenceClassification",
        "CoformerBertModel",
        "CoformerGPT2Config",
        "CoformerGPT2ForSequenceClassification",
        "CoformerGPT2LMHeadModel",
        "CoformerGPT2Model",
        "CoformerViTConfig",
        "CoformerViTForImageClassification",
        "CoformerViTModel",
        "features",
        "sizes_of",
    ),
    "ensemble": (
        "Ensemble",
        "is_ensemble",
        "load_ensemble",
        "save_ensemble",
        "whole_answer",
    ),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
