"""What torchao's ``QATConfig`` does with our configs.

torchao's handler of ``QATConfig`` knows torchao's own classes alone. :func:`register_qat_handler`, which
``import torchao_mx`` calls, puts one in front of it that takes the cases below and hands every other one on:

* prepare from our PTQ configs, from torchao's ``MXDynamicActivationMXWeightConfig``, or from our
  ``MXFakeQuantizeConfig``;
* convert of our fake-quantized modules.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torchao.prototype.mx_formats import (
    MXDynamicActivationMXWeightConfig as TorchaoMXDynamicActivationMXWeightConfig,
)
from torchao.quantization.qat import QATConfig
from torchao.quantization.transform_module import (
    _QUANTIZE_CONFIG_HANDLER,
    register_quantize_module_handler,
)

from torchao_mx.experts import check_experts, is_experts
from torchao_mx.formats import BlockFormat, QuantizeSpec
from torchao_mx.modules import in_place_of
from torchao_mx.ptq import MXDynamicActivationMXWeightConfig, MXWeightOnlyConfig, check_linear
from torchao_mx.qat.config import MXFakeQuantizeConfig
from torchao_mx.qat.experts import MXFakeQuantizedExperts
from torchao_mx.qat.linear import MXFakeQuantizedLinear, check_own_forward

_Configs = tuple[MXFakeQuantizeConfig | None, MXFakeQuantizeConfig | None]


def _configs_of(config: QATConfig) -> _Configs | None:
    """(activation_config, weight_config) where ``config`` is ours to prepare, else None."""
    base = config.base_config
    if isinstance(base, (MXWeightOnlyConfig, MXDynamicActivationMXWeightConfig)):
        return tuple(
            MXFakeQuantizeConfig.from_spec(s) for s in (base.activation_spec, base.weight_spec)
        )
    if isinstance(base, TorchaoMXDynamicActivationMXWeightConfig):
        return tuple(
            MXFakeQuantizeConfig.from_spec(
                QuantizeSpec(BlockFormat.from_dtype(dtype, base.block_size), base.scaling_mode)
            )
            for dtype in (base.activation_dtype, base.weight_dtype)
        )
    explicit = (config.activation_config, config.weight_config)
    return explicit if any(isinstance(c, MXFakeQuantizeConfig) for c in explicit) else None


def _prepare(module: nn.Module, configs: _Configs, config: QATConfig) -> nn.Module:
    if isinstance(module, (MXFakeQuantizedLinear, MXFakeQuantizedExperts)):
        warnings.warn(f"{module} is prepared already; left as it is", stacklevel=2)
        return module
    if is_experts(module):
        return MXFakeQuantizedExperts.from_experts(module, *configs)
    if (
        isinstance(config.base_config, TorchaoMXDynamicActivationMXWeightConfig)
        and isinstance(module, nn.Linear)
        and module.weight.dtype != torch.bfloat16
    ):
        raise TypeError(
            f"{module} has a {module.weight.dtype} weight, which torchao's config could not convert after "
            f"training; use .bfloat16(), or torchao_mx.MXDynamicActivationMXWeightConfig"
        )
    return MXFakeQuantizedLinear.from_linear(module, *configs)


def check_qat_module(
    module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None
) -> None:
    """Refuse what the prepare step would refuse; nothing is changed."""
    if isinstance(module, (MXFakeQuantizedLinear, MXFakeQuantizedExperts)):
        return
    if is_experts(module):
        check_experts(module, weight, activation)
        return
    check_linear(module, weight, activation)
    check_own_forward(module)


def _convert(
    module: MXFakeQuantizedLinear | MXFakeQuantizedExperts, config: QATConfig
) -> nn.Module:
    base = config.base_config
    trained = (module.activation_config, module.weight_config)
    if base is not None:
        wanted = _configs_of(config)
        if wanted is None or [c and c.spec for c in wanted] != [c and c.spec for c in trained]:
            raise ValueError(
                f"{module} cannot be converted with {base}: that is not what it was trained for. Convert "
                f"with the base config of its prepare step, or without one and quantize the result"
            )
    if isinstance(module, MXFakeQuantizedExperts):
        return module.to_source() if base is None else module.to_packed()
    linear = module.to_linear()
    return linear if base is None else _QUANTIZE_CONFIG_HANDLER[type(base)](linear, base)


def register_qat_handler() -> None:
    """Put our handler of ``QATConfig`` in front of torchao's; calling it again changes nothing."""
    torchao_handler = _QUANTIZE_CONFIG_HANDLER[QATConfig]
    if getattr(torchao_handler, "_is_torchao_mx", False):
        return

    def handler(module: nn.Module, config: QATConfig, **kwargs: Any) -> nn.Module:
        if config.step == "convert":
            if isinstance(module, (MXFakeQuantizedLinear, MXFakeQuantizedExperts)):
                return in_place_of(module, _convert(module, config))
        else:
            configs = _configs_of(config)
            if configs is not None:
                return in_place_of(module, _prepare(module, configs, config))
        return torchao_handler(module, config, **kwargs)

    handler._is_torchao_mx = True
    register_quantize_module_handler(QATConfig)(handler)
