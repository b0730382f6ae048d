"""Pre-training, calibration, fine-tuning and probing (DATE 2024, Section IV-A, Table III).

`open_data` finds the text, `pretrain` and `finetune` train (and skip what is finished, resume what was interrupted),
`summary` turns their results into tables. Knows no plot and no value of the paper.
"""

from detransformer.training.calibration import (
    CalibrationConfig,
    CalibrationResult,
    calibrate,
    row_config,
)
from detransformer.training.config import (
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    finetune_recipes,
    make_config,
    model_rows,
)
from detransformer.training.data import TrainingData, open_data, reduced_data
from detransformer.training.finetuning import finetune, finetune_all
from detransformer.training.pretraining import PretrainResult, pretrain, pretrain_all
from detransformer.training.probing import ProbeConfig, bag_of_words, majority, probe, probe_table
from detransformer.training.studies import calibration_curve, structures
from detransformer.training.summary import (
    accuracy_table,
    calibration_table,
    loss_table,
    pretraining_table,
)

__all__ = [
    "CalibrationConfig",
    "CalibrationResult",
    "FinetuneConfig",
    "ModelRow",
    "PretrainConfig",
    "PretrainResult",
    "ProbeConfig",
    "TrainingData",
    "accuracy_table",
    "bag_of_words",
    "calibrate",
    "calibration_table",
    "calibration_curve",
    "finetune",
    "finetune_all",
    "finetune_recipes",
    "loss_table",
    "majority",
    "make_config",
    "model_rows",
    "open_data",
    "pretrain",
    "pretrain_all",
    "pretraining_table",
    "probe",
    "probe_table",
    "reduced_data",
    "row_config",
    "structures",
]
