"""Small runs of `--task hf` without a network: a chat, a text, models of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config import DataConfig, LoopConfig, TrainConfig
from tests.support.runs import corpus

__all__ = ["MODELS", "chat_tokenizer", "chats", "hf_config"]

_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE},
    "qwen": {"model_type": "qwen3", **_SHAPE, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> Any:
    """A byte-level BPE with a chat template, in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello answer and yes user assistant"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_start|>", chat_template=CHATML
    )


def chats(path: Path, *, count: int = 40) -> Path:
    """A JSONL file of two turns each."""
    lines = []
    for number in range(count):
        said = [
            ("user", f"hello {number}"),
            ("assistant", f"answer {number}"),
            ("user", "and"),
            ("assistant", "yes"),
        ]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}))
    path.write_text("\n".join(lines))
    return path


def hf_config(
    tmp_path: Path,
    *,
    model: str = "llama",
    length: int = 64,
    model_settings: dict[str, Any] | None = None,
    **more: Any,
) -> TrainConfig:
    """A run of that model on a folder of text and some chats; `more`: of `task_args`."""
    sources = [{"path": str(corpus(tmp_path / "corpus", num_files=20, num_words=60)), "name": "text"}]
    sources.append({"path": str(chats(tmp_path / "chats.jsonl")), "name": "chat"})
    arguments = {
        "model": model_settings or {"config": MODELS[model]},
        "tokenizer": {"train_vocab_size": 280},
        "sources": sources,
    }
    return TrainConfig(
        task="hf",
        task_args={**arguments, **more},
        runs_dir=str(tmp_path / "runs"),
        data=DataConfig(sequence_length=length, cache_dir=str(tmp_path / "cache"), val_frac=0.2),
        loop=LoopConfig(steps=6, global_batch=8, eval_every=3, eval_samples=16),
    )
