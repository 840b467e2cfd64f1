"""Tasks, the order of samples, and the loader that hands them out."""

from harness.data.fetch import fetch
from harness.data.images import class_loss, load_images
from harness.data.loader import Loader, evaluation_batches
from harness.data.order import sample_order
from harness.data.task import Batch, Dataset, LossSum, Task, TaskBuilder, cross_entropy, load_task
from harness.data.text import load_text, next_byte_loss

__all__ = [
    "Batch",
    "Dataset",
    "Loader",
    "LossSum",
    "Task",
    "TaskBuilder",
    "class_loss",
    "cross_entropy",
    "evaluation_batches",
    "fetch",
    "load_images",
    "load_task",
    "load_text",
    "next_byte_loss",
    "sample_order",
]
