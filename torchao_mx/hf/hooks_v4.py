"""Hooks into transformers v4: a replacement for gpt-oss's expert class, and the loading of packed weights.

v4 has no registry of experts implementations, and loads one tensor per parameter. So blocks and scales are
parameters of the module while it loads and become the weight afterwards; they may lie in different shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers.auto import register_quantizer

from torchao_mx.hf.experts import compute
from torchao_mx.hf.layouts.gpt_oss import (
    BLOCKS,
    SCALES,
    WEIGHTS,
    assemble,
    block_shapes,
    packed_modules,
)
from torchao_mx.hf.quantizer import NAME, MXQuantizer
from torchao_mx.hf.transformers_internals import declared_dtype
from torchao_mx.hf.while_loading import PTQ_NAME, PTQQuantizer
from torchao_mx.nn.experts.layouts import gpt_oss_gate, register_experts
from torchao_mx.nn.modules import twin_of


class MXGptOssExperts(GptOssExperts):
    """v4's GptOssExperts, computed by ``nn.experts.pipeline``.

    PEFT reads ``is_transposed``, which v4's own class lacks; with it, adapters get the same layout as in v5.
    """

    is_transposed = True
    has_bias = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """``[B, S, H]`` of hidden_states; router_indices ``[B S, k]``, dense routing_weights ``[B S, E]``."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = routing_weights.gather(1, router_indices)
        gate = gpt_oss_gate(self.alpha, self.limit)
        out = compute(self, "gate_up_proj", gate, rows, router_indices, weights)
        return out.view(hidden_states.shape)


register_experts(MXGptOssExperts, "transformers_v4_gpt_oss")


def swap_experts(model: nn.Module) -> None:
    """Replace each GptOssExperts with a :class:`MXGptOssExperts` that has the same parameters."""
    for name, module in list(packed_modules(model)):
        if not isinstance(module, MXGptOssExperts):
            model.set_submodule(name, twin_of(MXGptOssExperts, module))


class MXQuantizerV4(MXQuantizer):
    """Loads each packed expert weight as two parameters, and joins them."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        swap_experts(model)
        for name, module in packed_modules(model):
            for weight in WEIGHTS:
                shapes = block_shapes(getattr(module, weight).shape, f"{name}.{weight}")
                for suffix, shape in shapes.items():
                    empty = torch.empty(shape, dtype=torch.uint8, device="meta")
                    module.register_parameter(
                        weight + suffix, nn.Parameter(empty, requires_grad=False)
                    )
                setattr(module, weight, None)  # keeps its place among the parameters

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        dtype = declared_dtype(model)
        for _, module in packed_modules(model):
            for weight in WEIGHTS:
                pair = [getattr(module, weight + suffix) for suffix in (BLOCKS, SCALES)]
                for suffix in (BLOCKS, SCALES):
                    delattr(module, weight + suffix)
                setattr(module, weight, assemble(*(p.data for p in pair), dtype))
        return model

    def get_accelerator_warm_up_factor(self) -> int:
        return 2  # while loading, the declared tensors are as large as those in the files


class PTQQuantizerV4(PTQQuantizer):
    """Receives one tensor at a time from transformers and puts it into the model."""

    def create_quantized_param(
        self,
        model: PreTrainedModel,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        **kwargs: Any,
    ) -> None:
        owner, _, weight = param_name.rpartition(".")
        parameter = self.packed(model, param_name, param_value.to(target_device))
        setattr(model.get_submodule(owner), weight, parameter)

    def update_missing_keys(
        self, model: PreTrainedModel, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Refuse before anything is read; otherwise uninitialized weights would be packed."""
        self.refuse(model, [n for n in missing_keys if self.param_needs_quantization(model, n)])
        return missing_keys

    def adjust_target_dtype(self, dtype: torch.dtype) -> Any:
        """For device maps: a dtype as large as the elements; :meth:`adjust_max_memory` allows for scales."""
        from accelerate.utils import CustomDtype

        return CustomDtype.INT4 if self.format.elem_bits == 4 else torch.int8

    def get_special_dtypes_update(
        self, model: PreTrainedModel, dtype: torch.dtype
    ) -> dict[str, torch.dtype]:
        """For device maps: the dtype of every parameter that is not packed."""
        names = (name for name, _ in model.named_parameters())
        return {n: dtype for n in names if not self.param_needs_quantization(model, n)}


def register() -> None:
    """Add the quantizers to transformers' registry, once per process."""
    register_quantizer(NAME)(MXQuantizerV4)
    register_quantizer(PTQ_NAME)(PTQQuantizerV4)
