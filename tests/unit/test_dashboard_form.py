"""The form is the schema: every key, its help, its kind; what is filled in is read like the command line."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from harness.config import AlertConfig, FaultConfig, TrainConfig, parse_arguments
from harness.config.keys import key_types
from harness.config.presets import preset_file, preset_names
from harness.dashboard import form
from harness.dashboard.commands import HEAD_NODE, command
from harness.errors import ConfigError
from tests.support.runs import ROOT

HOSTILE = [
    "1e-3", "1.5e3", "null", "yes", "[a]", "{a: b}", "--x", "a b", "#x", "'", '"', "$HOME", "ü", "007", "=",
]  # fmt: skip


def fields() -> dict[str, form.Field]:
    return {field.key: field for section in form.sections() for field in section.fields}


def test_every_key_of_the_schema_has_a_field_with_a_help() -> None:
    sections = {section.name for section in form.sections()}
    assert set(fields()) == set(key_types(TrainConfig)) - sections
    assert [key for key, field in fields().items() if not field.help] == []
    assert [section.title for section in form.sections()][:3] == ["Run", "Data", "Model"]


@pytest.mark.parametrize(
    ("key", "kind", "optional", "default"),
    [
        ("debug", "bool", False, False),
        ("optim.name", "choice", False, "adamw"),
        ("loop.steps", "integer", False, 400),
        ("loop.micro_batch", "integer", True, None),
        ("guard.max_norm", "number", True, 1.0),
        ("tracking.webhook", "text", True, ""),
        ("data.paths", "list", False, ""),
        ("optim.betas", "list", False, "[0.9, 0.95]"),
    ],
)
def test_a_field_knows_its_kind_and_its_default(key: str, kind: str, optional: bool, default: object) -> None:
    field = fields()[key]
    assert (field.kind, field.optional, field.default) == (kind, optional, default)
    assert bool(field.choices) == (kind == "choice")


@pytest.mark.parametrize("path", [*map(preset_file, preset_names())], ids=lambda path: path.stem)
def test_a_configuration_comes_back_from_the_form_from_yaml_and_from_a_command(path: Path) -> None:
    config = TrainConfig.from_file(path)
    assert form.read(form.values_of(config)) == config
    assert parse_arguments(form.arguments(config)) == config
    assert form.preset(path.stem, path.parent) == config


@pytest.mark.parametrize("name", ["1e-3", "null", "[a]", "--x", "# '"])
def test_text_stays_text_whatever_it_looks_like(name: str, tmp_path: Path) -> None:
    tracking = dataclasses.replace(
        TrainConfig().tracking,
        notes="\n".join(HOSTILE),
        tags=tuple(HOSTILE),
        alerts=tuple(AlertConfig(kind="above", metric=text, value=1e9) for text in HOSTILE),
    )
    config = TrainConfig(name=name, tracking=tracking, faults=(FaultConfig(step=3, parameter="a.b"),))
    assert form.read(form.values_of(config)) == config
    assert parse_arguments(shlex.split(command(config, "python"))[2:]) == config
    for only_changes in (True, False):
        file = tmp_path / "c.yaml"
        file.write_text(form.yaml_of(config, only_changes=only_changes), encoding="utf-8")
        assert TrainConfig.from_file(file) == config


def test_numbers_may_be_typed_and_empty_boxes_are_null() -> None:
    filled = {"loop.steps": 40.0, "optim.lr": " 1e-4 ", "guard.max_norm": "", "loop.micro_batch": None}
    config = form.read({**filled, "data.paths": " ", "tracking.webhook": "  ", "tracking.tags": ["a", "1"]})
    assert (config.loop.steps, config.optim.lr, config.loop.micro_batch) == (40, 1e-4, None)
    assert config.guard.max_norm is None
    assert (config.data.paths, config.tracking.webhook, config.tracking.tags) == ((), None, ("a", "1"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loop.steps", 0),
        ("loop.steps", 2.5),
        ("loop.steps", "many"),
        ("loop.steps", None),
        ("optim.name", "lion"),
        ("data.paths", "a.txt"),
        ("faults", "[{stepp: 1}]"),
        ("name", "../x"),
    ],
)
def test_what_is_wrong_is_said_as_on_the_command_line(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as by_command:
        parse_arguments([f"--{key}={'' if value is None else value}"])
    with pytest.raises(ConfigError) as by_form:
        form.read({key: value})
    assert str(by_form.value) == str(by_command.value)


@pytest.mark.parametrize(
    "key", ["config", "help", "print_config", "optim", "optim.lrr", "optim.lr=1 --seed", "data.paths+"]
)
def test_nothing_but_a_key_of_a_field_becomes_an_argument(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        form.read({key: "/etc/hostname"})


def test_a_configuration_is_kept_whole_and_never_over_another(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    one, other = TrainConfig(seed=1), TrainConfig(seed=2)
    assert form.presets(folder) == ["defaults", *preset_names()]
    path = form.save(one, "mine", folder=folder)
    assert path.read_text() == "seed: 1\n"
    with pytest.raises(ConfigError, match="already exists"):
        form.save(other, "mine", folder=folder)
    assert form.preset("mine", folder) == one
    form.save(other, "mine.yaml", overwrite=True, folder=folder)
    assert form.preset("mine", folder) == other
    assert [child.name for child in folder.iterdir()] == ["mine.yaml"]
    assert form.presets(folder) == ["defaults", *sorted(["mine", *preset_names()])]
    assert form.preset("defaults", folder) == TrainConfig()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "a\0b", "a\nb", ".hidden", ".yaml", "x" * 300]
)
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    for act in (lambda: form.preset(name, tmp_path), lambda: form.save(TrainConfig(), name, folder=tmp_path)):
        with pytest.raises(ConfigError):
            act()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_saved_among_the_presets_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout, `configs` is a link to them."""
    monkeypatch.chdir(tmp_path)
    package = preset_file("debug").parent
    before = sorted(package.iterdir())
    Path("configs").symlink_to(package)
    saved = form.save(TrainConfig(seed=3), "mine")
    try:
        assert (saved, sorted(package.iterdir())) == (Path("my-configs/mine.yaml"), before)
    finally:
        (package / "mine.yaml").unlink(missing_ok=True)
    assert form.preset("mine").seed == 3
    assert "mine" in form.presets()
    assert parse_arguments(["--config", str(saved)]).seed == 3


