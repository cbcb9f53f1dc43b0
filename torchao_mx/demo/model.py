"""A small causal transformer over bytes: pre-norm, RoPE, SwiGLU, no biases.

Query, key and value share one linear, and so do the MLP's gate and up: a layer then has four
linears to quantize, and quantizes each activation once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from torchao_mx.demo.data import VOCAB
from torchao_mx.demo.settings import Settings


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Causal attention with rotary positions, then the MLP, each added to its input ``[B, T, D]``."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token ids ``[B, T]`` to logits ``[B, T, 256]``."""

    def __init__(self, layers: int, dim: int, heads: int, hidden: int, seq: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        half = dim // heads // 2
        angles = torch.arange(seq)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def build_model(settings: Settings) -> Transformer:
    """A freshly initialised model, a function of the settings alone."""
    model = Transformer(
        settings.layers, settings.dim, settings.heads, settings.hidden, settings.seq
    )
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue  # norms start at one
            # 1 at the embedding, and linears that keep the variance; GPT-2's 0.02 takes twice the
            # steps at this width.
            std = 1.0 if name.startswith("embedding") else weight.shape[1] ** -0.5
            if name.endswith(("out.weight", "mlp.down.weight")):
                std /= (2 * settings.layers) ** 0.5  # keeps the residual stream's variance level
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model.to(settings.device)


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, fp32 ``[B, T]``, of each next byte of ``windows`` ``[B, T + 1]``."""
    targets = windows[:, 1:]
    logits = model(windows[:, :-1])
    logits = getattr(logits, "logits", logits).flatten(0, 1).float()  # of a model of transformers
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def heldout_losses(model: nn.Module, windows: torch.Tensor, batch: int) -> torch.Tensor:
    """Mean loss of each window, float64 on the CPU; the same batches whatever the model."""
    was_training = model.training
    model.eval()
    means = [token_losses(model, part).double().mean(1) for part in windows.split(batch)]
    model.train(was_training)
    return torch.cat(means).cpu()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x`` ``[..., T, D]``, the halves of D being the pairs."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
