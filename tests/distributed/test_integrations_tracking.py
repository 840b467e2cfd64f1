"""What other trainers log arrives in an ExperimentTracker; TRL's trainer is guarded as transformers' own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.tracking import open_run
from tests.support.distributed import run_ranks
from tests.support.guarded import batch, make_model, snapshot, worst_difference
from tests.support.launched import as_launched
from tests.support.trackers import alone


def _lightning(rank: int, world_size: int, folder: str) -> None:
    import lightning.pytorch as pl

    from harness.integrations.lightning import GuardCallback, TrackerLogger, guarded_precision

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_model()

        def training_step(self, index: Tensor, number: int) -> Tensor:
            inputs, targets = batch(number)
            loss = nn.functional.mse_loss(self.body(inputs), targets)
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)

    tracker = alone(Path(folder), rank=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=TrackerLogger(tracker),
        callbacks=[GuardCallback()],
        plugins=guarded_precision(),
        max_epochs=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.arange(6), batch_size=1))
    run = open_run(tracker.run_dir)
    assert len(run.scalars("train/loss")[1]) == 6
    assert len(run.scalars("guard/grad_norm")[1]) == 4  # those of the last two steps come later
    assert run.state() == "finished"


def test_lightnings_log_arrives(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="pip install lightning")
    run_ranks(_alone, 1, _lightning, str(tmp_path), timeout_s=120)


def _alone(rank: int, world_size: int, case: Any, folder: str) -> None:
    as_launched(world_size)
    case(rank, world_size, folder)


def _sft(folder: str, *, guarded: bool, bad: bool = False, callbacks: Any = None) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from harness.integrations.transformers import guarded as made

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size = {"vocab_size": len(words), "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, **dropout, bos_token_id=1, eos_token_id=1))
    args = SFTConfig(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=16,
        disable_tqdm=True,
    )
    rows = [{"text": " ".join("abcdefgh"[(i + j) % 8] for j in range(8))} for i in range(32)]
    kind = made(SFTTrainer) if guarded else SFTTrainer
    trainer = kind(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if bad:
        weight, calls = model.transformer.h[0].mlp.c_fc.weight, []

        def poison(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * (math.nan if len(calls) == 4 else 1.0)

        weight.register_hook(poison)
    trainer.train()
    return trainer


def _trl(rank: int, world_size: int, folder: str) -> None:
    from harness.integrations.transformers import TrackerCallback

    tracker = alone(Path(folder), rank=0)
    ours = _sft(folder, guarded=True, callbacks=[TrackerCallback(tracker)])
    theirs = _sft(folder, guarded=False)
    assert (
        worst_difference(
            snapshot(ours.model, ours.optimizer.optimizer), snapshot(theirs.model, theirs.optimizer.optimizer)
        )
        == ""
    )
    tracker.close()
    run = open_run(tracker.run_dir)
    assert len(run.scalars("train/loss")[1]) == 4
    assert len(run.scalars("train/grad_norm")[1]) == 4
    bad = _sft(folder, guarded=True, bad=True)
    assert [e["skipped_steps"] for e in bad.state.log_history if "skipped_steps" in e] == [0, 1, 0, 0]
    assert all(p.isfinite().all() for p in bad.model.parameters())


def test_trls_trainer_is_the_same_and_guarded_and_its_log_arrives(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="pip install trl")
    run_ranks(_alone, 1, _trl, str(tmp_path), timeout_s=120)
