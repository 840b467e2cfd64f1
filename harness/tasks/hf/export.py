"""The weights of a checkpoint as a folder that `from_pretrained` reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from harness import env
from harness.checkpoint import export
from harness.config import TrainConfig, checked_arguments
from harness.errors import CheckpointError, ConfigError
from harness.runlog.paths import tokenizer_dir
from harness.tasks import hf
from harness.tasks.hf.model import add_adapters, load_model
from harness.tasks.hf.settings import LoraSettings, TokenizerSettings
from harness.tasks.hf.tokenizer import load_tokenizer

__all__ = ["export_model"]


def export_model(
    config: TrainConfig,
    checkpoints: Path,
    output: Path,
    *,
    step: int | None = None,
    adapters_only: bool = False,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Writes weights, configuration and tokenizer to the folder `output`, files of the same names replaced.

    Args:
        config: Of a run of `--task hf`.
        checkpoints: The folder of its checkpoints, beside which the run's tokenizer is.
        step: Of the checkpoint; the newest if not given.
        adapters_only: LoRA's adapters as peft saves them; otherwise they are merged into the model.
        max_shard_bytes: Limit of a file.

    Returns:
        The files of the folder.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is of another model.
        ConfigError: the model or its tokenizer cannot be made again, or it has no adapters.
        OSError: `output` cannot be written.
    """
    arguments = checked_arguments(hf.build, config.task_args)
    lora: LoraSettings = arguments.get("lora", LoraSettings())
    if adapters_only and lora.r == 0:
        raise ConfigError(
            "the run has no adapters", rule="its task_args.lora.r is 0", remedy="leave --adapters away"
        )
    tokenizer = load_tokenizer(
        arguments.get("tokenizer", TokenizerSettings()),
        arguments["model"],
        arguments.get("sources") or (None,),
        cache_dir=Path(config.data.cache_dir) if config.data.cache_dir else env.cache_dir(),
        kept=tokenizer_dir(checkpoints.parent),
    )
    model = add_adapters(load_model(arguments["model"], vocab_size=len(tokenizer)), lora)
    output.mkdir(parents=True, exist_ok=True)
    _load(model, checkpoints, step, output)
    model.config.use_cache = True
    if lora.r and not adapters_only:
        model = model.merge_and_unload()
    model.save_pretrained(output, **({"max_shard_size": max_shard_bytes} if max_shard_bytes else {}))
    tokenizer.save_pretrained(output)
    return sorted(path for path in output.iterdir() if path.is_file())


def _load(model: torch.nn.Module, checkpoints: Path, step: int | None, near: Path) -> None:
    """Reads the checkpoint's weights into the model, by a file on the disk of `near`."""
    with tempfile.TemporaryDirectory(dir=near) as folder:
        (file,) = export(checkpoints, Path(folder, "model.safetensors"), step=step)
        try:
            model.load_state_dict(load_file(file))
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint is of another model: {str(error).strip().splitlines()[-1].strip()}",
                rule="it is of the model that the run's task_args name",
            ) from error
