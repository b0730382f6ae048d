"""Pre-training, calibration and fine-tuning (DATE 2024, Section IV-A, Table III).

`open_data` finds the text; `pretrain`, `calibrate` and `finetune` train, skip finished runs and resume interrupted
ones; `results` turns finished runs into tables. Knows no plot and no value of the paper.
"""

from detransformer.training.calibration import CalibrationConfig, calibrate, row_config
from detransformer.training.config import FinetuneConfig, ModelRow, make_config, model_rows
from detransformer.training.data import TrainingData, open_data, reduced_data
from detransformer.training.finetuning import finetune, finetune_all
from detransformer.training.pretraining import CausalConfig, PretrainConfig, pretrain, pretrain_all
from detransformer.training.results import accuracy_table, pretraining_table

__all__ = [
    "CalibrationConfig",
    "CausalConfig",
    "FinetuneConfig",
    "ModelRow",
    "PretrainConfig",
    "TrainingData",
    "accuracy_table",
    "calibrate",
    "finetune",
    "finetune_all",
    "make_config",
    "model_rows",
    "open_data",
    "pretrain",
    "pretrain_all",
    "pretraining_table",
    "reduced_data",
    "row_config",
]
