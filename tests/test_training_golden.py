"""The first 20 losses of each kind of training are the saved ones (tests/golden/training.json), interrupted or not.

All run in one thread. On the instruction set that the file names they agree to 1e-6; another one sums in another order,
and bfloat16 or 20 steps of Adam make rounding visible, so that there 1e-2 has to do.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from detransformer.coformer.booster import BoostConfig, boost
from detransformer.coformer.calibration import AggregatorConfig, train_aggregator
from detransformer.coformer.outputs import Outputs
from detransformer.coformer.tasks import ImageTask
from detransformer.training import (
    CalibrationConfig,
    CausalConfig,
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    TrainingData,
    calibrate,
    finetune,
    pretrain,
)
from detransformer.training.data.images import ImageData
from detransformer.training.images import ImageConfig, train_vit

GOLDEN = Path(__file__).parent / "golden" / "training.json"
NUM_STEPS = 20
ALIKE = {"aggregator": 1e-5}  # its AdamW has the eps of all others, 1e-6, where it had 1e-8; all others: 1e-6
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [a + b for a in "abcdefgh" for b in "aeiouwyz"]
DECOUPLED = ModelRow("bert-base", 4, 4)
SIZES = dict(hidden_size=16, num_heads=2, intermediate_size=32, checkpoint_every_s=0)
pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = PretrainConfig(
    **SIZES, initializer_range=0.1, num_steps=NUM_STEPS, seq_len=16, global_batch_size=8, micro_batch_size=4,
    **dict(optimizer="adamw", learning_rate=2e-3, warmup=0.2, decay_power=1.0, dropout=0.1, seed=3),
    **dict(max_train_tokens=4000, max_valid_tokens=320, mixed_precision="no"),
)  # fmt: skip


class RandomWords:
    """Random sentences of 64 words; labels and answers are random too."""

    name = "words"

    def tokenizer(self) -> Tokenizer:
        vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        return tokenizer

    def fingerprint(self) -> str:
        return "random"

    def articles(self, split: str):
        rng = random.Random(split)
        return (" ".join(rng.choices(WORDS, k=40)) for _ in range(200))

    def task_rows(self, task, split: str) -> Dataset:
        rng = random.Random(f"{task.name} {split}")
        rows = []
        for number in range(80 if split == "train" else 16):
            words = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(2)]
            if task.is_question_answering:
                start = words[1].index(" ") + 1
                answers = {"text": [words[1][start : start + 2]], "answer_start": [start]}
                rows.append({"id": str(number), "question": words[0], "context": words[1], "answers": answers})
            else:
                rows.append(dict(zip(task.columns, words, strict=False)) | {"label": rng.randrange(2)})
        return Dataset.from_list(rows)


def image_data() -> ImageData:
    rng = np.random.default_rng(0)
    rows = {"train": 60, "test": 20}
    images = {split: rng.integers(256, size=(num, 32, 32, 3), dtype=np.uint8) for split, num in rows.items()}
    labels = {split: np.arange(num) % 5 for split, num in rows.items()}
    return ImageData("noise", images, labels, num_classes=5, full_rows=rows)


def vit(hidden_size: int, seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)).eval()


def teacher(folder: Path, text: TrainingData) -> Path:
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=text.vocab_size, initializer_range=0.2))
    model.save_pretrained(folder)
    text.save_tokenizer(folder)
    return folder


def losses_of_finetuning(task: str, text: TrainingData, folder: Path, **changed) -> list[float]:
    config = FinetuneConfig(
        checkpoint_every_s=0,
        **dict(learning_rate=1e-3, num_epochs=2, batch_size=8, micro_batch_size=4, seq_len=24, doc_stride=4),
        **dict(warmup=0.1, dropout=0.1) | changed,
    )
    finetune(teacher(folder / "from", text), task, config, text, 1, folder)
    return pd.read_csv(folder / "history.csv")["train_loss"].tolist()[:NUM_STEPS]


def losses_of_pretraining(row: ModelRow, text: TrainingData, folder: Path, config=TEXT, **changed) -> list[float]:
    return pretrain(row, replace(config, **changed), text, folder).history["train_loss"].tolist()


def losses_of_calibration(text: TrainingData, folder: Path) -> list[float]:
    config = CalibrationConfig(
        **dict(num_steps=NUM_STEPS, global_batch_size=8, micro_batch_size=4, seq_len=16, seed=3, fit_sequences=60),
        **dict(max_train_tokens=4000, max_valid_tokens=320, checkpoint_every_s=0),
    )
    result = calibrate(teacher(folder / "from", text), ModelRow("bert-base", 2, 2), config, text, folder)
    return result.history["train_loss"].tolist()


def losses_of_a_decoder(text: TrainingData, folder: Path) -> list[float]:
    config = CausalConfig(
        **dict(num_layers=2, hidden_size=16, num_heads=2, vocab_size=None, num_steps=NUM_STEPS, seq_len=16, seed=3),
        **dict(global_batch_size=8, micro_batch_size=4, dropout=0.1, max_train_tokens=4000, max_valid_tokens=320),
        checkpoint_every_s=0,
    )
    return losses_of_pretraining(ModelRow("gpt2", 1, 2), text, folder, config)


def losses_of_images(folder: Path) -> list[float]:
    config = ImageConfig(
        **dict(hidden_size=16, num_layers=2, num_heads=2, patch_size=8, num_steps=NUM_STEPS, mixed_precision="no"),
        **dict(global_batch_size=16, micro_batch_size=8, dropout=0.1, seed=3, checkpoint_every_s=0),
    )
    return train_vit(config, image_data(), folder).history["train_loss"].tolist()


def losses_of_boosting(folder: Path) -> list[float]:
    """Of the second sub-model, which is trained with the weights that the first one leaves."""
    sizes = dict(num_steps=NUM_STEPS, global_batch_size=16, micro_batch_size=8)
    config = BoostConfig(**sizes, mixed_precision="no", target="soft", checkpoint_every_s=0)
    results = boost([vit(16, 1), vit(8, 2)], vit(24, 9), ImageTask(image_data()), config, folder)
    return results[1].history["train_loss"].tolist()


def losses_of_an_aggregator() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(64, width, generator=generator) for width in (8, 12)]
    labels = torch.randint(5, (64,), generator=generator)
    config = AggregatorConfig(num_epochs=5, batch_size=16, drop=0.3, label_smoothing=0.1)
    return train_aggregator("attention", Outputs(features, [], labels), 5, config, seed=3)[1]


KINDS = {
    "pretraining original, lamb": lambda text, folder: losses_of_pretraining(
        ModelRow(), text, folder, optimizer="lamb", learning_rate=1e-2
    ),
    "pretraining decoupled": lambda text, folder: losses_of_pretraining(DECOUPLED, text, folder, frequency_bias=True),
    "pretraining decoupled, bf16-weights": lambda text, folder: losses_of_pretraining(
        DECOUPLED, text, folder, mixed_precision="bf16-weights"
    ),
    "finetuning MRPC": lambda text, folder: losses_of_finetuning("MRPC", text, folder),
    "finetuning MRPC, bf16-weights": lambda text, folder: losses_of_finetuning(
        "MRPC", text, folder, mixed_precision="bf16-weights"
    ),
    "finetuning SQuAD": lambda text, folder: losses_of_finetuning("SQuAD", text, folder),
    "calibration": losses_of_calibration,
    "decoder": losses_of_a_decoder,
    "images": lambda text, folder: losses_of_images(folder),
    "boosting": lambda text, folder: losses_of_boosting(folder),
    "aggregator": lambda text, folder: losses_of_an_aggregator(),
}


def losses_of(kind: str, folder: Path) -> list[float]:
    return KINDS[kind](TrainingData(RandomWords(), folder / "cache", "random words"), folder / "run")


def weights_in(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("model.safetensors"))]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_before_and_after_an_interruption_too(kind, tmp_path, steps):
    golden = json.loads(GOLDEN.read_text())
    same = golden["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    found = losses_of(kind, tmp_path / "whole")
    assert found == pytest.approx(golden["losses"][kind], rel=ALIKE.get(kind, 1e-6) if same else 1e-2)
    if kind == "aggregator":  # seconds, without checkpoints
        return
    steps.interrupt(9, losses_of, kind, tmp_path / "parts")
    assert losses_of(kind, tmp_path / "parts") == found and steps[0] == 10  # it went on, it did not start again
    assert weights_in(tmp_path / "whole") == weights_in(tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob("checkpoint"))
