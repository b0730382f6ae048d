"""Scores of the five tasks, times 100: scikit-learn's Matthews correlation and accuracy, torchmetrics' SQuAD.

Both libraries take seconds to import, which every training process would pay; they are imported when used.
"""

from collections.abc import Mapping, Sequence

from detransformer.training.data.tasks import Task


def classification_scores(task: Task, predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """The task's own metric, and accuracy for all."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    scores = {"accuracy": 100 * float(accuracy_score(labels, predicted))}
    if task.metric == "mcc":
        scores["mcc"] = 100 * float(matthews_corrcoef(labels, predicted))
    return scores


def majority_score(task: Task, rows: Mapping[str, Sequence]) -> float:
    """The score of always guessing the most frequent label of `rows`, as a model that learned nothing would.

    Its Matthews correlation is 0, and one answer to all questions is right nowhere.
    """
    if task.metric == "mcc" or task.is_question_answering:
        return 0.0
    labels = list(rows["label"])
    return 100 * max(map(labels.count, set(labels))) / len(labels)


def squad_scores(answers: dict[str, str], rows: Sequence[dict]) -> dict[str, float]:
    """Exact match and F1 of SQuAD v1.1 for `answers` (question id -> text) over rows with `id` and `answers`."""
    from torchmetrics.functional.text import squad

    predicted = [{"id": row["id"], "prediction_text": answers[row["id"]]} for row in rows]
    target = [{"id": row["id"], "answers": row["answers"]} for row in rows]
    scores = squad(predicted, target)
    return {"exact_match": float(scores["exact_match"]), "f1": float(scores["f1"])}
