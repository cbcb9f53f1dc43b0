"""The models of ``quality.py``: the demo's transformer, dense or with a layer of experts in each block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchao_mx import is_experts
from torchao_mx.demo.model import build_model
from torchao_mx.demo.quant import is_quantized_linear
from torchao_mx.demo.settings import Settings
from torchao_mx.nn.experts import pipeline

BALANCE = 0.01  # weight of the loss that spreads tokens over experts


@dataclass(frozen=True)
class QualitySettings(Settings):
    """The demo's, and the experts of a block: none for a dense model."""

    experts: int = 0
    top_k: int = 0
    expert_dim: int = 0


class Experts(nn.Module):
    """Gated experts as transformers v5 has them: ``(hidden [T, H], ids [T, k], weights [T, k])``."""

    is_transposed = has_bias = False

    def __init__(self, n_experts: int, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * inner, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, inner))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return pipeline.experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj,
            lambda gate_up, offs: self._apply_gate(gate_up), transpose_weight=True,
        )  # fmt: skip


class MoE(nn.Module):
    """Each token's k best experts of E, weighted to a sum of 1: ``[B, T, D]`` to ``[B, T, D]``."""

    def __init__(self, settings: QualitySettings) -> None:
        super().__init__()
        self.top_k = settings.top_k
        self.router = nn.Linear(settings.dim, settings.experts, bias=False)
        self.experts = Experts(settings.experts, settings.dim, settings.expert_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.flatten(0, -2)
        scores_TE = self.router(hidden).float().softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(self.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TK = _AddLoss.apply(weights_TK, BALANCE * balance_loss(scores_TE, ids_TK))
        return self.experts(hidden, ids_TK, weights_TK).view_as(x)


def balance_loss(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """E times the sum over experts of (share of the rows) x (mean score); 1 where all are even.

    Shazeer et al. 2017, as Fedus et al. 2021 (arXiv:2101.03961, equation 4) have it.
    """
    n_experts = scores_TE.shape[1]
    experts_E = torch.arange(n_experts, device=ids_TK.device)
    share_E = (ids_TK[..., None] == experts_E).float().mean((0, 1))
    return n_experts * (share_E * scores_TE.mean(0)).sum()


class _AddLoss(torch.autograd.Function):
    """x as it is; backward minimises ``loss`` beside what is minimised."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dx, dx.new_ones(())  # x, loss


def build(settings: QualitySettings) -> nn.Module:
    """A freshly initialised model, a function of the settings alone."""
    if not settings.experts:
        return build_model(settings).bfloat16()
    model = build_model(replace(settings, device="cpu"))
    generator = torch.Generator().manual_seed(settings.seed)
    for block in model.blocks:
        block.mlp = MoE(settings)
        with torch.no_grad():
            for name, weight in block.mlp.named_parameters():
                # As build_model has it, k experts of weight 1 / k being as one of 1 / sqrt(k).
                std = weight.shape[-1] ** -0.5
                if name.endswith("down_proj"):
                    std *= (settings.top_k / (2 * settings.layers)) ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model.to(device=settings.device, dtype=torch.bfloat16)


def is_quantized(module: nn.Module, name: str) -> bool:
    """The ``filter_fn``: experts, and the blocks' linears but for routers; not embedding and head."""
    return is_experts(module) or (is_quantized_linear(module, name) and not name.endswith("router"))
