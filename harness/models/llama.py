"""The bundled decoder's parameters under the names of transformers' `LlamaForCausalLM`."""

from __future__ import annotations

import re
from typing import Any

from harness.config import ModelConfig
from harness.errors import ConfigError
from harness.models.decoder import NORM_EPS, swiglu_dim

__all__ = ["llama_config", "llama_name"]

_RENAMED = (
    (r"^token_embedding\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^blocks\.", "model.layers."),
    (r"\.attention\.query\.", ".self_attn.q_proj."),
    (r"\.attention\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.value\.", ".self_attn.v_proj."),
    (r"\.attention\.out\.", ".self_attn.o_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.mlp\.(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
)


def llama_name(name: str) -> str:
    """`blocks.0.attention.query.weight` to `model.layers.0.self_attn.q_proj.weight`."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def llama_config(config: ModelConfig, *, sequence_length: int) -> dict[str, Any]:
    """What transformers' `config.json` has to say for the exported weights to be read as they were trained.

    Raises:
        ConfigError: the model is not of Llama's kind.
    """
    wanted = {"kind": "decoder", "mlp": "swiglu", "norm": "rms", "positions": "rotary", "bias": False}
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ConfigError(
                f"model.{field} is {getattr(config, field)!r}",
                rule=f"Llama's weights can be exported of a model with {field} {value!r}",
                remedy="leave --names away to export under the model's own names",
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": swiglu_dim(config),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
