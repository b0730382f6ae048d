"""The five downstream tasks of Table III and RTE: their names, columns, labels and metric."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task; `full_train_rows` and `full_eval_rows` are those of the official sets, to call smaller ones reduced."""

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    full_train_rows: int
    full_eval_rows: int

    @property
    def is_question_answering(self) -> bool:
        return not self.labels


PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task("CoLA", ("sentence",), ("unacceptable", "acceptable"), "mcc", 8_551, 1_043),
        Task("SST-2", ("sentence",), ("negative", "positive"), "accuracy", 67_349, 872),
        Task("MRPC", PAIR, ("different", "paraphrase"), "accuracy", 3_668, 408),
        Task("MNLI", PAIR, ("entailment", "neutral", "contradiction"), "accuracy", 392_702, 9_815),
        Task("RTE", PAIR, ("entailment", "not_entailment"), "accuracy", 2_490, 277),
        # The paper does not define its "Acc" for SQuAD; exact match is the share of questions answered right.
        Task("SQuAD", ("question", "context"), (), "exact_match", 87_599, 10_570),
    )
}


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown: choose one of {', '.join(TASKS)}.")
    return TASKS[name]
