"""The experts implementation "torchao_mx": compute transformers' expert modules with ``nn.experts.pipeline``.

transformers v5 looks up how experts compute by name, in a registry of functions ``(module, hidden, ids,
weights)``; ``hooks_v5.py`` registers this one. It serves every class that follows the interface, through the
class's flags and its ``_apply_gate``, and every kind of weight that the pipeline takes: MXTensors, the
LoRATensors that PEFT's adapters make of them, and plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from torchao_mx.nn.experts import pipeline
from torchao_mx.nn.experts.layouts import gate_of


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Return the layer's output ``[T, H]``; gradients reach all floating inputs and trained parameters.

    Args:
        self: a module with ``gate_up_proj`` (``up_proj`` without a gate) and ``down_proj``, ``[E, out, in]``
            or, if ``is_transposed``, ``[E, in, out]``; with ``has_bias``, also their ``_bias [E, out]``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, k]`` expert ids; ids of other ranks' experts add nothing.
        top_k_weights: ``[T, k]``.

    Raises:
        NotImplementedError: the module normalizes the experts' outputs.
    """
    if getattr(self, "has_post_expert_norm", False):
        raise NotImplementedError(
            f"{type(self).__name__} norms each expert's output, which experts_implementation='torchao_mx' "
            f"does not support: use model.set_experts_implementation('grouped_mm')"
        )
    first = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
    activation = gate_of(self, type(self))
    return compute(self, first, activation, hidden_states, top_k_index, top_k_weights)


def compute(
    self: Any,
    first: str,
    activation: pipeline.Activation,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute the layer from weights ``first`` and ``down_proj``, with ``activation`` between them."""
    up = getattr(self, first)
    has_bias = getattr(self, "has_bias", False)
    return pipeline.experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up=up,
        down=self.down_proj,
        activation=activation,
        n_experts=up.shape[0],
        transpose_weight=not getattr(self, "is_transposed", False),
        gate_up_bias=getattr(self, f"{first}_bias") if has_bias else None,
        down_bias=self.down_proj_bias if has_bias else None,
    )
