"""Hooks into transformers v5: the registered experts implementation, and the loading of packed weights.

v5 collects the tensors whose names match a converter's patterns and passes them to the converter's operation,
which returns the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer

from torchao_mx.formats import MXFP4, BlockFormat
from torchao_mx.hf.experts import experts_forward
from torchao_mx.hf.layouts.gpt_oss import BLOCKS, SCALES, WEIGHTS, assemble, is_packed_weight
from torchao_mx.hf.quantizer import NAME, MXQuantizer
from torchao_mx.hf.transformers_internals import drop_conversions, mark_initialized
from torchao_mx.hf.while_loading import PTQ_NAME, PTQQuantizer

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
except ImportError:  # v4; doctest collection imports this file there too
    ConversionOps = object


def _bytes_a_value(fmt: BlockFormat) -> float:
    """The bytes per value that device maps and memory reservations assume."""
    return 1 / fmt.elems_per_byte + 1 / fmt.block_size


class Assembly(ConversionOps):
    """Makes a weight's blocks and scales its parameter, in the logical dtype that the model declares."""

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

    @property
    def reverse_op(self) -> ConversionOps:
        """Not available; see ``drop_conversions``."""
        raise NotImplementedError(
            "transformers' save_pretrained cannot reverse the loading of packed experts: use "
            "torchao_mx.hf.save_pretrained"
        )


def _only(tensors: dict[str, Any], suffix: str) -> torch.Tensor:
    """The tensor collected under the pattern that ends in ``suffix``, often as a list of one."""
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
        packed = is_packed_weight(model, param_name)
        return _bytes_a_value(MXFP4) if packed else param.element_size()

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        # Stock save_pretrained would apply their reverse to what get_state_dict_and_metadata returns.
        drop_conversions(model, lambda operation: isinstance(operation, Assembly))
        return model


class Packing(ConversionOps):
    """The last operation on a weight that was read and merged: quantizes it into its parameter."""

    def __init__(self, quantizer: PTQQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        parameters = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if self.quantizer.param_needs_quantization(model, name):
                try:
                    value = self.quantizer.packed(model, name, value)
                except ValueError as error:  # transformers would log it and raise only "see above"
                    self.quantizer.problems[name] = str(error)
                    continue
                _mark_initialized(model, name)
            parameters[name] = value
        return parameters


def _mark_initialized(model: PreTrainedModel, name: str) -> None:
    """Mark the owner of the weight ``name`` if it lacks nothing else: 5.8 would fill a copy of the weight."""
    owner, _, weight = name.rpartition(".")
    mark_initialized(model.get_submodule(owner), but_for=weight)


class PTQQuantizerV5(PTQQuantizer):
    """Gives transformers :class:`Packing` as its quantizing operation."""

    def get_quantize_ops(self) -> Packing:
        return Packing(self)

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        packed = self.param_needs_quantization(model, param_name)
        return _bytes_a_value(self.format) if packed else param.element_size()


def register() -> None:
    """Add the quantizers and the experts implementation to transformers' registries, once per process."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    register_quantizer(NAME)(MXQuantizerV5)
    register_quantizer(PTQ_NAME)(PTQQuantizerV5)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
