"""What can be set about a run: the schema, and how it is read."""

from harness.config.identity import check_same_run
from harness.config.load import dump_yaml, flatten, parse_arguments, read_yaml, to_dict
from harness.config.schema import (
    AlertConfig,
    CheckpointConfig,
    DataConfig,
    FaultConfig,
    GuardConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "AlertConfig",
    "CheckpointConfig",
    "DataConfig",
    "FaultConfig",
    "GuardConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
    "check_same_run",
    "dump_yaml",
    "flatten",
    "parse_arguments",
    "read_yaml",
    "to_dict",
]
