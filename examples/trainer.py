"""transformers' Trainer, guarded: a tiny GPT-2 of which one batch has an infinite loss."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from harness.integrations.transformers import guarded


class Troubled(GPT2LMHeadModel):
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        self.calls += 1
        if self.calls == 7:
            out.loss = out.loss * torch.inf
        return out


def main() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = Troubled(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    samples = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (128, 16))]
    args = TrainingArguments(
        "trainer-output", max_steps=12, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=4, max_grad_norm=1.0, disable_tqdm=True,
        remove_unused_columns=False,  # which go by the names that forward takes
    )  # fmt: skip
    guarded(Trainer)(model=model, args=args, train_dataset=samples).train()
    print("finite:", all(bool(parameter.isfinite().all()) for parameter in model.parameters()))


if __name__ == "__main__":
    main()
