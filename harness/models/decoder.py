"""A decoder-only transformer whose configuration spans GPT-2 and Llama.

GPT-2 (Radford et al., 2019): learned positions, LayerNorm, GELU, biases. Llama (Touvron et al., 2023):
rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases. Shapes in comments: B batch, T time,
D dim, H query heads, G key and value heads, W width per head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.config import ModelConfig

__all__ = ["NORM_EPS", "Decoder", "swiglu_dim", "training_flops_per_token"]

NORM_EPS = 1e-5
_INIT_STD = 0.02
_MLP_MULTIPLE = 64


class Decoder(nn.Module):
    """Tokens int64 `[B, T]` to logits `[B, T, V]`; position t sees tokens 0 to t.

    Args:
        config: The shape.
        sequence_length: Longest sequence; the size of the table of positions.
    """

    def __init__(self, config: ModelConfig, *, sequence_length: int) -> None:
        super().__init__()
        self.sequence_length = sequence_length
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding: nn.Embedding | None = None
        self.rotary: Rotary | None = None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(sequence_length, config.dim)
        else:
            self.rotary = Rotary(config.dim // config.num_heads, sequence_length, theta=config.rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        blocks = [Block(config) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = _norm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(_init)
        for block in blocks:
            block.init_residual(num_layers=config.num_layers)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        num_tokens = tokens.shape[1]
        if num_tokens > self.sequence_length:
            raise ValueError(
                f"sequence of {num_tokens} tokens: the model was built for {self.sequence_length}"
            )
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[:num_tokens]
        rotation = None if self.rotary is None else self.rotary(num_tokens)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


def training_flops_per_token(config: ModelConfig, *, num_parameters: int, sequence_length: int) -> float:
    """Floating-point operations of forward and backward per token: 6 N + 12 L D T, where N counts the
    parameters that are multiplied with (PaLM, arXiv 2204.02311, appendix B).

    Args:
        num_parameters: Of the whole model, tied ones once.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    if config.positions == "learned":
        looked_up += sequence_length * config.dim
    return 6.0 * (num_parameters - looked_up) + 12.0 * config.num_layers * config.dim * sequence_length


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream behind a norm of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out

    def init_residual(self, *, num_layers: int) -> None:
        """Smaller weights where the block writes to the residual stream (GPT-2, section 2.3).

        The stream sums 2 x `num_layers` such outputs; its variance then does not grow with depth.
        """
        for linear in (self.attention.out, self.mlp.down):
            nn.init.normal_(linear.weight, std=_INIT_STD / math.sqrt(2 * num_layers))


class Attention(nn.Module):
    """Causal self-attention; `num_heads / num_kv_heads` query heads share each key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.query = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.key = nn.Linear(config.dim, self.num_kv_heads * self.head_dim, bias=config.bias)
        self.value = nn.Linear(config.dim, self.num_kv_heads * self.head_dim, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, T, H * W]` as `[B, H, T, W]`."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = swiglu_dim(config)
        self.gate = nn.Linear(config.dim, hidden, bias=config.bias)
        self.up = nn.Linear(config.dim, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def swiglu_dim(config: ModelConfig) -> int:
    """Hidden width; 8/3 x dim makes three matrices as large as the two of the plain kind with 4 x dim."""
    return config.mlp_dim or math.ceil(8 * config.dim / 3 / _MLP_MULTIPLE) * _MLP_MULTIPLE


class GELU(nn.Module):
    """`down(gelu(up(x)))` with GPT-2's tanh approximation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_dim or 4 * config.dim
        self.up = nn.Linear(config.dim, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class Rotary(nn.Module):
    """Table of the rotary position embedding (Su et al., "RoFormer", 2021), in float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, sequence_length: int, *, theta: float) -> None:
        super().__init__()
        frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.outer(torch.arange(sequence_length, dtype=torch.float32), frequency)
        # A function of the shape, so no part of a checkpoint.
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), dim=-1), persistent=False)

    def forward(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        return self.cos[:num_tokens], self.sin[:num_tokens]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + W/2) of `x` `[..., T, W]` by the angles of their positions.

    This pairing is that of Llama's weights in transformers; the paper pairs neighbours. The arithmetic is
    float32, because bf16 has too few digits for the angles of distant positions.

    Args:
        cos: `[T, W]`, each pair's cosine twice.
        sin: `[T, W]`, each pair's sine, negative in the first half.
    """
    x32 = x.float()
    partner = x32.roll(x.shape[-1] // 2, dims=-1)
    turned = torch.addcmul(x32 * cos, partner, sin)
    return turned.to(x.dtype)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.dim, eps=NORM_EPS)
    return nn.LayerNorm(config.dim, eps=NORM_EPS, bias=config.bias)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
