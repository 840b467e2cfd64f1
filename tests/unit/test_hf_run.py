"""`--task hf` as a whole program: trained, resumed, exported, loaded by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from harness.checkpoint import Checkpointer
from harness.cli.main import main
from harness.config import LoopConfig, TrainConfig
from harness.config.presets import preset_file
from harness.runlog.reader import open_run
from harness.tasks.hf.export import export_model
from harness.training import train
from harness.training.tasks import build_task
from tests.support.hf import MODELS, hf_config
from tests.support.runs import corpus


def longer(config: TrainConfig, steps: int) -> TrainConfig:
    loop = LoopConfig(steps=steps, global_batch=8, eval_every=3, eval_samples=16)
    return dataclasses.replace(
        config, loop=loop, schedule=dataclasses.replace(config.schedule, warmup_steps=2, steps=8)
    )


@pytest.mark.parametrize("model", MODELS)
def test_exported_weights_are_those_of_the_checkpoint_and_come_in_again(tmp_path: Path, model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = hf_config(tmp_path, model=model)
    trained = build_task(config).model
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"model": trained})
    export_model(config, tmp_path / "checkpoints", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trained.eval()(tokens).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 280
    back = hf_config(tmp_path, model_settings={"name": str(tmp_path / "out")}, tokenizer={})
    with torch.no_grad():
        assert torch.equal(build_task(back).model.eval()(tokens).logits, loaded(tokens).logits)


# Of transformers' own, where peft asks a model about it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_resumed_run_with_adapters_goes_on_bit_for_bit(tmp_path: Path) -> None:
    lora = {"r": 2, "dropout": 0.1}
    whole = train(longer(hf_config(tmp_path / "a", lora=lora), 8))
    train(longer(hf_config(tmp_path / "b", lora=lora), 4))
    resumed = train(longer(hf_config(tmp_path / "b", lora=lora), 8))
    one, other = (open_run(result.directory) for result in (whole, resumed))
    assert one.scalars("train/loss").values.tolist() == other.scalars("train/loss").values.tolist()
    for source in ("chat", "text"):
        assert one.last(f"val/loss/{source}") == other.last(f"val/loss/{source}")
    for more, file in (([], "model.safetensors"), (["--adapters"], "adapter_model.safetensors")):
        output = tmp_path / f"out{len(more)}"
        assert main(["export", str(resumed.directory), "--format", "hf", "-o", str(output), *more]) == 0
        assert (output / file).is_file()


def test_the_tiny_preset_trains_without_a_network(tmp_path: Path) -> None:
    text = corpus(tmp_path / "corpus")
    config = TrainConfig.from_file(
        preset_file("hf_tiny"),
        [
            f"task_args.sources=[{{path: {text}}}]",
            "task_args.tokenizer.train_vocab_size=280",
            f"runs_dir={tmp_path / 'runs'}",
            f"data.cache_dir={tmp_path / 'cache'}",
            "loop.steps=6",
            "data.sequence_length=32",
        ],
    )
    losses = open_run(train(config).directory).scalars("train/loss").values.tolist()
    assert losses[-1] < losses[0]
