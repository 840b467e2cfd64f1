"""The guard in a loop that accumulates gradients; one of its samples is bad."""

import torch

from harness import StepGuard

ACCUMULATION, NUM_STEPS = 4, 30


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    target = torch.randn(16)
    with StepGuard(model, optimizer, max_norm=1.0) as guard:
        for step in range(NUM_STEPS):
            for micro_batch in range(ACCUMULATION):
                inputs = torch.randn(8, 16)
                if (step, micro_batch) == (20, 2):
                    inputs[5, 3] = torch.inf
                loss = (model(inputs)[:, 0] - inputs @ target).square().mean()
                (loss / ACCUMULATION).backward()
                guard.accumulate(loss, weight=1 / ACCUMULATION)
            guard.step()
            optimizer.zero_grad()
    for record in guard.drain():
        if record.verdict == "skip":
            print(f"step {record.step}: {record.reason}; micro-batch {record.micro_batch}")
    print("finite:", all(bool(parameter.isfinite().all()) for parameter in model.parameters()))


if __name__ == "__main__":
    main()
