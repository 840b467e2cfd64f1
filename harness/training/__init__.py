"""Where everything is wired together: `train(config)` runs a training from end to end."""

from harness.training.build import train
from harness.training.callbacks import Callback
from harness.training.memory_forecast import MemoryForecast, forecast_memory
from harness.training.summary import TrainResult

__all__ = ["Callback", "MemoryForecast", "TrainResult", "forecast_memory", "train"]
