"""The hooks of transformers v5: the registered experts implementation, and how a packed weight is loaded.

v5 collects the tensors whose names match a converter's patterns and hands them to its operation, which
returns the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer

from torchao_mx.formats import MXFP4
from torchao_mx.hf._experts import experts_forward
from torchao_mx.hf._layout import BLOCKS, SCALES, WEIGHTS, assemble, is_packed_weight
from torchao_mx.hf._quantizer import NAME, MXQuantizer

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
except ImportError:  # v4, where doctests are collected from this file too
    ConversionOps = object

_BYTES_A_VALUE = 1 / MXFP4.elems_per_byte + 1 / MXFP4.block_size


class Assembly(ConversionOps):
    """A weight's blocks and scales to its parameter, in the logical dtype that the model declares."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, nn.Parameter]:
        blocks, scales = (_only(input_dict, suffix) for suffix in (BLOCKS, SCALES))
        dtype = model.get_parameter(full_layer_name).dtype
        return {full_layer_name: assemble(blocks, scales, dtype)}


def _only(tensors: dict[str, Any], suffix: str) -> torch.Tensor:
    """The tensor collected under the pattern that ends so; a list of one under most patterns."""
    [found] = (value for pattern, value in tensors.items() if pattern.endswith(suffix))
    return found[0] if isinstance(found, list) else found


class MXQuantizerV5(MXQuantizer):
    """Loads packed experts through converters."""

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [
            WeightConverter(
                [f"experts.{weight}{suffix}" for suffix in (BLOCKS, SCALES)],
                f"experts.{weight}",
                operations=[Assembly()],
            )
            for weight in WEIGHTS
        ]

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        """Bytes a value, from which device maps and reservations are made."""
        return _BYTES_A_VALUE if is_packed_weight(model, param_name) else param.element_size()

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        # Stock save_pretrained would run them backwards over what get_state_dict_and_metadata gives.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(op, Assembly) for op in getattr(conversion, "operations", ()))
        ]
        return model


def register() -> None:
    """Add the quantizer and the experts implementation to transformers' registries, once a process."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    register_quantizer(NAME)(MXQuantizerV5)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
