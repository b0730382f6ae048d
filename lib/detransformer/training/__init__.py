"""Masked-language-model pre-training and fine-tuning (DATE 2024, Section IV-A, Table III).

`open_data` finds the text, `pretrain` and `finetune` train (and skip what is finished, resume what was interrupted),
`summary` turns their results into tables. Knows no plot and no value of the paper.
"""

from detransformer.training.config import (
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    finetune_recipes,
    make_config,
    model_rows,
)
from detransformer.training.data import TrainingData, open_data
from detransformer.training.finetuning import finetune, finetune_all
from detransformer.training.pretraining import PretrainResult, pretrain, pretrain_all
from detransformer.training.summary import (
    accuracy_table,
    loss_table,
    mean_differences,
    pretraining_table,
    table_iii,
    table_note,
)

__all__ = [
    "FinetuneConfig",
    "ModelRow",
    "PretrainConfig",
    "PretrainResult",
    "TrainingData",
    "accuracy_table",
    "finetune",
    "finetune_all",
    "finetune_recipes",
    "loss_table",
    "make_config",
    "mean_differences",
    "model_rows",
    "open_data",
    "pretrain",
    "pretrain_all",
    "pretraining_table",
    "table_iii",
    "table_note",
]
