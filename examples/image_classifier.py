"""Handwritten digits with the guard, the tracker and checkpoints; start it again and it goes on."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from harness import Checkpointer, ExperimentConfig, ExperimentTracker, StepGuard

NUM_STEPS, EVERY = 120, 40


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    config = ExperimentConfig(experiment_name="digits", run_name="digits", enable_wandb=False)
    with (
        StepGuard(model, optimizer, max_norm=1.0) as guard,
        Checkpointer("checkpoints", keep_last=2) as checkpointer,
        ExperimentTracker(config) as tracker,
    ):
        state = {"model": model, "optimizer": optimizer, "guard": guard}
        first = checkpointer.load(state) or 0
        print(f"going on at step {first}" if first else "a new run")
        for step in range(first, NUM_STEPS):
            chosen = torch.randint(0, len(images), (64,), generator=torch.Generator().manual_seed(step))
            batch = images[chosen]
            if step == 70:
                batch = batch.clone()
                batch[0] = torch.nan  # BatchNorm's running mean would be NaN for ever
            loss = nn.functional.cross_entropy(model(batch), labels[chosen])
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
            for record in guard.drain():
                tracker.log_metrics_batch(
                    {"loss": record.loss, "grad_norm": record.grad_norm}, step=record.step
                )
            if (step + 1) % EVERY == 0:
                guard.flush()
                checkpointer.save(step + 1, state)
        model.eval()
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
        tracker.log_metrics_batch({"accuracy": accuracy}, step=NUM_STEPS - 1)
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
