"""The five downstream tasks of Table III and RTE: their names, columns, labels and metric."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task; `full_train_rows` is the size of the official training set, to call smaller ones reduced."""

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    full_train_rows: int
    full_eval_rows: int

    @property
    def is_question_answering(self) -> bool:
        return not self.labels


TASKS = {
    task.name: task
    for task in (
        Task("CoLA", ("sentence",), ("unacceptable", "acceptable"), "mcc", 8_551, 1_043),
        Task("SST-2", ("sentence",), ("negative", "positive"), "accuracy", 67_349, 872),
        Task("MRPC", ("sentence1", "sentence2"), ("different", "paraphrase"), "accuracy", 3_668, 408),
        Task(
            "MNLI", ("sentence1", "sentence2"), ("entailment", "neutral", "contradiction"), "accuracy", 392_702, 9_815
        ),
        Task("RTE", ("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy", 2_490, 277),
        Task("SQuAD", ("question", "context"), (), "f1", 87_599, 10_570),
    )
}


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown: choose one of {', '.join(TASKS)}.")
    return TASKS[name]
