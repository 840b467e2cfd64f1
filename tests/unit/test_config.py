"""Reading a configuration: what is right goes through whole, what is wrong says so in one line."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from harness.config import (
    AlertConfig,
    FaultConfig,
    TrackingConfig,
    TrainConfig,
    check_same_run,
    dump_yaml,
    flatten,
    parse_arguments,
    to_dict,
)
from harness.config.keys import key_types, switches
from harness.config.parser import argument_parser, parse
from harness.config.presets import preset_file, preset_names
from harness.errors import ConfigError

PRESETS = [preset_file(name) for name in preset_names()]


def test_overrides_win_over_the_file_in_the_order_given(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 0.5, eps: 1.0e-3}\nloop: {steps: 7}\n")
    config = parse_arguments(["--config", str(file), "--optim.lr", "0.25", "--optim.lr=0.125"])
    assert (config.optim.lr, config.optim.eps, config.loop.steps) == (0.125, 1e-3, 7)


def test_a_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = parse_arguments(["--data.paths", "[a, b]", "--faults", "[{step: 3, kind: -inf}]", "--debug"])
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config))
    assert TrainConfig.from_file(file) == config


def test_a_section_knows_the_name_under_which_its_keys_stand() -> None:
    config = TrainConfig(
        faults=(FaultConfig(step=0),), tracking=TrackingConfig(alerts=(AlertConfig(kind="above"),))
    )
    holders = {"": config, "faults": config.faults[0], "tracking.alerts": config.tracking.alerts[0]}
    named = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = {name: value for name, value in named.items() if dataclasses.is_dataclass(value)}
    assert len(sections) == 13
    assert {name: section.SECTION for name, section in {**sections, **holders}.items()} == {
        name: name for name in {**sections, **holders}
    }


def test_from_file_takes_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: x\n")
    assert TrainConfig.from_file(file, ["loop.steps=9"]).loop.steps == 9


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_a_complete_run_of_its_own_name(preset: Path) -> None:
    assert TrainConfig.from_file(preset).name == preset.stem


def test_the_presets_that_users_are_promised_exist() -> None:
    promised = "quickstart basic full numerical_stability ddp_cpu fsdp_cpu gpt2_124m llama_1b digits"
    assert {preset.stem for preset in PRESETS} == {
        *promised.split(), "inject_nan", "debug", "hf_tiny", "hf_finetune"
    }  # fmt: skip


def test_the_quickstart_preset_is_the_default_run() -> None:
    assert TrainConfig.from_file("quickstart") == TrainConfig()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimm.lr", "1"], ["optimm.lr", "optim.lr"]),
        (["--lr", "1"], ["lr", "optim.lr"]),
        (["--optim.lr", "fast"], ["optim.lr", "float", "fast"]),
        (["--loop.steps", "-4"], ["loop.steps", "-4", "greater than 0"]),
        (["--loop.steps", "100000000000000000000"], ["loop.steps", "10^15"]),
        (["--name", "   "], ["name", "blanks"]),
        (["--name", "x" * 300], ["name", "200 bytes"]),
        (["--loop.steps", "2.5"], ["loop.steps", "int", "2.5"]),
        (["--optim.lr", "nan"], ["optim.lr", "nan"]),
        (["--loop.precision", "fp8"], ["loop.precision", "bf16", "fp8"]),
        (["--model.num_heads", "3"], ["model.dim", "multiple"]),
        (["--model.kind", "mlp"], ["model.kind", "decoder"]),
        (["--name", "../../x"], ["name", "folder"]),
        (["--name", ""], ["name"]),
        (["--task", "tekst"], ["task", "tekst", "package.module:function"]),
        (["--guard.spike_warmup", "500"], ["guard.spike_warmup", "guard.spike_window"]),
        (["--guard.spike_rule", "typo"], ["guard.spike_rule", "typo", "robust", "zclip"]),
        (["--guard.spike_threshold", "0"], ["guard.spike_threshold", "greater than 0"]),
        (["--guard.spike_threshold", "nan"], ["guard.spike_threshold", "nan"]),
        (["--guard.spike_window", "0"], ["guard.spike_window", "greater than 0"]),
        (["--guard.spike_warmup", "-1"], ["guard.spike_warmup", "-1"]),
        (["--guard.absurd_norm_ratio", "1"], ["guard.absurd_norm_ratio", "greater than 1", "null or 0"]),
        (["--guard.absurd_norm_ratio", "inf"], ["guard.absurd_norm_ratio", "inf"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "presets basic, ddp_cpu, debug"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_setting_is_named_with_value_and_rule(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(arguments)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim: {lrr: 1}", ["optim.lrr", "optim.lr"]),
        ("optim: [1", ["not YAML", "line 2"]),
        ("- a\n- b", ["list", "mapping"]),
        ("faults: [{stepp: 3}]", ["faults", "stepp"]),
        ("loop: {steps: many}", ["loop.steps", "many"]),
    ],
)
def test_a_wrong_file_is_named(content: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_file(file)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_batch_that_cannot_be_split_is_refused_with_one_that_can() -> None:
    config = TrainConfig.from_file("quickstart", ["loop.micro_batch=3"])
    with pytest.raises(ConfigError, match=r"world size x loop.micro_batch = 2 x 3.*--loop.global_batch 18"):
        config.check_world(2)


def test_a_fault_on_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 2 ranks"):
        parse_arguments(["--faults", "[{step: 1, rank: 2}]"]).check_world(2)


def test_debug_mode_is_refused_in_several_processes() -> None:
    with pytest.raises(ConfigError, match="one process"):
        parse_arguments(["--debug"]).check_world(2)


def test_a_run_may_be_lengthened_but_not_changed(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(TrainConfig()))
    check_same_run(parse_arguments(["--loop.steps", "900", "--guard.max_norm", "0.5"]), saved)
    check_same_run(parse_arguments(["--schedule.steps", "900"]), saved)
    with pytest.raises(ConfigError, match=r"optim.lr = 0.003.*0.001"):
        check_same_run(parse_arguments(["--optim.lr", "0.001"]), saved)


def test_every_setting_has_a_help_text() -> None:
    parser = argument_parser(TrainConfig, prog="x", description="")
    undocumented = [
        action.dest for action in parser._actions if not action.help and not action.dest.endswith(".help")
    ]
    assert undocumented == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A section of another program."""

    loud: bool = False
    """Says more."""
    size: int = 3
    """In metres."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """The configuration of another program."""

    quick: bool = True
    """Takes less time."""
    part: Section = dataclasses.field(default_factory=Section)
    """The section."""


def test_a_field_is_all_that_an_option_needs(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("part: {size: 4}")
    assert list(key_types(Whole)) == ["quick", "part", "part.loud", "part.size"]
    assert switches(Whole) == ["quick", "part.loud"]
    arguments = ["--config", str(file), "--quick=false", "--part.loud"]
    assert parse(Whole, arguments) == Whole(quick=False, part=Section(loud=True, size=4))
    assert "In metres." in argument_parser(Whole, prog="x", description="").format_help()
    with pytest.raises(ConfigError, match=r"part\.sise.*part\.size"):
        parse(Whole, ["--part.sise", "1"])


def test_the_dump_is_plain_yaml() -> None:
    assert yaml.safe_load(dump_yaml(TrainConfig()))["optim"]["betas"] == [0.9, 0.95]


SWITCHES = [key for key, value in flatten(to_dict(TrainConfig())).items() if isinstance(value, bool)]


def test_the_name_of_a_boolean_alone_is_true_wherever_it_stands() -> None:
    fsdp = "--parallel.strategy=fsdp"  # which some of them need
    every = [f"--{key}" for key in SWITCHES]
    interleaved = [argument for switch in every for argument in (switch, "--loop.steps", "10")]
    for arguments in (["--name=x", fsdp, *every, "--loop.steps", "10"], [fsdp, *interleaved]):
        config = parse_arguments(arguments)
        assert config.loop.steps == 10
        assert [key for key in SWITCHES if not flatten(to_dict(config))[key]] == []


@pytest.mark.parametrize("form", ["--{} false", "--{}=false", "--{} --{} false", "--{} true --{}=false"])
def test_a_boolean_with_a_value_means_what_it_says(form: str) -> None:
    arguments = [word for key in SWITCHES for word in form.format(key, key).split()]
    assert [key for key, value in flatten(to_dict(parse_arguments(arguments))).items() if value is True] == []


def test_all_booleans_are_there() -> None:
    assert {"deterministic", "debug", "loop.compile", "model.bias", "parallel.find_unused"} <= set(SWITCHES)


@pytest.mark.parametrize("spelling", ["no_deterministic", "no-deterministic", "loop.no_compile"])
def test_a_negated_boolean_is_answered_with_how_it_is_written(spelling: str) -> None:
    positive = spelling.replace("no_", "").replace("no-", "")
    with pytest.raises(ConfigError, match=rf"Write --{positive} false"):
        parse_arguments([f"--{spelling}"])


def test_what_transformers_builds_is_not_put_off() -> None:
    with pytest.raises(ConfigError, match="unties a tied head"):
        parse_arguments(["--task=hf", "--parallel.strategy=fsdp", "--parallel.meta_init"])
