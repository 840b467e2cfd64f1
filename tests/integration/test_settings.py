"""Each switch of a run, tried by training with it."""

import logging
from pathlib import Path

import numpy as np
import pytest

from harness.checkpoint.store import Store
from harness.config import TrainConfig
from harness.runlog.reader import open_run
from harness.training import TrainResult, train
from tests.support.runs import tiny_config


def losses(result: TrainResult) -> list[float]:
    return open_run(result.directory).scalars("train/loss").values.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        ["--loop.precision=bf16"],
        ["--loop.precision=fp16", "--guard.init_loss_scale=1024"],
        ["--optim.name=sgd", "--optim.lr=0.3"],
        ["--optim.name=adagrad", "--optim.lr=0.05"],
        ["--schedule.kind=wsd"],
        ["--loop.micro_batch=2"],
        ["--data.num_workers=2"],
        ["--parallel.strategy=fsdp"],
        ["--deterministic"],
        ["--model.norm=layer", "--model.positions=learned", "--model.mlp=gelu", "--model.bias=true"],
    ],
    ids=lambda settings: settings[0].removeprefix("--"),
)
def test_a_run_with_the_switch_learns(settings: list[str], tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, *settings, "--loop.steps=20"))
    seen = losses(result)
    assert (result.status, len(seen)) == ("finished", 20)
    assert seen[-1] < seen[0] - 0.2
    assert result.num_skips == 0


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "default:The .grad attribute of a Tensor that is not a leaf"
)  # torch.compile's own
def test_a_compiled_run_is_the_same_run(tmp_path: Path) -> None:
    plain = train(tiny_config(tmp_path, "--loop.steps=4", "--loop.eval_every=0"))
    compiled = train(
        tiny_config(tmp_path, "--loop.steps=4", "--loop.eval_every=0", "--name=compiled", "--loop.compile")
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_the_split_into_micro_batches_and_workers_does_not_change_the_samples(tmp_path: Path) -> None:
    whole = train(tiny_config(tmp_path, "--name=whole"))
    split = train(tiny_config(tmp_path, "--name=split", "--loop.micro_batch=2", "--data.num_workers=2"))
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)


def test_an_fp16_overflow_is_skipped_and_halves_the_loss_scale(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, "--loop.precision=fp16", "--guard.init_loss_scale=16777216"))
    assert set(result.incidents) == {"fp16 overflow"}
    scales = open_run(result.directory).scalars("guard/loss_scale").values
    assert scales[1] == scales[0] / 2
    assert result.status == "finished"


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_handwritten_digits_are_learned(kind: str, tmp_path: Path) -> None:
    config = TrainConfig.from_file(
        "digits",
        [
            f"runs_dir={tmp_path}",
            f"model.kind={kind}",
            "loop.steps=60",
            "tracking.progress=off",
            "tracking.tensorboard=false",
        ],
    )
    train(config)
    assert open_run(tmp_path / "digits").last("val/accuracy") > 0.6  # chance is 0.1


def test_images_of_ones_own_are_trained_from_an_npz(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 200)
    images = draw.normal(size=(200, 9, 7)) + labels[:, None, None]
    np.savez(tmp_path / "own.npz", images=images.astype(np.float32), labels=labels)
    settings = ["--task=images", "--model.kind=mlp", f"--data.paths=[{tmp_path / 'own.npz'}]"]
    result = train(tiny_config(tmp_path, *settings, "--loop.global_batch=64", "--loop.steps=60"))
    assert open_run(result.directory).last("val/accuracy") > 0.6  # chance is 0.33


def test_debug_mode_checks_everything_in_every_step(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, "--debug"))
    run = open_run(result.directory)
    assert run.layers("grad_norm").steps.tolist() == list(range(12))


def test_debug_mode_names_the_call_that_made_a_nan(tmp_path: Path) -> None:
    fault = "--faults=[{step: 2, target: activation, parameter: blocks.0.mlp.down}]"
    with (
        pytest.warns(UserWarning, match=r"Error detected in"),
        pytest.raises(RuntimeError, match="nan values"),
    ):
        train(tiny_config(tmp_path, "--debug", fault))
    assert open_run(tmp_path / "runs/tiny").state() == "crashed"


def test_faults_are_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tiny_config(tmp_path, "--faults=[{step: 3, kind: inf, target: loss}]"))
    said = capsys.readouterr().err
    assert "fault armed" in said
    assert "fault strikes" in said
    assert result.incidents == {"non-finite loss": 1}
    assert [event.step for event in open_run(result.directory).events("fault")] == [3]
    assert logging.getLogger("harness").handlers


def test_an_outlier_batch_is_logged_with_its_samples_and_is_no_incident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--loop.steps=30", "--guard.spike_warmup=16", "--checkpoint.healthy_after=6"]
    fault = "--faults=[{step: 24, kind: spike, scale: 10, micro_batch: 1}]"
    result = train(tiny_config(tmp_path, fault, *settings, "--loop.micro_batch=4"))
    run = open_run(result.directory)
    (outlier,) = run.events("outlier")
    assert outlier.step == 24
    wanted = {"kind": "outlier batch", "is_outlier": True, "rank": 0, "micro_batch": 1}
    assert {name: outlier.details[name] for name in wanted} == wanted
    assert len(outlier.details["sample_indices"]) == 4  # those of the micro-batch
    lines = capsys.readouterr().err.splitlines()
    (said,) = [line for line in lines if "outlier batch: gradient norm" in line]
    assert " I step 24: outlier batch" in said
    assert run.events("incident") == []
    assert run.events("alert") == []
    assert (result.num_outliers, result.incidents) == (1, {})
    healthy = [saved.step for saved in Store(result.directory / "checkpoints").saved() if saved.healthy]
    assert healthy[-1] == 24  # six steps later; an incident at step 24 would put that off to step 31


def test_an_incident_names_rank_parameter_micro_batch_and_samples(tmp_path: Path) -> None:
    fault = "--faults=[{step: 5, micro_batch: 2, parameter: blocks.1.mlp.up.weight}]"
    result = train(tiny_config(tmp_path, fault, "--loop.micro_batch=2"))
    (incident,) = open_run(result.directory).events("incident")
    samples = incident.details["sample_indices"]
    assert len(samples) == 2
    wanted = {
        "kind": "non-finite gradient",
        "verdict": "skip",
        "rank": 0,
        "parameter": "blocks.1.mlp.up.weight",
        "module": "blocks.1.mlp.up",
        "micro_batch": 2,
        "num_nan": 1,
        "num_inf": 0,
        "sample_indices": samples,
        "culprits": [{"rank": 0, "micro_batch": 2, "samples": samples}],
    }
    assert incident.step == 5
    assert {name: incident.details[name] for name in wanted} == wanted
