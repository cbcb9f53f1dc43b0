"""How classes of experts hold their 3-D weights and are called: one row a family, found by what a module has.

No model library is imported: a module is known by its parameters and flags. ::

    transformers v5   gate_up_proj, down_proj; is_transposed, has_bias; _apply_gate    (hidden, ids, weights)
    transformers v4   gpt-oss alone: the same parameters, transposed          (hidden, ids, scores [T, E])
    torchtitan        w1, w2, w3 [E, out, in]          (rows in the order of the experts, rows an expert)

A layout's ``forward`` runs the pipeline of ``moe.py`` for a module of ours that stands in for the source,
with its attributes, ``source_class``, ``weight(name)`` for each weight as it is stored, and ``options``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchao_mx import moe


@dataclass(frozen=True)
class Layout:
    """The names of a module's parameters and what they mean.

    Attributes:
        weights: of the 3-D parameters, in the order in which they are used.
        biases: of the ``[E, out]`` parameters, a name for each weight or none at all.
        transposed: whether weights are stored ``[E, in, out]``; otherwise ``[E, out, in]``.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    transposed: bool = False

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The source's forward, on ``module.weight(name)``."""
        raise NotImplementedError

    def bias(self, module: Any, i: int) -> torch.Tensor | None:
        return getattr(module, self.biases[i]) if self.biases else None


@dataclass(frozen=True)
class TransformersLayout(Layout):
    """Routed by the caller: ``(hidden [T, H], top_k_index [T, k], top_k_weights [T, k])``."""

    def forward(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        up, down = self.weights

        def activation(gate_up: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            return module.source_class._apply_gate(module, gate_up)

        return moe.experts(
            hidden_states, top_k_index, top_k_weights, module.weight(up), module.weight(down),
            activation, transpose_weight=not self.transposed, gate_up_bias=self.bias(module, 0),
            down_bias=self.bias(module, 1), **module.options,
        )  # fmt: skip


@dataclass(frozen=True)
class GptOssV4Layout(Layout):
    """transformers 4.57's gpt-oss: ``(hidden [B, S, H], router_indices [T, k], routing_weights [T, E])``."""

    def forward(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        up, down = self.weights

        def activation(gate_up: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            gate = gate_up[..., ::2].clamp(max=module.limit)
            linear = gate_up[..., 1::2].clamp(-module.limit, module.limit)
            return (linear + 1) * (gate * torch.sigmoid(gate * module.alpha))

        out = moe.experts(
            hidden_states.reshape(-1, hidden_states.shape[-1]), router_indices,
            routing_weights.gather(1, router_indices), module.weight(up), module.weight(down),
            activation, transpose_weight=not self.transposed, gate_up_bias=self.bias(module, 0),
            down_bias=self.bias(module, 1), **module.options,
        )  # fmt: skip
        return out.view_as(hidden_states)


@dataclass(frozen=True)
class TitanLayout(Layout):
    """torchtitan's ``(x [R, H], num_tokens_per_expert [E])``: rows in the experts' order, in and out."""

    def forward(
        self, module: Any, x: torch.Tensor, num_tokens_per_expert: torch.Tensor
    ) -> torch.Tensor:
        offs = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        gate, up, down = (module.weight(name) for name in self.weights)
        options = {"transpose_weight": True} | module.options
        gate = F.silu(moe.grouped_linear(x, gate, offs, **options))
        rows = gate * moe.grouped_linear(x, up, offs, **options)
        return moe.grouped_linear(rows, down, offs, **options)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module of experts; None for any other module."""
    weights = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    if weights.keys() == {"w1", "w2", "w3"}:
        return TitanLayout(("w1", "w3", "w2"))
    if weights.keys() != {"gate_up_proj", "down_proj"}:
        return None
    names = ("gate_up_proj", "down_proj")
    if hasattr(module, "_apply_gate"):
        if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
            return None
        biases = (
            tuple(f"{name}_bias" for name in names) if getattr(module, "has_bias", False) else ()
        )
        return TransformersLayout(names, biases, getattr(module, "is_transposed", False))
    if hasattr(module, "limit") and hasattr(module, "alpha"):
        return GptOssV4Layout(names, tuple(f"{name}_bias" for name in names), True)
    return None


def is_experts(module: nn.Module, fqn: str = "") -> bool:
    """A ``filter_fn`` for ``quantize_``: modules of experts with 3-D weights that our configs convert.

    transformers v5's expert classes with a gate (gpt-oss, Qwen3-MoE, Mixtral, DeepSeek-V3, OLMoE, GLM4-MoE
    and their like), transformers 4.57's gpt-oss, and torchtitan's ``GroupedExperts`` of three weights.

    Example:
        >>> import torch
        >>> from torchao_mx import is_experts
        >>> is_experts(torch.nn.Linear(32, 32))
        False
    """
    return layout_of(module) is not None
