"""The preset `hf_finetune` from end to end, with stand-ins for what it takes from the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import Checkpointer
from harness.cli.main import main
from harness.config import TrainConfig
from harness.config.presets import preset_file
from harness.runlog.paths import checkpoints_dir
from harness.runlog.reader import open_run
from harness.training import train
from harness.training.tasks import build_task
from tests.support.hf import MODELS, chat_tokenizer, chats


def saved_model(folder: Path, kind: str) -> Path:
    """A model of a few thousand parameters with a tokenizer, as `from_pretrained` finds one on the Hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(vocab_size=len(tokenizer), **MODELS[kind]), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return folder


def config_of(folder: Path, model: Path, *more: str) -> TrainConfig:
    """The preset, with a model, chats and sizes that fit here; everything else as it is."""
    sources = [
        {"path": str(chats(folder / "train.jsonl", count=40)), "use": "train", "name": "train"},
        {"path": str(chats(folder / "test.jsonl", count=8)), "use": "val", "name": "test"},
    ]
    settings = {
        "task_args.model.name": model,
        "task_args.sources": json.dumps(sources),
        "data.sequence_length": 64,
        "data.cache_dir": folder / "cache",
        "runs_dir": folder / "runs",
        "loop.eval_every": 2,
        "checkpoint.every": 2,
        "schedule.warmup_steps": 1,
        "schedule.steps": 4,
        "tracking.tensorboard": "false",
    }
    return TrainConfig.from_file(
        preset_file("hf_finetune"), [*(f"{key}={value}" for key, value in settings.items()), *more]
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20).reshape(2, 10)).logits


# Of transformers' own, where peft asks a model about it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_the_finetuning_preset_trains_goes_on_and_comes_back_by_from_pretrained(
    tmp_path: Path, kind: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = saved_model(tmp_path / "base", kind)
    for steps in (2, 4):
        config = config_of(tmp_path, base, f"loop.steps={steps}")
        run_dir = Path(train(config).directory)
    run = open_run(run_dir)
    losses = run.scalars("train/loss").values.tolist()
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert run.last("val/loss/test") == pytest.approx(run.last("val/loss"))
    assert run.last("train/loss/train") == pytest.approx(run.last("train/loss"))

    trained = build_task(config).model
    with Checkpointer(checkpoints_dir(run_dir)) as checkpointer:
        assert checkpointer.load({"model": trained}) == 4
    for more, output in (["--adapters"], tmp_path / "adapters"), ([], tmp_path / "merged"):
        assert main(["export", str(run_dir), "--format", "hf", "-o", str(output), *more]) == 0
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), tmp_path / "adapters"
    )
    assert torch.equal(logits(adapted), logits(trained))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(logits(merged), logits(trained.merge_and_unload()))
    assert not torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base, dtype="auto")))
    chat = [{"role": "user", "content": "hello"}]
    first, last = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "merged"))
    assert first.apply_chat_template(chat, tokenize=False) == last.apply_chat_template(chat, tokenize=False)
