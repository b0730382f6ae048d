"""Real data from the Hugging Face Hub: nyu-mll/glue, rajpurkar/squad, wikimedia/wikipedia, and BERT's tokenizer.

Whether the Hub answers is asked once, in seconds, before anything is downloaded.
"""

import hashlib
import threading
from collections.abc import Iterator
from itertools import islice

from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from tokenizers import Tokenizer

from detransformer.training.data.tasks import Task

GLUE, SQUAD, WIKIPEDIA = "nyu-mll/glue", "rajpurkar/squad", "wikimedia/wikipedia"
WIKIPEDIA_SNAPSHOT = "20231101.en"
TOKENIZER = "google-bert/bert-base-uncased"
NUM_VALID_ARTICLES = 500  # the snapshot has one split: its first articles are held out


def hub_problem(offline: bool, timeout_s: float = 4.0) -> str | None:
    """Why the Hub cannot be used, or None; answers within `timeout_s` even where name resolution hangs."""
    if offline:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask():
        try:
            HfApi().dataset_info(GLUE, timeout=timeout_s)
            answer.append(None)
        except Exception as error:  # every failure means the same here: not usable now
            answer.append(f"{type(error).__name__} while asking for {GLUE}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answer[0] if answer else f"no answer within {timeout_s:g} s"


class HubSource:
    """The Hub's official sets as a data source (see `sources.py` for what a source offers)."""

    name = "hub"

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_pretrained(TOKENIZER)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{WIKIPEDIA} {WIKIPEDIA_SNAPSHOT} {TOKENIZER}".encode()).hexdigest()[:16]

    def task_rows(self, task: Task, split: str) -> Dataset:
        if task.is_question_answering:
            return load_dataset(SQUAD, split=split)
        split = f"{split}_matched" if task.name == "MNLI" and split == "validation" else split
        rows = load_dataset(GLUE, task.name.lower().replace("-", ""), split=split)  # SST-2 is sst2
        if task.name == "MNLI":
            rows = rows.rename_columns({"premise": "sentence1", "hypothesis": "sentence2"})
        return rows.select_columns([*task.columns, "label"])  # GLUE's label numbers are the task's order

    def articles(self, split: str) -> Iterator[str]:
        stream = load_dataset(WIKIPEDIA, WIKIPEDIA_SNAPSHOT, split="train", streaming=True)
        texts = (f"{row['title']}\n{row['text']}" for row in stream)
        if split == "validation":
            return islice(texts, NUM_VALID_ARTICLES)
        return islice(texts, NUM_VALID_ARTICLES, None)
