"""`harness launch`: a file holds the run that was named, and its layers allow a stop the same time."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.cli.launch import run
from harness.config import parse_arguments

CLUSTERS = ["slurm", "kubernetes", "kubeflow"]
ON = ["torchrun", *CLUSTERS]
RUN = ["llama_1b", "--name=My Run_1", "--loop.global_batch=96"]


def launched(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 0
    return capsys.readouterr().out


def printed(capsys: pytest.CaptureFixture[str], on: str, *options: str, program: list[str]) -> str:
    return launched(capsys, f"--on={on}", *options, "--", *program)


def container(text: str) -> dict[str, Any]:
    """The one that trains: of the indexed Job, or of the TrainJob."""
    last = list(yaml.safe_load_all(text))[-1]["spec"]
    found: dict[str, Any] = (
        last["trainer"] if "trainer" in last else last["template"]["spec"]["containers"][0]
    )
    return found


def program_arguments(text: str) -> list[str]:
    """What the file starts, as arguments of the program."""
    if text.startswith("#!"):
        line = next(line for line in text.splitlines() if "-m harness.train" in line)
        words = shlex.split(line.replace('"$@"', "").rstrip("&\\ "))
    else:
        words = [str(word) for word in container(text)["command"]]
    return words[words.index("harness.train") + 1 :]


@pytest.mark.parametrize("on", ON)
def test_the_program_gets_the_configuration_that_was_named(
    on: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "name: it's mine\ndata: {paths: [a b.txt, '#c']}\noptim: {lr: 1.0e-3}\nguard: {max_norm: null}\n"
        "loop: {global_batch: 96}\n"
        "faults: [{step: 3, kind: nan}]\n"
    )
    for program in (RUN, [str(own), "--seed=3"], ["--loop.steps", "9", "--loop.global_batch=6"]):
        text = printed(capsys, on, "--nodes=2", "--processes=3", program=program)
        named = program if program[0].startswith("--") else ["--config", *program]
        runs = ["--runs_dir=/runs"] if on in ("kubernetes", "kubeflow") else []
        assert parse_arguments(program_arguments(text)) == parse_arguments([*named, *runs])
        assert str(own) not in text or on in ("torchrun", "slurm")  # a container does not have it


GRACE = {
    "torchrun": [r"SHUTDOWN_S:-(\d+)"],
    "slurm": [r"B:TERM@(\d+)", r"--wait=(\d+)", r"SHUTDOWN_TIMEOUT=(\d+)"],
    "kubernetes": [r"GracePeriodSeconds: (\d+)", r'SHUTDOWN_TIMEOUT, value: "(\d+)"'],
    "kubeflow": [r"GracePeriodSeconds: (\d+)", r'SHUTDOWN_TIMEOUT, value: "(\d+)"'],
}


@pytest.mark.parametrize("on", ON)
def test_torchrun_kills_after_what_a_stop_may_take_and_before_its_launcher_does(
    on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, grace_s in (
        (launched(capsys, "--print", on), 120),
        (printed(capsys, on, "--grace-s=333", program=RUN), 333),
    ):
        *outer, agent = (int(re.findall(pattern, text)[0]) for pattern in GRACE[on])
        assert agent == grace_s - 10
        assert set(outer) <= {grace_s}


@pytest.mark.parametrize("on", ["torchrun", "slurm"])
def test_a_script_is_one_that_bash_reads(on: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = [*RUN, "--name=it's; echo $(mine)"]
    for text in (launched(capsys, "--print", on), printed(capsys, on, program=program)):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_numbers_and_names_stand_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--nodes=4", "--processes=6")
    torchrun = printed(capsys, "torchrun", *size, program=RUN)
    assert "NNODES:-4" in torchrun
    assert "NPROC:-6" in torchrun
    assert "RDZV:?" in torchrun  # there is no default that all machines could agree on
    slurm = printed(capsys, "slurm", *size, program=RUN)
    for line in ("--nodes=4", "--gpus-per-node=6", "--job-name=my-run-1"):
        assert f"#SBATCH {line}\n" in slurm
    service, job = yaml.safe_load_all(printed(capsys, "kubernetes", *size, program=RUN))
    names = {
        service["metadata"]["name"],
        job["metadata"]["name"],
        job["spec"]["template"]["spec"]["subdomain"],
    }
    assert names == {"my-run-1"} == set(service["spec"]["selector"].values())
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (4, 4)
    assert {"--nnodes=4", "--nproc-per-node=6", "--rdzv-endpoint=my-run-1-0.my-run-1:29500"} <= {
        *job["spec"]["template"]["spec"]["containers"][0]["command"]
    }
    runtime, train = yaml.safe_load_all(printed(capsys, "kubeflow", *size, program=RUN))
    assert runtime["metadata"]["name"] == train["spec"]["runtimeRef"]["name"] == "my-run-1"
    assert (train["spec"]["trainer"]["numNodes"], train["spec"]["trainer"]["numProcPerNode"]) == (4, 6)


@pytest.mark.parametrize("on", ["kubernetes", "kubeflow"])
@pytest.mark.parametrize(("run_name", "expected"), [("7b", "run-7b"), ("123", "run-123"), ("On", "on")])
def test_any_name_of_a_run_makes_a_name_of_an_object(
    run_name: str, expected: str, on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, on, program=["llama_1b", f"--name={run_name}"])
    for document in yaml.safe_load_all(text):
        assert document["metadata"]["name"] == expected
    if on == "kubernetes":
        service, job = yaml.safe_load_all(text)
        names = {job["spec"]["template"]["spec"]["subdomain"], *service["spec"]["selector"].values()}
        assert names == {expected}


@pytest.mark.parametrize("on", CLUSTERS)
def test_a_run_on_cpus_asks_for_no_gpu(on: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, on, program=["debug", "--parallel.device=cpu"])
    assert "gpu" not in text.lower().replace("process a gpu", "")


WRONG = {
    "no nodes": (["--on=slurm", "--nodes=0", "--", "debug"], "--nodes is 0"),
    "no time": (["--on=slurm", "--grace-s=5", "--", "debug"], "--grace-s is 5"),
    "unknown configuration": (["--on=slurm", "--", "llama_2b"], "llama_1b"),
    "unknown key": (["--on=slurm", "--", "debug", "--loop.stepz=1"], "loop.steps"),
    "indivisible": (["--on=kubernetes", "--nodes=7", "--", "llama_1b"], "global_batch"),
    "several torchruns": (["--on=torchrun", "--nodes=2", "--submit", "--", "debug"], "RDZV"),
    "no such program": (["--on=slurm", "--submit", "--", "llama_1b"], "no sbatch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_clear_error_and_no_file(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    arguments, said = WRONG[name]
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert said in output.err
    assert output.err.count("\n") == 1


def test_a_run_needs_a_launcher_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--", "debug"], ["--submit"]):
        with pytest.raises(SystemExit):
            run(arguments)
    assert "--on" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [(), ("--processes=2",)])
def test_the_indexed_job_is_what_kubernetes_takes(
    processes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    texts = [
        launched(capsys, "--print", "kubernetes"),
        printed(capsys, "kubernetes", *processes, program=[*RUN, "--parallel.device=cpu"]),
        printed(capsys, "kubernetes", *processes, program=[*RUN, "--runs_dir=/mnt/it's, mine"]),
    ]
    for document in (document for text in texts for document in yaml.safe_load_all(text)):
        for version in ("1.31", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)


def test_the_train_job_and_its_runtime_are_what_kubeflow_takes(capsys: pytest.CaptureFixture[str]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is missing")
    kinds = {
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    }
    texts = [
        launched(capsys, "--print", "kubeflow"),
        printed(capsys, "kubeflow", program=["debug", "--parallel.device=cpu"]),
    ]
    for document in (document for text in texts for document in yaml.safe_load_all(text)):
        assert (
            kinds[document["kind"]].from_dict(document).to_dict() == document
        )  # what it does not know is left out
