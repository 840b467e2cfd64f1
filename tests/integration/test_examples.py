"""Every example runs by itself, and what it makes go wrong in it does no harm."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "image_classifier": "sklearn",
    "trainer": "transformers",
    "causal_lm": "datasets",
    "accelerate_loop": "transformers",
    "sft": "trl",
    "lightning_module": "lightning",
}
SAID = {
    "plain_loop": ["step 20: ", "micro-batch 2", "finite: True"],
    "gan": ["critic: skipped [25]", "generator: skipped []"],
    "image_classifier": ["a new run", "accuracy 0.9"],
    "diffusion": ["applied 59 of 60 steps", "finite: True"],
    "trainer": ["finite: True"],
    "causal_lm": ["Perplexity: 1", "finite: True"],
    "accelerate_loop": ["epoch 2: ", "skipped: [9]", "finite: True"],
    "sft": ["finite: True"],
    "lightning_module": ["finite: True"],
}


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs_and_its_trouble_does_no_harm(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    said = run(name, capsys)
    for words in SAID[name]:
        assert words in said
    if name == "image_classifier":
        assert "going on at step 120" in run(name, capsys)


def test_each_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAID}
