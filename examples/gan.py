"""Two networks, two optimizers, two guards: what goes wrong in one leaves the other alone."""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from harness import StepGuard


def main() -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
    g_optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-3, fused=True)
    c_optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-3, fused=True)
    g_guard, c_guard = StepGuard(generator, g_optimizer), StepGuard(critic, c_optimizer)
    real, fake = torch.ones(64, 1), torch.zeros(64, 1)
    for step in range(40):
        data = torch.randn(64, 2) * 0.5 + 1.0
        if step == 25:
            data[7] = torch.nan  # a bad sample reaches the critic alone
        made = generator(torch.randn(64, 4))

        loss = bce(critic(data), real) + bce(critic(made.detach()), fake)
        loss.backward()
        c_guard.step(loss)
        c_optimizer.zero_grad()

        loss = bce(critic(made), real)
        loss.backward()  # leaves gradients in the critic too, which are cleared before its next step
        g_guard.step(loss)
        g_optimizer.zero_grad()
        c_optimizer.zero_grad()
    for name, guard in (("critic", c_guard), ("generator", g_guard)):
        guard.flush()
        skipped = [record.step for record in guard.drain() if record.verdict == "skip"]
        print(f"{name}: skipped {skipped}")


if __name__ == "__main__":
    main()
