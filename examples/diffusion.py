"""A denoiser whose averaged weights (EMA) and step counter agree with what was really applied."""

import torch
from torch import nn

from harness import StepGuard

NUM_STEPS, DECAY = 60, 0.95


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))
    average = [parameter.detach().clone() for parameter in model.parameters()]
    applied = torch.zeros(())  # on the model's device: nothing here waits for it
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    guard = StepGuard(model, optimizer, max_norm=1.0)
    for step in range(NUM_STEPS):
        angle = torch.rand(128) * 6.2832
        clean = torch.stack([angle.cos(), angle.sin()], dim=1)
        noise, time = torch.randn_like(clean), torch.rand(128, 1)
        noisy = (1 - time) * clean + time * noise
        weight = 1 / (time if step != 33 else time * 0)  # a weighting that divides by zero
        loss = (
            weight.clamp(max=5.0 if step != 33 else torch.inf)
            * (model(torch.cat([noisy, time], 1)) - noise) ** 2
        ).mean()
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
        applied += guard.applied
        for mean, parameter in zip(average, model.parameters(), strict=True):
            mean.lerp_(parameter.detach(), (1 - DECAY) * guard.applied)
    guard.flush()
    print(f"applied {int(applied)} of {NUM_STEPS} steps")
    print("finite:", all(bool(mean.isfinite().all()) for mean in average))


if __name__ == "__main__":
    main()
