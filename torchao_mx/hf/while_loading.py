"""Pack high-precision weights one by one, each as soon as transformers has read it.

transformers asks a model's quantizer which tensors of the checkpoint to quantize. It then passes each one in
the dtype to load in and, under v5, with the tensors of single experts merged. So only the current weight is
in memory in high precision. ``hooks_v4.py`` and ``hooks_v5.py`` add how each version passes the tensors.
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

Filter = Callable[[nn.Module, str], bool]  # quantize_'s filter_fn


def selection(
    skeleton: PreTrainedModel, config: AOBaseConfig, filter_fn: Filter | None = None
) -> tuple[Filter, dict[str, str]]:
    """Choose what :func:`torchao_mx.hf.from_pretrained` quantizes, and say why it leaves the rest.

    Without ``filter_fn``, it quantizes linear layers and modules of experts, except routers, gates, heads and
    sizes that do not fit ``config`` (if none fits, all are selected). Packed weights are never selected.

    Args:
        skeleton: the model on ``meta``.
        config: a ``quantize_`` config.
        filter_fn: the user's.

    Returns:
        A ``filter_fn`` for any model with the skeleton's names, and ``{name: reason}``.
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
    """Why ``config`` cannot quantize a layer; None if it can."""
    try:
        check_layers(nn.ModuleDict({"layer": module}), config, lambda m, name: name == "layer")
    except ValueError as error:
        return str(error).rpartition("\nlayer: ")[2]
    return None


def report_of(left: dict[str, str]) -> str:
    """The report on what stays in high precision: one line for layers whose names differ only in numbers."""
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
    """Whether packing weights one by one gives the same model as ``quantize_`` after loading.

    It does not if the config does more than pack weights, or with ``ignore_mismatched_sizes``, which
    initializes weights after the others are loaded. In v4 it also does not if the model's class declares
    tensors of another dtype (Mamba's ``A_log``, in fp32): with a quantizer, v4 casts everything to ``dtype``.

    Args:
        skeleton: the model on ``meta``, in ``options["dtype"]``.
        config: a ``quantize_`` config.
        options: keyword arguments of transformers' from_pretrained.
    """
    if type(config) not in _PTQ_CONFIGS or options.get("ignore_mismatched_sizes"):
        return False
    tensors = skeleton.state_dict().values()
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    return is_v5() or dtypes == {options["dtype"]}


class PTQConfig(QuantizationConfigMixin):
    """The config for transformers' from_pretrained; it is never stored, since no loader could read it.

    Args:
        config: how each weight is quantized.
        selects: which modules are quantized.
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
    """The part that both versions share: what is quantized, how, and the state of the model afterwards."""

    def __init__(self, quantization_config: PTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._weights: dict[nn.Module, tuple[str, ...]] = {}  # only while loading
        self.problems: dict[str, str] = {}  # weight name: why it could not be packed

    @property
    def format(self) -> BlockFormat:
        return self.quantization_config.config.weight_spec.format

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Reserve room in device maps for one high-precision weight beside the packed ones."""
        return {device: 0.9 * size for device, size in max_memory.items()}

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        owner, _, weight = param_name.rpartition(".")
        return weight in self._weights.get(model.get_submodule(owner), ())

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replace experts with their packed twins first, so that transformers' hooks go on the twins.

        Weights that the model's class declares in another dtype are left to ``quantize_``, since v5 reads
        weights to be quantized in ``dtype``.
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
        """Pack ``value`` into the frozen parameter for the weight ``name``.

        Raises:
            ValueError: ``value`` does not have the shape that the model declares.
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
        # Leave the model as quantize_ would, except that its save_pretrained explains what it cannot do.
        self.remove_quantization_config(model)
        model.hf_quantizer = self
        return model

    def refuse(self, model: PreTrainedModel, unpacked: list[str]) -> None:
        """Raise one error about all weights that could not be packed, if any.

        Raises:
            ValueError: ``unpacked`` is not empty.
        """
        problems = [self.problems.get(name, missing(name)) for name in unpacked]
        raise_problems(problems, f"{model.name_or_path} cannot be loaded")

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[None, dict]:
        """None if transformers' save_pretrained saves PEFT's adapters by itself; otherwise refuse."""
        if holds_adapters_of_peft(model):
            return None, {}
        raise NotImplementedError(
            f"{type(model).__name__} holds weights in {self.format.name}, for which transformers' "
            f"save_pretrained has no layout; use torchao_mx.hf.save_pretrained for gpt-oss in mxfp4, "
            f"save_adapter or PEFT for adapters, torch.save(model.state_dict(), ...) for everything else"
        )
