"""Text and tasks: the mirror folder, the Hub, or the built-in corpus (`open_data`)."""

from detransformer.training.data.sources import SOURCES, TaskRows, TrainingData, open_data
from detransformer.training.data.tasks import TASKS, Task
from detransformer.training.data.text import reduced_data

__all__ = ["SOURCES", "TASKS", "Task", "TaskRows", "TrainingData", "open_data", "reduced_data"]
