"""YAML of anybody is plain data or one error, in a time that does not depend on what it says."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from harness.config import TrainConfig, dump_yaml, read_yaml
from harness.config.plain_yaml import MAX_BYTES, plain_yaml, plain_yaml_file
from harness.dashboard import form
from harness.errors import ConfigError
from tests.support.damage import ALIAS_BOMB

LONGEST_S = 10.0
"""Of processor time: hundredths of it are usual."""

REFUSED = {
    "an alias bomb": ALIAS_BOMB,
    "a bomb of merges": "a: &a {k: v}\nb0: &b0 {<<: [*a, *a]}\n"
    + "".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}\n" for n in range(1, 40)),
    "a cycle": "&a [*a]",
    "a cycle in a value": "a: &a {b: {c: *a}}",
    "a merge of itself": "a: &a {<<: *a}",
    "an alias of nothing": "a: *nope",
    "depth": "[" * 100_000,
    "depth of blocks": "".join(" " * n + "a:\n" for n in range(400)),
    "depth of keys": "? " * 50_000,
    "a program": "!!python/object/apply:os.system [ls]",
    "an own tag": "a: !thing {b: 1}",
    "binary": "a: !!binary aGk=",
    "a set": "!!set {a, b}",
    "a list as key": "? [a]\n: b",
    "no such day": "a: 2024-99-99",
    "no number": "a: 0b_",
    "a tag that is not true": "!!int ''",
    "a long number": "a: " + "9" * 200_000,
    "a long hexadecimal number": "a: 0x" + "f" * 200_000,
    "a long sexagesimal number": "a: 1" + ":59" * 60_000,
    "two documents": "a: 1\n---\nb: 2",
    "control characters": "a: \x00\x1b",
    "no UTF-8": b"\xff\xff\xff",
    "an unended text": "a: '" + "x" * 100_000,
    "tabs": "a:\n\t- b",
    "too many values": "\n".join(f"k{n}: {n}" for n in range(25_000)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_at_once(what: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError) as refused:
        plain_yaml(REFUSED[what], name="config.yaml")
    assert time.process_time() - began < LONGEST_S
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


def test_sound_yaml_is_read_as_before() -> None:
    text = "a: &a {x: 1, y: [.nan, 2.5e3, true, null, text]}\nb: {<<: *a, z: *a}\nwhen: 2024-01-02\nlong: '"
    content = plain_yaml(text + "9" * 10_000 + "'", name="it")
    assert content["b"]["x"] == content["b"]["z"]["x"] == 1
    assert content["a"]["y"][1:] == ["2.5e3", True, None, "text"]
    assert len(content["long"]) == 10_000
    assert plain_yaml("", name="it") is None


def test_a_whole_configuration_comes_back(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_yaml(TrainConfig()))
    assert TrainConfig.from_file(tmp_path / "config.yaml") == TrainConfig()


def test_a_file_is_bounded_and_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_bytes(b" " * (MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("long.yaml", "pipe.yaml", "none.yaml"):
        with pytest.raises(OSError):
            plain_yaml_file(tmp_path / name)
        with pytest.raises(ConfigError, match=name):
            read_yaml(tmp_path / name)


@pytest.mark.parametrize("key", ["name", "optim.lr", "data.paths"])
@pytest.mark.parametrize(
    "what", ["an alias bomb", "a cycle", "depth", "a long number", "a long sexagesimal number"]
)
def test_a_field_of_the_form_is_as_bounded(key: str, what: str) -> None:
    text = REFUSED[what]
    assert isinstance(text, str)
    flow = "[" + ", ".join(line.partition(": ")[2] for line in ALIAS_BOMB.splitlines()) + "]"
    value = flow if what == "an alias bomb" else text.removeprefix("a: ")
    began = time.process_time()
    with pytest.raises(ConfigError, match=key):
        form.read({key: value})
    assert time.process_time() - began < LONGEST_S


def test_text_that_is_no_yaml_stays_text() -> None:
    for text in ("!important", "a: b: c", "*", "50% done", "1" * 150):
        assert form.read({"tracking.notes": text}).tracking.notes == text
