"""The experiment tracker under the name of its description: `from harness.experiment_tracking import ...`.

The names are those of `harness.tracking`. `python -m harness.experiment_tracking` runs a complete example.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from harness.tracking import ExperimentConfig, ExperimentTracker, TrainingMetrics

__all__ = ["ExperimentConfig", "ExperimentTracker", "TrainingMetrics", "example_usage"]

_CLASSES, _EPOCHS, _BATCH, _MAX_NORM = 3, 5, 32, 1.0


def example_usage(config: ExperimentConfig | None = None) -> ExperimentTracker:
    """Trains a small classifier and tracks all of it: steps, epochs, gradients, checkpoints, a picture.

    Args:
        config: Default: an experiment `example_usage`, with TensorBoard and without W&B.

    Returns:
        The closed tracker; `run_dir` is where the run lies.
    """
    torch.manual_seed(0)
    inputs, targets = _spirals(num_points=480)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, _CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=_EPOCHS)
    with ExperimentTracker(config or _example_config()) as tracker:
        tracker.log_hyperparameters({"batch_size": _BATCH, "max_grad_norm": _MAX_NORM, **optimizer.defaults})
        tracker.log_model_architecture(model, inputs[:1])
        for epoch in range(_EPOCHS):
            order = torch.randperm(len(inputs))
            for batch in order.split(_BATCH):
                _train_step(tracker, model, optimizer, inputs[batch], targets[batch])
            scheduler.step()
            tracker.log_gradients(model)
            accuracy = _accuracy(model(inputs), targets)
            tracker.log_epoch(epoch, {"accuracy": accuracy})
            tracker.save_checkpoint(
                model, optimizer, epoch, metrics={"accuracy": accuracy}, scheduler=scheduler
            )
        tracker.create_visualization(tracker.run_dir / "training_progress.png")
    return tracker


def _example_config() -> ExperimentConfig:
    # Nobody has asked for an example among the runs of a W&B account.
    return ExperimentConfig(experiment_name="example_usage", enable_wandb=False, log_interval=25)


def _train_step(
    tracker: ExperimentTracker,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    """One step, logged; a gradient that is not finite is logged and not applied. Synchronises."""
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, targets)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM).item()
    tracker.log_training_step(
        TrainingMetrics(
            loss=loss.item(),
            accuracy=_accuracy(outputs, targets),
            learning_rate=optimizer.param_groups[0]["lr"],
            gradient_norm=norm,
            nan_count=sum(int(gradient.isnan().sum()) for gradient in gradients),
            inf_count=sum(int(gradient.isinf().sum()) for gradient in gradients),
            clipping_applied=norm > _MAX_NORM,
            clipping_threshold=_MAX_NORM,
        )
    )
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()


def _accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).float().mean().item()


def _spirals(num_points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (N, 2) on one spiral arm for each class, and their classes (N,)."""
    targets = torch.arange(num_points) % _CLASSES
    radius = torch.linspace(0.1, 1.0, num_points)
    angle = 4 * radius + targets * (2 * math.pi / _CLASSES) + 0.1 * torch.randn(num_points)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), targets


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_dir = example_usage().run_dir
    print(f"the run is in {run_dir}; `harness show {run_dir.name}` and `harness dashboard` show it")
