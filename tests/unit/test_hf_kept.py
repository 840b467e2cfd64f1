"""A run of `--task hf` keeps its tokenizer: a resume and an export have the one that it was trained with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.config import TrainConfig
from harness.data import num_signs
from harness.data.prepared import build_folder
from harness.errors import ConfigError, DataError
from harness.runlog.paths import checkpoints_dir, tokenizer_dir
from harness.tasks.hf.export import export_model
from harness.tasks.hf.model import load_model
from harness.tasks.hf.readers import records
from harness.tasks.hf.settings import ModelSettings, SourceSettings, TokenizerSettings
from harness.tasks.hf.tokenizer import keep_tokenizer, load_tokenizer, tokenizer_digest
from harness.training import forecast_memory, train
from tests.support.hf import MODELS, chat_tokenizer, hf_config


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


def loaded(folder: Path, *, kept: Path | None = None, or_settings: bool = False) -> Any:
    settings = TokenizerSettings(name=str(folder))
    return load_tokenizer(
        settings, ModelSettings(name="x"), (None,), cache_dir=folder, kept=kept, or_settings=or_settings
    )


def test_how_a_tokenizer_was_used_before_makes_no_other_one_of_it(tmp_path: Path) -> None:
    used = chat_tokenizer()
    digest = tokenizer_digest(used)
    used(["hello", "yes"], truncation=True, max_length=4, padding="max_length")
    assert tokenizer_digest(used) == digest
    used.save_pretrained(tmp_path / "used")
    keep_tokenizer(loaded(tmp_path / "used"), tmp_path / "kept")
    written = json.loads((tmp_path / "kept" / "tokenizer.json").read_text())
    assert written["truncation"] is None
    assert written["padding"] is None
    assert tokenizer_digest(loaded(tmp_path / "used", kept=tmp_path / "kept")) == digest


def as_older_releases_write(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    for field in ("ignore_merges", "byte_fallback"):
        del tokenizer["model"][field]


def with_other_merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].reverse()


def with_lower_case(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def with_composed_letters(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "NFC"}


def with_single_digits(tokenizer: dict[str, Any]) -> None:
    before = tokenizer["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, before]}
    tokenizer["model"]["vocab"]["31"] = 300
    tokenizer["model"]["merges"].append(["3", "1"])


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (as_older_releases_write, True),  # which this release reads
        (with_other_merges, False),
        (with_lower_case, False),
        (with_composed_letters, False),
        (with_single_digits, False),
    ],
)
def test_a_tokenizer_is_told_by_the_tokens_that_it_gives_and_not_by_its_file(
    change: Callable[[dict[str, Any]], None], is_same: bool, tmp_path: Path
) -> None:
    chat_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    assert (tokenizer_digest(loaded(tmp_path)) == tokenizer_digest(chat_tokenizer())) is is_same


def test_how_a_release_writes_a_tokenizer_is_not_in_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer()
    digest, content = tokenizer_digest(tokenizer), json.loads(tokenizer.backend_tokenizer.to_str())
    as_older_releases_write(content)
    older = SimpleNamespace(to_str=lambda: json.dumps(content))
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda _: older))
    assert tokenizer_digest(tokenizer) == digest


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": 1}'])
def test_a_kept_tokenizer_that_cannot_be_read_is_made_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, kept = tmp_path / "name", tmp_path / "kept"
    chat_tokenizer().save_pretrained(name)
    keep_tokenizer(chat_tokenizer(), kept)
    (kept / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        loaded(name, kept=kept)
    again = loaded(name, kept=kept, or_settings=True)
    assert "cannot be loaded" in caplog.text
    assert tokenizer_digest(again) == tokenizer_digest(chat_tokenizer())
    keep_tokenizer(again, kept)
    assert tokenizer_digest(loaded(name, kept=kept)) == tokenizer_digest(again)
    assert (tmp_path / "kept.damaged" / "tokenizer.json").read_bytes() == content


def test_a_folder_has_its_name_once_all_of_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def build(folder: Path) -> None:
        (folder / "within").mkdir()
        (folder / "within" / "a").write_text("a")
        (folder / "b").write_text("b")

    monkeypatch.setattr(os, "fsync", noting)
    build_folder(tmp_path / "made", build)
    unfinished = f"made.tmp-{os.getpid()}"
    assert sorted(synced[:-1]) == [
        unfinished,
        *(f"{unfinished}/{name}" for name in ("b", "within", "within/a")),
    ]
    assert synced[-1] == "."


def test_memory_is_predicted_for_the_settings_and_not_for_a_run_of_the_same_name(tmp_path: Path) -> None:
    config = hf_config(tmp_path)
    expected = forecast_memory(config, num_ranks=1)
    kept = tokenizer_dir(Path(config.runs_dir, config.name))
    kept.parent.mkdir(parents=True)
    keep_tokenizer(chat_tokenizer(), kept)
    assert forecast_memory(config, num_ranks=1).parameters == expected.parameters


def test_what_is_loaded_by_name_gives_signs_of_life(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model = load_model(ModelSettings(config=MODELS["llama"]), vocab_size=300)
    model.save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "data"))
    for load in (
        lambda: load_model(ModelSettings(name=str(tmp_path / "model"))),
        lambda: loaded(tmp_path / "tokenizer"),
        lambda: list(records(SourceSettings(path=str(tmp_path / "data")))),
    ):
        before = num_signs()
        load()
        assert num_signs() > before
