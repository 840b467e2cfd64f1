"""`harness export RUN --format ...`: a run's metrics, or its weights, for other programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from harness.cli.arguments import checkpoint_directory, parser, run_argument, run_directory
from harness.cli.errors import reporting
from harness.cli.output import say_paths
from harness.config import TrainConfig
from harness.errors import ConfigError, TrackingError
from harness.runlog.paths import config_file, export_dir

__all__ = ["run"]

_METRICS = ("csv", "parquet", "json")
_WEIGHTS = {"safetensors": "model.safetensors", "torch": "model.pt"}
_CONFIG = "config.json"
_HF = "hf"


def run(argv: Sequence[str]) -> int:
    """Writes the files and prints their paths."""
    options = _arguments().parse_args(argv)
    with reporting() as outcome:
        directory = run_directory(options.run, options.runs)
        _check(options)
        try:
            is_metrics = options.format in _METRICS
            paths = _metrics(directory, options) if is_metrics else _weights(directory, options)
        except OSError as error:
            raise TrackingError(
                f"{error.filename or directory} cannot be read, or cannot be written: "
                f"{error.strerror or error}",
                remedy="if it is the file to be written, name another one with -o",
            ) from error
        say_paths(paths)
    return outcome.exit_code


def _arguments() -> argparse.ArgumentParser:
    arguments = parser("export", "A run's metrics, or the weights of one of its checkpoints.")
    run_argument(arguments)
    arguments.add_argument(
        "--format",
        choices=(*_METRICS, *_WEIGHTS, _HF),
        default="safetensors",
        help="default: safetensors; hf: a folder for transformers' from_pretrained",
    )
    arguments.add_argument(
        "-o", "--output", type=Path, help="file, of hf the folder (default: in RUN/export)"
    )
    weights = arguments.add_argument_group("weights")
    weights.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    weights.add_argument(
        "--names",
        choices=("own", "llama"),
        default="own",
        help="llama: names and config.json of transformers' LlamaForCausalLM, whose from_pretrained reads it",
    )
    weights.add_argument("--adapters", action="store_true", help="of hf: LoRA's adapters alone, not merged")
    weights.add_argument("--shard-gb", type=float, help="split safetensors into files of at most so many GB")
    return arguments


def _check(options: argparse.Namespace) -> None:
    """Refuses options that the format would not heed."""
    if options.adapters and options.format != _HF:
        raise ConfigError(
            f"--adapters is set with --format {options.format}",
            rule="adapters alone are written as peft reads them, beside transformers' files",
            remedy="add --format hf",
        )
    if options.names != "own" and options.format not in _WEIGHTS:
        raise ConfigError(
            f"--names {options.names} is set with --format {options.format}",
            rule="it names the weights in files of safetensors or torch; hf has transformers' names anyway",
            remedy="leave --names away, or add --format safetensors",
        )


def _metrics(directory: Path, options: argparse.Namespace) -> list[Path]:
    from harness.runlog.reader import is_run
    from harness.tracking.export import export_run

    output = options.output or _default(directory, f"metrics.{options.format}")
    if options.output is None and is_run(directory):
        output.parent.mkdir(exist_ok=True)
    return [export_run(directory, output, format=options.format)]


def _weights(directory: Path, options: argparse.Namespace) -> list[Path]:
    checkpoints = checkpoint_directory(directory)
    if options.format == _HF:
        return _for_transformers(directory, checkpoints, options)
    output = options.output or _default(directory, _WEIGHTS[options.format])
    as_llama = TrainConfig.from_file(config_file(directory)) if options.names == "llama" else None
    return _exported(checkpoints, output, options, options.format, as_llama)


def _for_transformers(directory: Path, checkpoints: Path, options: argparse.Namespace) -> list[Path]:
    """A folder for `from_pretrained`: of task hf the model's own, of the bundled decoder Llama's."""
    config = TrainConfig.from_file(config_file(directory))
    output = options.output or _default(directory, _HF)
    if config.task != _HF:
        if options.adapters:
            raise ConfigError(
                f"the run has no adapters: its task is {config.task}",
                rule="adapters are those of task hf with task_args.lora",
                remedy="leave --adapters away",
            )
        return _exported(checkpoints, output / _WEIGHTS["safetensors"], options, "safetensors", config)
    from harness.tasks.hf.export import export_model

    return export_model(
        config,
        checkpoints,
        output,
        step=options.step,
        adapters_only=options.adapters,
        max_shard_bytes=_max_shard_bytes(options),
    )


def _exported(
    checkpoints: Path,
    output: Path,
    options: argparse.Namespace,
    format: Literal["safetensors", "torch"],
    as_llama: TrainConfig | None,
) -> list[Path]:
    """The file or files of the weights; with Llama's names and configuration for a run of such a model."""
    from harness.checkpoint import export
    from harness.models.llama import llama_config, llama_name

    described = as_llama and llama_config(as_llama.model, sequence_length=as_llama.data.sequence_length)
    paths = export(
        checkpoints,
        output,
        step=options.step,
        format=format,
        rename=llama_name if described else None,
        max_shard_bytes=_max_shard_bytes(options),
    )
    if described is not None:
        (output.parent / _CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        paths = [*paths, output.parent / _CONFIG]
    return paths


def _max_shard_bytes(options: argparse.Namespace) -> int | None:
    return int(options.shard_gb * 1e9) if options.shard_gb else None


def _default(directory: Path, name: str) -> Path:
    return export_dir(directory) / name
