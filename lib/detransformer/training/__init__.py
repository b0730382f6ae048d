"""Training: masked-LM pre-training, calibration and fine-tuning of BERT (DATE 2024, Section IV-A), GPT-2, ViT.

`open_data` finds the text; `pretrain`, `calibrate`, `finetune`, `causal.train_row` and `images.train_vit` each build an
objective and its batches and hand them to `loop.fit`. What is finished is not trained again; what was interrupted goes
on. Knows no plot and no value of a paper.
"""

from detransformer.training.config import (
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    finetune_recipes,
    make_config,
    model_rows,
)
from detransformer.training.data import TrainingData, open_data, reduced_data
from detransformer.training.distillation import (
    CalibrationConfig,
    CalibrationResult,
    calibrate,
    calibration_table,
)
from detransformer.training.evaluation import export, held_out_loss, load_masked_lm
from detransformer.training.finetuning import finetune, finetune_all
from detransformer.training.pretraining import PretrainResult, pretrain, pretrain_all
from detransformer.training.studies import calibration_study, structures
from detransformer.training.summary import accuracy_table, loss_table, pretraining_table

__all__ = [
    "CalibrationConfig",
    "CalibrationResult",
    "FinetuneConfig",
    "ModelRow",
    "PretrainConfig",
    "PretrainResult",
    "TrainingData",
    "accuracy_table",
    "calibrate",
    "calibration_table",
    "calibration_study",
    "export",
    "finetune",
    "finetune_all",
    "finetune_recipes",
    "held_out_loss",
    "load_masked_lm",
    "loss_table",
    "make_config",
    "model_rows",
    "open_data",
    "pretrain",
    "pretrain_all",
    "pretraining_table",
    "reduced_data",
    "structures",
]
