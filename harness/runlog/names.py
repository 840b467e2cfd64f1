"""What metrics and events are called in the log, and so in mirrors, pictures, tables, alerts, on the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["EventName", "Metric", "Prefix", "main_first", "page_names"]


class Metric:
    """The metrics that the trainer writes, or that something shows by name."""

    TRAIN_LOSS: Final = "train/loss"
    TRAIN_PERPLEXITY: Final = "train/perplexity"
    TRAIN_ACCURACY: Final = "train/accuracy"
    GRAD_NORM: Final = "train/grad_norm"
    """L2 norm over all parameters before clipping."""
    GRAD_NORM_CLIPPED: Final = "train/grad_norm_clipped"
    CLIP_COEF: Final = "train/clip_coef"
    CLIPPED: Final = "train/clipped"
    CLIP_THRESHOLD: Final = "train/clip_threshold"
    LR: Final = "train/lr"
    TOKENS: Final = "train/tokens"
    """Tokens trained on since the first step."""

    VAL_LOSS: Final = "val/loss"
    VAL_PERPLEXITY: Final = "val/perplexity"
    VAL_ACCURACY: Final = "val/accuracy"
    VAL_BITS_PER_BYTE: Final = "val/bits_per_byte"

    NUM_NAN: Final = "guard/num_nan"
    """NaN elements in the gradients of a step; `NUM_INF` and `NUM_ZERO` likewise."""
    NUM_INF: Final = "guard/num_inf"
    NUM_ZERO: Final = "guard/num_zero"
    MAX_ABS: Final = "guard/max_abs"
    SKIPS: Final = "guard/skips"
    """Steps skipped since the first one."""
    CLIP_FRAC: Final = "guard/clip_frac"
    LOSS_SCALE: Final = "guard/loss_scale"
    SPIKE_SCORE: Final = "guard/spike_score"

    STEP_S: Final = "time/step_s"
    DATA_WAIT_S: Final = "time/data_wait_s"
    COMPUTE_S: Final = "time/compute_s"
    CHECKPOINT_BLOCKED_S: Final = "time/checkpoint_blocked_s"
    TOKENS_PER_S: Final = "speed/tokens_per_s"
    MFU_FRAC: Final = "speed/mfu_frac"
    HFU_FRAC: Final = "speed/hfu_frac"

    CPU_FRAC: Final = "system/cpu_frac"
    PROCESS_CPU_CORES: Final = "system/process_cpu_cores"
    RAM_USED_GB: Final = "system/ram_used_gb"
    PROCESS_RAM_GB: Final = "system/process_ram_gb"
    MEMORY_USAGE: Final = "system/memory_usage"
    GPU_UTILIZATION: Final = "system/gpu_utilization"


class Prefix:
    """What the names of a group of metrics begin with."""

    TRAIN: Final = "train/"
    VAL: Final = "val/"
    EPOCH: Final = "epoch/"
    TIME: Final = "time/"
    SPEED: Final = "speed/"
    SYSTEM: Final = "system/"
    """A node's samples: `system/cpu_frac`, `system/gpu0/util_frac`, `system/NODE/...`."""
    LAYERS: Final = "layers/"
    """`layers/STATISTIC/PARAMETER`, made of a record of kind `layers`."""
    RANKS: Final = "ranks/"
    """`ranks/QUANTITY/min`, `mean`, `max` and `max_rank`, made of a record of kind `ranks`."""


class EventName:
    """What the events of a run are called."""

    INCIDENT: Final = "incident"
    OUTLIER: Final = "outlier"
    FINDING: Final = "finding"
    CHECKPOINT: Final = "checkpoint"
    CHECKPOINT_FAILED: Final = "checkpoint_failed"
    RESUME: Final = "resume"
    FAULT: Final = "fault"
    ROLLBACK: Final = "rollback"
    STOP: Final = "stop"
    ALERT: Final = "alert"


def main_first(names: Iterable[str]) -> list[str]:
    """In the order in which they matter where not all can be shown: those of `Metric`, those of ranks, the
    others, each by name. Those of layers, of which there are thousands, are left out."""
    main = {value for name, value in vars(Metric).items() if name.isupper()}
    shown = (name for name in names if not name.startswith(Prefix.LAYERS))
    return sorted(shown, key=lambda name: (name not in main, not name.startswith(Prefix.RANKS), name))


def page_names() -> dict[str, dict[str, str]]:
    """All of them for JavaScript: `page_names()["metric"]["TRAIN_LOSS"]`; and "prefix", "event"."""
    groups = {"metric": Metric, "prefix": Prefix, "event": EventName}
    return {
        group: {name: value for name, value in vars(names).items() if name.isupper()}
        for group, names in groups.items()
    }
