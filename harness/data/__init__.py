"""Tasks, the order of samples, and the loader that hands them out."""

from harness.data.alive import num_signs, still_working
from harness.data.contract import check_task
from harness.data.corpus import SourceFile
from harness.data.fetch import fetch, to_device
from harness.data.fingerprint import fingerprint
from harness.data.images import class_loss, load_images
from harness.data.loader import Loader, evaluation_batches
from harness.data.order import sample_order
from harness.data.seeding import seed_everything
from harness.data.shares import Shares
from harness.data.sources import find_quarantined, source_of
from harness.data.task import Batch, Dataset, LossSum, Task, TaskBuilder, cross_entropy, load_task, run_loss
from harness.data.text import load_text, next_byte_loss, text_files

__all__ = [
    "Batch",
    "Dataset",
    "Loader",
    "LossSum",
    "Shares",
    "SourceFile",
    "Task",
    "TaskBuilder",
    "check_task",
    "class_loss",
    "cross_entropy",
    "evaluation_batches",
    "fetch",
    "find_quarantined",
    "fingerprint",
    "load_images",
    "load_task",
    "load_text",
    "next_byte_loss",
    "num_signs",
    "run_loss",
    "sample_order",
    "seed_everything",
    "source_of",
    "still_working",
    "text_files",
    "to_device",
]
