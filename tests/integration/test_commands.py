"""The commands that look at a run, check it and hand it on, on one real run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint import Checkpointer
from harness.cli.main import COMMANDS, main
from harness.models import build_model
from harness.training import train
from tests.support.runs import tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs of different seeds."""
    folder = tmp_path_factory.mktemp("commands")
    for seed in (1, 2):
        train(tiny_config(folder, f"--name=seed{seed}", f"--seed={seed}"))
    return folder / "runs"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    overview = said(capsys)
    for name in COMMANDS:
        assert name in overview
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0


def test_an_unknown_command_is_answered_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err


def test_runs_are_listed_shown_watched_compared_and_reported(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = said(capsys, "runs", str(runs))
    assert "seed1" in table
    assert "finished" in table
    assert "val/loss" in said(capsys, "show", "seed1", "--runs", str(runs))
    assert "seed1" in said(capsys, "watch", str(runs / "seed1"), "--once")
    assert "seed" in said(capsys, "compare", "seed1", "seed2", "--runs", str(runs))
    report = Path(said(capsys, "report", str(runs / "seed1")).strip())
    assert report.read_text().startswith("<!DOCTYPE html>")


def test_a_run_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_verify_fails_on_a_damaged_checkpoint(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "intact" in said(capsys, "verify", "seed2", "--runs", str(runs))
    shard = max((runs / "seed2/checkpoints").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(runs / "seed2")]) == 1
    assert shard.name in capsys.readouterr().out


def test_sync_completes_the_mirrors_that_the_run_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(tmp_path, "--tracking.tensorboard=true", "--tracking.wandb=offline", "--loop.steps=2"))
    assert "tensorboard, wandb" in said(capsys, "sync", "tiny", "--runs", str(tmp_path / "runs"), "--rebuild")
    assert list((tmp_path / "runs/tiny/tensorboard").glob("events.*"))


def test_sync_makes_a_mirror_that_the_run_did_not_have(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no mirrors" in said(capsys, "sync", str(runs / "seed1"))
    assert "tensorboard" in said(capsys, "sync", str(runs / "seed1"), "--mirror", "tensorboard")
    assert list((runs / "seed1/tensorboard").glob("events.*"))


def weights(runs: Path) -> torch.nn.Module:
    config = tiny_config(runs.parent)
    model = build_model(config.model, sequence_length=config.data.sequence_length)
    with Checkpointer(runs / "seed1/checkpoints") as checkpoints:
        assert checkpoints.load({"model": model}) == config.loop.steps
    return model.eval()


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_exported_weights_are_those_of_the_checkpoint(
    format: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights"
    said(capsys, "export", str(runs / "seed1"), "--format", format, "-o", str(file))
    loaded = load_file(file) if format == "safetensors" else torch.load(file, weights_only=True)
    expected = weights(runs).state_dict()
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == []
    missing = set(expected) - set(loaded)
    assert missing <= {"head.weight"}  # tied to the embedding


def test_transformers_reads_the_exported_llama_and_gives_the_same_logits(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaForCausalLM

    said(capsys, "export", str(runs / "seed1"), "--names", "llama", "-o", str(tmp_path / "model.safetensors"))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, weights(runs)(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_metrics_are_exported(
    format: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics"
    said(capsys, "export", str(runs / "seed1"), "--format", format, "-o", str(file))
    assert file.stat().st_size > 100
