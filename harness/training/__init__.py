"""Where everything is wired together: `train(config)` runs a training from end to end."""

from harness.training.build import train
from harness.training.callbacks import Callback
from harness.training.summary import TrainResult

__all__ = ["Callback", "TrainResult", "train"]
