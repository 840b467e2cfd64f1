"""transformers' Trainer and TRL's, guarded, against themselves."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.records import StepRecord
from tests.support.distributed import run_ranks
from tests.support.guarded import snapshot, worst_difference
from tests.support.launched import as_launched, each_alone, forget_accelerators

pytest.importorskip("transformers", reason="pip install transformers")

NUM_STEPS = 3
VOCABULARY = 16


class _Model(nn.Module):
    """A decoder of two layers, as transformers makes them, with a buffer; its loss is NaN in `bad` calls."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        size = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(**size, **dropout, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
        self.inner = GPT2LMHeadModel(config)
        self.register_buffer("num_calls", torch.zeros(()))
        self.bad: set[int] = set()
        self.calls = 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = self.inner(input_ids=input_ids, labels=labels, **kwargs)
        if self.training:
            self.num_calls += 1
            if self.calls in self.bad:
                out.loss = out.loss * math.nan
            self.calls += 1
        return out


def _trainer(folder: str, *, guarded: bool, model: nn.Module | None = None, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from harness.integrations.transformers import guarded as made

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": NUM_STEPS,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
    }
    args = TrainingArguments(folder, **{**settings, **changes})
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCABULARY, (64, 8), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    kind = made(Trainer, ladder=True) if guarded else Trainer
    return kind(model=model or _Model(), args=args, train_dataset=data)


def _state(trainer: Any) -> dict[str, Tensor]:
    model = trainer.model
    return {**snapshot(model, trainer.optimizer.optimizer), "num_calls": model.num_calls.clone()}


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _clean(folder: str, **changes: Any) -> None:
    ours, theirs = _trainer(folder, guarded=True, **changes), _trainer(folder, guarded=False, **changes)
    ours.train()
    theirs.train()
    assert worst_difference(_state(ours), _state(theirs)) == ""
    assert _losses(ours) == _losses(theirs)
    assert len(_losses(ours)) == NUM_STEPS
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert ours.guard is None


class _Watched:
    """Keeps the guard's records and the state around each step."""

    def __init__(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        records, states = self.records, self.states = list[StepRecord](), list[dict[str, Tensor]]()

        class Keep(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                states.append(_state(trainer))
                records.extend(trainer.guard.drain(wait=True))

        trainer.add_callback(Keep())


def _bad(folder: str, rank: int, world_size: int) -> None:
    trainer = _trainer(folder, guarded=True)
    watched = _Watched(trainer)
    if rank == world_size - 1:
        trainer.model.bad = {3}  # second micro-batch of step 1
    trainer.train()
    assert worst_difference(watched.states[0], watched.states[1]) == ""
    assert worst_difference(watched.states[1], watched.states[2]) != ""
    bad = watched.records[1]
    assert (bad.verdict, bad.rank, bad.micro_batch) == ("skip", world_size - 1, 1)
    assert [record.verdict for record in watched.records] == ["apply", "skip", "apply"]
    assert (trainer.state.global_step, trainer.lr_scheduler.last_epoch) == (NUM_STEPS, NUM_STEPS)
    assert all(value.isfinite().all() for value in _state(trainer).values())


def _resumed(folder: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = _trainer(folder, guarded=True, **saving)
    whole.train()
    resumed = _trainer(folder, guarded=True, **saving)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert worst_difference(_state(whole), _state(resumed)) == ""
    assert _losses(whole)[2:] == _losses(resumed)[2:]


def _with_adapters() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = _Model().inner
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _of_a_users_settings(folder: str) -> None:
    """LoRA, checkpointed activations, FSDP2; and torch's scheduler has nothing to warn of."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    for model, changes in (
        (_with_adapters, checkpointing),
        (lambda: _Model().inner, {"fsdp": "full_shard", "fsdp_config": fsdp}),
    ):
        trainers = []
        for guarded in (True, False):
            forget_accelerators()
            torch.manual_seed(0)
            trainers.append(_trainer(folder, guarded=guarded, model=model(), max_steps=2, **changes))
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Detected call of .lr_scheduler.step")
                trainers[-1].train()
        states = [snapshot(one.model, one.optimizer.optimizer) for one in trainers]
        assert worst_difference(*states) == ""
        assert _losses(trainers[0]) == _losses(trainers[1])
    forget_accelerators()


def _all(rank: int, world_size: int, folder: str) -> None:
    as_launched(world_size)
    _cases(folder, rank, world_size)
    _of_a_users_settings(folder)
    each_alone()
    _cases(f"{folder}/{rank}", 0, 1)
    _clean(f"{folder}/{rank}", optim="adamw_torch", gradient_accumulation_steps=1, bf16=True)


def _cases(folder: str, rank: int, world_size: int) -> None:
    _clean(folder)
    _bad(folder, rank, world_size)
    _resumed(folder)


def test_a_trainer_is_the_same_and_guarded_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    run_ranks(_all, 2, str(tmp_path), timeout_s=170)
