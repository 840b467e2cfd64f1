"""The loop of accelerate's `examples/nlp_example.py`, on made-up sentences, unchanged but for the two
lines that are marked. One batch has an infinite loss."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup, set_seed

from harness.integrations.accelerate import step_guard

NUM_EPOCHS, BATCH_SIZE, GRADIENT_ACCUMULATION_STEPS = 3, 8, 2


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(3, 64, (count, 12), generator=torch.Generator().manual_seed(count))
    return [{"input_ids": row, "labels": (row[0] > 33).long()} for row in rows]


def main() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS)
    set_seed(42)
    train_dataloader = DataLoader(sentences(128), shuffle=True, batch_size=BATCH_SIZE)
    eval_dataloader = DataLoader(sentences(32), batch_size=BATCH_SIZE)
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**size, intermediate_size=32))
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=1e-2, fused=True)
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer=optimizer, num_warmup_steps=4,
        num_training_steps=(len(train_dataloader) * NUM_EPOCHS) // GRADIENT_ACCUMULATION_STEPS,
    )  # fmt: skip
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    guard = step_guard(accelerator, model, optimizer, max_norm=1.0)  # added
    for epoch in range(NUM_EPOCHS):
        model.train()
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                if (epoch, step) == (1, 3):
                    loss = loss * torch.inf
                accelerator.backward(loss)
                guard.step(loss)  # in place of optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        model.eval()
        num_right = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(dim=-1)
            num_right += accelerator.gather_for_metrics(predictions == batch["labels"]).sum().item()
        accelerator.print(f"epoch {epoch}: {num_right} of 32 right")
    guard.flush()
    accelerator.print("skipped:", [record.step for record in guard.drain() if record.skipped])
    accelerator.print("finite:", all(bool(parameter.isfinite().all()) for parameter in model.parameters()))


if __name__ == "__main__":
    main()
