"""What can be set about a run, section by section, and how it is read."""

from harness.config.alerts import AlertConfig
from harness.config.checkpoint import CheckpointConfig
from harness.config.data import DataConfig
from harness.config.faults import FaultConfig
from harness.config.guard import GuardConfig
from harness.config.identity import check_same_run
from harness.config.incidents import IncidentsConfig
from harness.config.keys import flatten
from harness.config.load import dump_yaml, parse_arguments, read_yaml, to_dict
from harness.config.loop import LoopConfig
from harness.config.model import ModelConfig
from harness.config.muon import MuonConfig
from harness.config.optim import OptimConfig
from harness.config.parallel import ParallelConfig
from harness.config.schedule import ScheduleConfig
from harness.config.straggler import StragglerConfig
from harness.config.task_args import checked_arguments
from harness.config.tracking import TrackingConfig
from harness.config.train import TrainConfig
from harness.config.watchdog import WatchdogConfig

__all__ = [
    "AlertConfig",
    "CheckpointConfig",
    "DataConfig",
    "FaultConfig",
    "GuardConfig",
    "IncidentsConfig",
    "LoopConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "StragglerConfig",
    "TrackingConfig",
    "TrainConfig",
    "WatchdogConfig",
    "check_same_run",
    "checked_arguments",
    "dump_yaml",
    "flatten",
    "parse_arguments",
    "read_yaml",
    "to_dict",
]