def test_a_folder_that_the_user_has_linked_is_saved_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shared").mkdir()
    Path("configs").symlink_to("shared")
    assert form.save(TrainConfig(), "mine") == Path("configs/mine.yaml")
    assert Path("shared/mine.yaml").is_file()


def test_the_name_of_the_defaults_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="default values"):
        form.save(TrainConfig(), "defaults", folder=tmp_path)


def test_a_command_that_cannot_work_is_not_given() -> None:
    config = TrainConfig()
    with pytest.raises(ConfigError, match="multiple of world size"):
        command(config, "torchrun", processes=5)
    with pytest.raises(ConfigError, match="without a launcher"):
        command(config, "python", processes=2)


def test_commands_for_several_nodes_say_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = TrainConfig(name="--x; rm")
    torchrun = shlex.split(command(config, "torchrun", processes=8, nodes=2, config_file="configs/a b.yaml"))
    assert torchrun[1:5] == ["--nnodes", "2", "--nproc-per-node", "8"]
    assert f"{HEAD_NODE}:29500" in torchrun
    assert torchrun[-3:] == ["harness/train.py", "--config", "configs/a b.yaml"]
    slurm = shlex.split(command(config, "slurm", processes=8, nodes=2))
    assert slurm[:2] == ["NPROC=8", "sbatch"]
    assert slurm[-2:] == ["harness/launch/slurm.sbatch", "--name=--x; rm"]
    assert "--num_processes=16" in command(config, "accelerate", processes=8, nodes=2).replace("s 16", "s=16")
