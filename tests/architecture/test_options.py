"""The options of a run are those of options.txt: one appears, goes or changes its default on purpose.

`python -m tests.architecture.test_options` writes the file anew.
"""

import dataclasses
import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.config import CheckpointConfig, GuardConfig, TrainConfig, identity
from harness.config.keys import key_types
from harness.training import agreed
from tests.architecture.test_layers import ROOT, imports

OPTIONS = Path(__file__).with_name("options.txt")
REWRITE = "python -m tests.architecture.test_options"


def options(schema: type, prefix: str = "") -> Iterator[str]:
    """A line for each option; those of the items of a list have `[]` in their names."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from options(hint, f"{name}.")
            continue
        yield f"{name}: {type_text(hint)}{default_text(field)}"
        for item in typing.get_args(hint):
            if dataclasses.is_dataclass(item):
                yield from options(item, f"{name}[].")


def type_text(hint: Any) -> str:
    """As it is written in the source, without modules; the same in all versions of Python."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " | ".join(map(type_text, arguments))
    if arguments:
        return f"{typing.get_origin(hint).__name__}[{', '.join(map(type_text, arguments))}]"
    return {types.NoneType: "None", Ellipsis: "..."}.get(hint) or hint.__name__


def default_text(field: dataclasses.Field[Any]) -> str:
    """Nothing for an option that has to be given."""
    if field.default_factory is not dataclasses.MISSING:
        return f" = {value_text(field.default_factory())}"
    return "" if field.default is dataclasses.MISSING else f" = {value_text(field.default)}"


def value_text(value: Any) -> str:
    """`repr`, but of an item of a list only what differs from the item's own defaults."""
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = ((field.name, field.default, getattr(value, field.name)) for field in dataclasses.fields(value))
    given = (f"{name}={value_text(now)}" for name, default, now in fields if now != default)
    return f"{type(value).__name__}({', '.join(given)})"


def text() -> str:
    head = f"# Every option of `harness train`: its type and its default. Written by `{REWRITE}`.\n"
    return head + "".join(f"{line}\n" for line in options(TrainConfig))


def test_the_options_are_those_of_the_file() -> None:
    before, now = OPTIONS.read_text().splitlines(), text().splitlines()
    gone, new = [line for line in before if line not in now], [line for line in now if line not in before]
    assert before == now, f"gone: {gone}, new: {new}; if that is meant: {REWRITE}"


@pytest.mark.parametrize(
    ("interface", "section"),
    [(harness.Checkpointer, CheckpointConfig), (harness.StepGuard, GuardConfig)],
    ids=lambda value: value.__name__,
)
def test_what_is_used_without_a_configuration_has_the_same_defaults(interface: type, section: type) -> None:
    parameters = inspect.signature(interface).parameters.values()
    options = {field.name: field.default for field in dataclasses.fields(section)}
    shared = {parameter.name: parameter.default for parameter in parameters if parameter.name in options}
    assert shared == {name: options[name] for name in shared}
    assert len(shared) >= 3


def test_the_keys_that_code_spells_out_exist() -> None:
    keys = list(key_types(TrainConfig))
    spelled = {*identity._IDENTITY, *identity._IDENTITY_SECTIONS, *identity._MAY_CHANGE, *agreed._LOCAL}
    assert [key for key in spelled if key.rstrip(".") not in keys] == []


def sections() -> list[type]:
    """The dataclasses that the whole configuration consists of."""
    hints = typing.get_type_hints(TrainConfig).values()
    parts = [part for hint in hints for part in (hint, *typing.get_args(hint))]
    return [part for part in parts if dataclasses.is_dataclass(part)]


def test_each_section_has_a_file_that_needs_little() -> None:
    files = [Path(inspect.getfile(section)).relative_to(ROOT) for section in sections()]
    assert len({*files}) == len(files) >= 10
    for file in files:
        foreign = {name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names}
        assert foreign <= {"harness.config.checks", "harness.config.alerts"}, file


def test_help_and_the_form_need_no_torch() -> None:
    code = (
        "import sys, contextlib, harness.dashboard.form as form\n"
        "from harness.cli.main import main\n"
        "form.sections()\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['train', '--help'])\n"
        "print('torch' in sys.modules)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert any(line.startswith("usage: ") for line in printed)
    assert printed[-1] == "False"


if __name__ == "__main__":
    OPTIONS.write_text(text())
