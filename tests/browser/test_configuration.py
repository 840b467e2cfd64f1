"""The configuration as a form: filled in, refused, saved, loaded again, and written as a command."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from harness.config import TrainConfig, parse_arguments
from harness.errors import ConfigError
from tests.browser.actions import choose, fill, go_to, toast
from tests.browser.conftest import Dashboard, Place

NAME = 'it\'s <b>"mine": 1e-3'


@pytest.fixture
def form(page: Page, dashboard: Dashboard) -> Page:
    page.goto(dashboard.address)
    go_to(page, "Configuration")
    return page


def test_what_cannot_be_run_is_refused_in_the_words_of_the_command_line(form: Page) -> None:
    for key, value in (("loop.steps", "none"), ("loop.steps", "0"), ("optim.lr", "-1")):
        with pytest.raises(ConfigError) as refused:
            parse_arguments([f"--{key}={value}"])
        fill(form, key, value)
        expect(form.locator("#verdict")).to_have_text(" ".join(str(refused.value).replace("`", "'").split()))
        fill(form, key, str({"loop.steps": 8, "optim.lr": 0.5}[key]))
        expect(form.locator("#verdict")).to_have_text("This configuration is valid.")
    expect(form.locator(".cm-content").first).to_contain_text("lr: 0.5")


def test_the_form_is_kept_in_configs_and_taken_up_again(form: Page, place: Place) -> None:
    fill(form, "loop.steps", "77")
    fill(form, "name", NAME)
    form.locator("#save-name textarea, #save-name input").fill("kept")
    form.locator("#save").click()
    expect(toast(form)).to_contain_text("configs/kept.yaml")
    file = place.path / "configs" / "kept.yaml"
    assert TrainConfig.from_file(file) == parse_arguments(["--loop.steps=77", f"--name={NAME}"])
    fill(form, "loop.steps", "78")
    form.locator("#save").click()
    expect(toast(form)).to_contain_text("already exists")
    form.locator("#save-name textarea, #save-name input").fill("../kept")
    form.locator("#save").click()
    expect(toast(form)).to_contain_text("without slashes")
    assert TrainConfig.from_file(file).loop.steps == 77

    steps = form.locator('[id="field-loop.steps"]').locator("input, textarea")
    choose(form, "#preset", "defaults")
    expect(steps).to_have_value(str(TrainConfig().loop.steps))
    choose(form, "#preset", "kept")
    expect(steps).to_have_value("77")
    expect(form.locator(".cm-content").first).to_contain_text("steps: 77")


def test_names_and_numbers_that_cannot_be_are_refused_in_a_sentence(form: Page, place: Place) -> None:
    """Beside the field while it is filled in, and when the run is started all the same."""
    steps = TrainConfig().loop.steps
    for key, value, words, sound in (
        ("name", "   ", "name is '   ': a run needs a name, of more than blanks.", "sound"),
        ("name", "x" * 300, "it is a folder's name, of at most 200 bytes.", "sound"),
        ("loop.steps", "1e20", '"loop.steps": Expected a int. Got value: 1e+20.', str(steps)),
    ):
        fill(form, key, value)
        expect(form.locator("#verdict")).to_contain_text(words)
        go_to(form, "Training")
        form.locator("#start").click()
        expect(toast(form)).to_contain_text(words)
        go_to(form, "Configuration")
        fill(form, key, sound)
        expect(form.locator("#verdict")).to_have_text("This configuration is valid.")
    go_to(form, "Training")
    form.locator("#processes input").fill("-1")
    form.locator("#start").click()
    expect(toast(form)).to_contain_text("the number of processes is -1: it is a whole number from 1 to 1024.")
    form.locator("#processes input").fill("1")
    form.get_by_role("button", name=re.compile("^Command to start")).click()
    form.locator("#nodes input").fill("0")
    form.locator("#show-command").click()
    expect(toast(form)).to_contain_text("the number of nodes is 0: it is a whole number from 1 to 1024.")
    assert not (place.runs / "sound").exists()


def test_a_file_that_appears_in_configs_can_be_started_from(form: Page, place: Place) -> None:
    (place.path / "configs").mkdir(exist_ok=True)
    (place.path / "configs" / "late.yaml").write_text("loop: {steps: 5}\n")
    (place.path / "configs" / "wrong.yaml").write_text("loop: {stps: 5}\n")
    choose(form, "#preset", "late")
    expect(form.locator(".cm-content").first).to_contain_text("steps: 5")
    choose(form, "#preset", "wrong")
    expect(toast(form)).to_contain_text("stps")


def test_the_command_is_shown_for_every_launcher(form: Page) -> None:
    fill(form, "name", "a name; $(id)")
    go_to(form, "Training")
    form.get_by_role("button", name=re.compile("^Command to start")).click()
    command = form.locator("#command .cm-content")
    for launcher, words in (
        ("python", "python"),
        ("torchrun", "torchrun --standalone --nproc-per-node 1"),
        ("accelerate", "accelerate launch --num_processes 1"),
        ("slurm", "sbatch --nodes 1 --gpus-per-node 1"),
    ):
        choose(form, "#launcher", launcher)
        form.locator("#show-command").click()
        expect(command).to_contain_text(words)
        expect(command).to_contain_text("'--name=a name; $(id)'")
    form.locator("#nodes input").fill("2")
    choose(form, "#launcher", "python")
    form.locator("#show-command").click()
    expect(toast(form)).to_contain_text("2 processes without a launcher")
