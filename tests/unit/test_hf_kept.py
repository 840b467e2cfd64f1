"""A run of `--task hf` keeps its tokenizer: a resume and an export have the one that it was trained with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from harness.config import TrainConfig
from harness.errors import DataError
from harness.runlog.paths import checkpoints_dir, tokenizer_dir
from harness.tasks.hf.export import export_model
from harness.training import train
from tests.support.hf import hf_config


def steps(config: TrainConfig, count: int, *, allow_change: bool = False) -> TrainConfig:
    loop = dataclasses.replace(config.loop, steps=count, eval_every=0, eval_samples=8)
    data = dataclasses.replace(config.data, allow_change=allow_change)
    schedule = dataclasses.replace(config.schedule, warmup_steps=0, steps=4)
    return dataclasses.replace(config, loop=loop, data=data, schedule=schedule)


def test_a_run_goes_on_and_is_exported_with_the_tokenizer_that_it_began_with(tmp_path: Path) -> None:
    config = hf_config(tmp_path)
    run_dir = Path(train(steps(config, 1)).directory)
    saved = (tokenizer_dir(run_dir) / "tokenizer.json").read_bytes()
    # Other text, of which another tokenizer would be trained; and nothing left of the first one.
    for file in (tmp_path / "corpus").iterdir():
        file.write_text(file.read_text().upper())
    shutil.rmtree(tmp_path / "cache")
    train(steps(config, 2, allow_change=True))
    assert (tokenizer_dir(run_dir) / "tokenizer.json").read_bytes() == saved
    shutil.rmtree(tmp_path / "cache")
    export_model(config, checkpoints_dir(run_dir), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == saved
    assert not (tmp_path / "cache").exists()  # none was trained

    template = tokenizer_dir(run_dir) / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    with pytest.raises(
        DataError, match=r"the tokenizer was \w+ when the checkpoint .*whatever data.allow_change"
    ):
        train(steps(config, 3, allow_change=True))
