"""The section `model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_positive

__all__ = ["ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The bundled models' shape. A task of your own builds its own model and ignores this."""

    SECTION = "model"

    kind: Literal["decoder", "cnn", "mlp"] = "decoder"
    """decoder for text; cnn or mlp for images."""
    num_layers: int = 4
    """Decoder blocks, convolution stages or hidden layers."""
    dim: int = 128
    """Width of the residual stream, of the first convolution, or of the hidden layers."""
    num_heads: int = 4
    """Attention heads; has to divide dim."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); default: as many as num_heads."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward kind."""
    mlp_dim: int | None = None
    """Hidden width of the feed-forward; default: 4 x dim (gelu) or 8/3 x dim rounded up to 64 (swiglu)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Llama) or LayerNorm (GPT-2)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary position embedding (Llama) or a learned table (GPT-2)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    bias: bool = False
    """Biases in the linear layers (GPT-2)."""
    tie_embeddings: bool = True
    """The output projection is the transposed input embedding."""
    vocab_size: int = 256
    """Rows of the embedding; the text task uses the first 256."""
    dropout: float = 0.0
    """Dropout probability in the residual branches."""

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "dim", "num_heads", "vocab_size", "rope_theta")
        require(self, "dropout", 0 <= self.dropout < 1, "it has to lie in [0, 1)")
        if self.kind == "decoder":
            self._check_heads()

    def _check_heads(self) -> None:
        require(
            self,
            "dim",
            self.dim % (2 * self.num_heads) == 0,
            f"it has to be a multiple of 2 x model.num_heads = {2 * self.num_heads} (even width per head)",
        )
        if self.num_kv_heads is not None:
            require(
                self,
                "num_kv_heads",
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
                f"it has to divide model.num_heads = {self.num_heads}",
            )
