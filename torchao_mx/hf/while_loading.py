"""Weights in high precision, each packed as soon as transformers has read it.

transformers asks a model's quantizer which of the checkpoint's tensors are to be quantized and hands it each,
in the dtype to load in and, under v5, with the tensors of single experts merged. So no more of the model is
in memory in high precision than the weight at hand. ``_v5.py`` and ``_v4.py`` add how they hand them over.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchao_mx.formats import BlockFormat
from torchao_mx.hf.problems import misshapen, missing, raise_problems
from torchao_mx.hf.quantizer import MXQuantizer
from torchao_mx.hf.roles import HEAD, kept_linears
from torchao_mx.hf.transformers_internals import holds_adapters_of_peft
from torchao_mx.hf.versions import is_v5
from torchao_mx.nn.check_model import check_layers
from torchao_mx.nn.experts.module import (
    MXExperts,
    is_packed,
    layout_of,
    pack_singly,
    unclaimed_experts,
)
from torchao_mx.nn.linear_checks import is_linear
from torchao_mx.nn.ptq import MXDynamicActivationMXWeightConfig, MXWeightOnlyConfig, quantize_linear
from torchao_mx.tensor import MXTensor

PTQ_NAME = "torchao_mx_ptq"
_PTQ_CONFIGS = (MXWeightOnlyConfig, MXDynamicActivationMXWeightConfig)

Filter = Callable[[nn.Module, str], bool]  # of quantize_


def selection(
    skeleton: PreTrainedModel, config: AOBaseConfig, filter_fn: Filter | None = None
) -> tuple[Filter, dict[str, str]]:
    """What of the model :func:`torchao_mx.hf.from_pretrained` quantizes, and what it leaves by name and why.

    Without a ``filter_fn``: linear layers and modules of experts, but for routers, gates and heads, and for
    those whose sizes ``config`` does not fit, unless it fits none. In no case what is packed already.

    Args:
        skeleton: the model on ``meta``.
        config: of ``quantize_``.
        filter_fn: the user's.

    Returns:
        A ``filter_fn`` for any model of the skeleton's names, and ``{name: reason}``.
    """
    if filter_fn is not None:
        return lambda m, name: not _holds_packed(m) and bool(filter_fn(m, name)), {}
    kept = kept_linears(skeleton)
    wanted = {
        name: module
        for name, module in skeleton.named_modules()
        if layout_of(module) is not None or (is_linear(module) and name not in kept)
    }
    unfit = {name: why for name, module in wanted.items() if (why := _refusal(module, config))}
    names = wanted.keys() - (unfit.keys() if len(unfit) < len(wanted) else ())
    left = unclaimed_experts(skeleton) | unfit
    left |= {name: role for name, role in kept.items() if role != HEAD}
    return lambda m, name: name in names and not _holds_packed(m), left


def _holds_packed(module: nn.Module) -> bool:
    if layout_of(module) is not None:
        return is_packed(module)
    return is_linear(module) and isinstance(module.weight, MXTensor)


def _refusal(module: nn.Module, config: AOBaseConfig) -> str | None:
    """Why ``config`` cannot quantize a layer, if it cannot."""
    try:
        check_layers(nn.ModuleDict({"layer": module}), config, lambda m, name: name == "layer")
    except ValueError as error:
        return str(error).rpartition("\nlayer: ")[2]
    return None


def report_of(left: dict[str, str]) -> str:
    """One text of what is left in high precision, a line for the layers that differ in a number alone."""
    lines: dict[tuple[str, str], int] = {}
    for name, reason in left.items():
        key = re.sub(r"\.\d+(?=\.|$)", ".*", name), reason
        lines[key] = lines.get(key, 0) + 1
    return "\n".join(
        f"{name}{f' ({count})' if count > 1 else ''}: {why}" for (name, why), count in lines.items()
    )


def packs_while_loading(
    skeleton: PreTrainedModel, config: AOBaseConfig, options: dict[str, Any]
) -> bool:
    """Whether weights can be packed one by one, into what ``quantize_`` makes of the loaded model.

    Not with a config that does more than pack weights, nor with ``ignore_mismatched_sizes``, which has
    weights initialized once the others are loaded. Nor, in v4, where the model's class declares tensors of
    another dtype (Mamba's ``A_log``, in fp32): with a quantizer, v4 casts all that it reads to ``dtype``.

    Args:
        skeleton: the model on ``meta``, in ``options["dtype"]``.
        config: of ``quantize_``.
        options: of transformers' from_pretrained.
    """
    if type(config) not in _PTQ_CONFIGS or options.get("ignore_mismatched_sizes"):
        return False
    tensors = skeleton.state_dict().values()
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    return is_v5() or dtypes == {options["dtype"]}


class PTQConfig(QuantizationConfigMixin):
    """What transformers' from_pretrained is told; no stored config has it, as no loader could read it.

    Args:
        config: how each weight is quantized.
        selects: which modules are.
    """

    def __init__(
        self, config: MXWeightOnlyConfig | MXDynamicActivationMXWeightConfig, selects: Filter
    ) -> None:
        self.quant_method = PTQ_NAME
        self.config = config
        self.selects = selects

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class PTQQuantizer(MXQuantizer):
    """What both versions share: what is quantized, how, and what the model is afterwards."""

    def __init__(self, quantization_config: PTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._weights: dict[nn.Module, tuple[str, ...]] = {}  # only while loading
        self.problems: dict[str, str] = {}  # of a weight, where it could not be packed

    @property
    def format(self) -> BlockFormat:
        return self.quantization_config.config.weight_spec.format

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave room, in device maps, for a weight in high precision beside the packed ones."""
        return {device: 0.9 * size for device, size in max_memory.items()}

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        owner, _, weight = param_name.rpartition(".")
        return weight in self._weights.get(model.get_submodule(owner), ())

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put the twins of experts in their places, so that hooks on modules come to be theirs.

        Weights that the model's class declares in a dtype of their own are left to ``quantize_``, as v5 reads
        in ``dtype`` what it is to quantize.
        """
        selects = self.quantization_config.selects
        for name, module in list(model.named_modules()):
            if not selects(module, name):
                continue
            layout = layout_of(module)
            weights = ("weight",) if layout is None else layout.weights
            if any(getattr(module, w).dtype != model.config.dtype for w in weights):
                continue
            if layout is not None:
                module = MXExperts.stand_in(module)
                model.set_submodule(name, module)
            self._weights[module] = weights

    def packed(self, model: PreTrainedModel, name: str, value: torch.Tensor) -> nn.Parameter:
        """The frozen parameter for the weight ``name`` of ``value``, of the shape that the model declares.

        Raises:
            ValueError: ``value`` has another shape.
        """
        owner, _, weight = name.rpartition(".")
        module = model.get_submodule(owner)
        shape = getattr(module, weight).shape
        if value.shape != shape:
            raise ValueError(misshapen(name, tuple(value.shape), shape))
        config = self.quantization_config.config
        specs = config.weight_spec, config.activation_spec
        if isinstance(module, MXExperts):
            transposed = module.layout.transposed
            return nn.Parameter(pack_singly(value, transposed, *specs), requires_grad=False)
        module.weight = nn.Parameter(value, requires_grad=False)
        return quantize_linear(module, *specs).weight

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        unpacked = [
            f"{name}.{weight}"
            for name, module in model.named_modules()
            for weight in self._weights.get(module, ())
            if not isinstance(getattr(module, weight), MXTensor)
        ]
        self.refuse(model, unpacked)
        self._weights.clear()
        # A model as quantize_ leaves it, except that its save_pretrained says what it cannot do.
        self.remove_quantization_config(model)
        model.hf_quantizer = self
        return model

    def refuse(self, model: PreTrainedModel, unpacked: list[str]) -> None:
        """One error of all weights that could not be packed, if any.

        Raises:
            ValueError: some are in ``unpacked``.
        """
        problems = [self.problems.get(name, missing(name)) for name in unpacked]
        raise_problems(problems, f"{model.name_or_path} cannot be loaded")

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[None, dict]:
        """Nothing where transformers' save_pretrained takes adapters alone, else a refusal."""
        if holds_adapters_of_peft(model):
            return None, {}
        raise NotImplementedError(
            f"{type(model).__name__} holds weights in {self.format.name}, and transformers' save_pretrained "
            f"has no layout for them; use torchao_mx.hf.save_pretrained for gpt-oss in mxfp4, save_adapter "
            f"or PEFT for adapters, torch.save(model.state_dict(), ...) for all else"
        )
