"""The experts implementation "torchao_mx": transformers' expert modules on the pipeline of ``pipeline.py``.

transformers v5 chooses how experts compute by a name in a registry of functions ``(module, hidden, ids,
weights)``; ``_v5.py`` adds ours. One function serves every class that follows the interface, by its flags and
its own ``_apply_gate``, and every kind of weight that the pipeline takes: MXTensors, the LoRATensors that
PEFT's adapters make of them, plain tensors.
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
    """The layer's output ``[T, H]``; gradients go to all floating inputs and trained parameters.

    Args:
        self: a module with ``gate_up_proj`` (``up_proj`` without a gate) and ``down_proj``, ``[E, out, in]``
            or, where ``is_transposed``, ``[E, in, out]``, and with ``has_bias`` their ``_bias [E, out]``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, k]`` expert ids; those of other ranks' experts add nothing.
        top_k_weights: ``[T, k]``.

    Raises:
        NotImplementedError: the module norms what experts return.
    """
    if getattr(self, "has_post_expert_norm", False):
        raise NotImplementedError(
            f"{type(self).__name__} norms each expert's output, which experts_implementation='torchao_mx' "
            f"does not: use model.set_experts_implementation('grouped_mm')"
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
    """The layer of the weights called ``first`` and ``down_proj`` with ``activation`` between them."""
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
