"""`task_args`: what a task's function takes besides the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from harness.config import TrainConfig, check_same_run, checked_arguments, dump_yaml, parse_arguments
from harness.dashboard import form
from harness.errors import ConfigError

if TYPE_CHECKING:
    from typing import Any as ForCheckers


@dataclass(frozen=True, kw_only=True)
class Source:
    """A class as a task may declare one."""

    path: str
    weight: float = 1.0


def build(
    config: TrainConfig,
    *,
    noise: float = 0.1,
    kind: Literal["sine", "square"] = "sine",
    sources: tuple[Source, ...] = (),
    main: Source = Source(path="x"),
    anything=None,
) -> dict[str, Any]:
    return {}


def test_arguments_come_in_the_types_that_the_function_declares() -> None:
    values: dict[str, Any] = {
        "noise": 1,
        "sources": [{"path": "a"}, {"path": "b", "weight": 2}],
        "main": {"path": "c"},
    }
    made = checked_arguments(build, {**values, "anything": {"b": None}})
    assert made == {
        "noise": 1.0,
        "sources": (Source(path="a"), Source(path="b", weight=2.0)),
        "main": Source(path="c"),
        "anything": {"b": None},
    }
    assert checked_arguments(build, {}) == {}  # the function has its own defaults


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"noisy": 1}, r"unknown key 'noisy' in task_args.*Did you mean noise\?"),
        ({"noise": "high"}, r"task_args\.noise.*float.*high"),
        ({"kind": "saw"}, r"task_args\.kind.*saw"),
        ({"main": {"pth": "a"}}, r"unknown key 'main\.pth' in task_args.*[Dd]id you mean main\.path"),
        ({"sources": [{"pth": "a"}]}, r"task_args\.sources.*'pth'"),
        ({"main": {"weight": 2}}, r"task_args.*path"),
    ],
)
def test_what_does_not_fit_the_function_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked_arguments(build, values)


def test_a_function_says_what_it_needs_and_what_it_leaves_open() -> None:
    def needy(config: TrainConfig, path: str) -> None: ...
    def plain(config: TrainConfig) -> None: ...
    def open_(config: TrainConfig, **more: Any) -> None: ...

    with pytest.raises(ConfigError, match=r"task_args\.path is missing"):
        checked_arguments(needy, {})
    with pytest.raises(ConfigError, match=r"task_args\.noise is set.*nothing else"):
        checked_arguments(plain, {"noise": 1})
    assert checked_arguments(open_, {"a": {"b": 1}}) == {"a": {"b": 1}}


def test_a_type_that_is_imported_for_type_checkers_only_leaves_that_parameter_alone_unchecked() -> None:
    def half(config: TrainConfig, *, noise: float = 0.1, raw: ForCheckers = None) -> None: ...

    assert checked_arguments(half, {"noise": 1, "raw": "x"}) == {"noise": 1.0, "raw": "x"}
    with pytest.raises(ConfigError, match=r"task_args\.noise.*float.*high"):
        checked_arguments(half, {"noise": "high"})


def test_a_value_on_the_command_line_changes_that_value_alone(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("task: a:b\ntask_args: {lora: {r: 8, alpha: 1e-3}, path: x}\n")
    config = parse_arguments(
        ["--config", str(file), "--task_args.lora.r", "16", "--task_args.noise=-1e-3", "--seed", "5"]
    )
    assert config.task_args == {"lora": {"r": 16, "alpha": 1e-3}, "path": "x", "noise": -1e-3}
    assert config.seed == 5
    file.write_text(dump_yaml(config))
    assert TrainConfig.from_file(file) == config


def test_the_form_keeps_them() -> None:
    config = TrainConfig(task="a:b", task_args={"lora": {"r": 8}, "paths": ["x", "1e-3"]})
    assert form.read(form.values_of(config)) == config
    assert parse_arguments(form.arguments(config)) == config


def test_a_run_goes_on_with_the_arguments_that_it_began_with(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(TrainConfig(task="a:b", task_args={"noise": 1})))
    check_same_run(TrainConfig(task="a:b", task_args={"noise": 1}), saved)
    for other in ({}, {"noise": 2}, {"noise": 1, "more": 1}):
        with pytest.raises(ConfigError, match="task_args"):
            check_same_run(TrainConfig(task="a:b", task_args=other), saved)


def test_the_bundled_tasks_take_none() -> None:
    with pytest.raises(ConfigError, match=r"task_args.*takes none"):
        TrainConfig(task="text", task_args={"noise": 1})
