"""The handler that makes torchao's ``QATConfig`` accept our configs.

torchao's handler of ``QATConfig`` knows only torchao's own classes. :func:`register_qat_handler`, which
``import torchao_mx`` calls, wraps it in a handler for the cases below, which passes on all others:

* prepare with one of our PTQ configs, torchao's ``MXDynamicActivationMXWeightConfig`` or our
  ``MXFakeQuantizeConfig``;
* convert one of our fake-quantized modules, given itself or inside the given module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchao.prototype.qat
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.mx_formats import (
    MXDynamicActivationMXWeightConfig as TorchaoMXDynamicActivationMXWeightConfig,
)
from torchao.quantization import quantize_
from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, QATConfig

from torchao_mx.formats import BlockFormat, QuantizeSpec
from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.linear_checks import is_in_high_precision
from torchao_mx.nn.modules import check_replaceable, in_place_of, ties_of
from torchao_mx.nn.qat.config import MXFakeQuantizeConfig
from torchao_mx.nn.qat.experts import MXFakeQuantizedExperts, check_fake_quantized_experts
from torchao_mx.nn.qat.fake_quantizer import FakeQuantized
from torchao_mx.nn.qat.linear import MXFakeQuantizedLinear, check_fake_quantized_linear
from torchao_mx.nn.registry import (
    Specs,
    base_specs,
    handler_of,
    is_registered,
    register,
    register_base,
    torchaos_handler,
)

_Configs = tuple[MXFakeQuantizeConfig | None, MXFakeQuantizeConfig | None]

_TORCHAOS = (
    FakeQuantizedLinear,
    FakeQuantizedEmbedding,
    torchao.prototype.qat.MXFakeQuantizedLinear,
    torchao.prototype.qat.NVFP4FakeQuantizedLinear,
)


def is_fake_quantized(module: nn.Module) -> bool:
    """Return whether ``module``, ours or torchao's, is in training and ``step="convert"`` converts it."""
    return isinstance(module, (FakeQuantized, *_TORCHAOS))


def _configs_of(config: QATConfig) -> _Configs | None:
    """Return (activation_config, weight_config) if our handler prepares ``config``, otherwise None."""
    specs = base_specs(config.base_config)
    if specs is not None:
        return tuple(MXFakeQuantizeConfig.from_spec(spec) for spec in specs)
    explicit = (config.activation_config, config.weight_config)
    return explicit if any(isinstance(c, MXFakeQuantizeConfig) for c in explicit) else None


def _prepare(module: nn.Module, configs: _Configs, config: QATConfig) -> nn.Module:
    if isinstance(module, FakeQuantized):
        warnings.warn(f"{module} is already prepared and is left as it is", stacklevel=2)
        return module
    _check_prepared(module, configs, config)
    if layout_of(module) is not None:
        return MXFakeQuantizedExperts.from_experts(module, *configs)
    return MXFakeQuantizedLinear.from_linear(module, *configs)


def _is_ours(config: QATConfig) -> bool:
    """Return whether our handler handles ``config``; torchao's handler gets all others."""
    return config.step == "convert" or _configs_of(config) is not None


def check_qat_module(module: nn.Module, config: QATConfig) -> None:
    """Raise if the handler would; change nothing."""
    if config.step == "convert":
        _check_converted(module, config)
    else:
        _check_prepared(module, _configs_of(config), config)


def _check_prepared(module: nn.Module, configs: _Configs, config: QATConfig) -> None:
    if isinstance(module, FakeQuantized):
        return
    if layout_of(module) is not None:
        check_fake_quantized_experts(module, *configs)
    else:
        check_fake_quantized_linear(module, *configs)
        is_torchaos = isinstance(config.base_config, TorchaoMXDynamicActivationMXWeightConfig)
        if is_torchaos and module.weight.dtype != torch.bfloat16:
            raise TypeError(
                f"{module} has a {module.weight.dtype} weight, which torchao's config cannot convert "
                f"after training; use .bfloat16(), or torchao_mx.MXDynamicActivationMXWeightConfig"
            )
    check_replaceable(module)


def _check_converted(module: nn.Module, config: QATConfig) -> None:
    base = config.base_config
    if base is None or not isinstance(module, FakeQuantized):
        return
    wanted, trained = _configs_of(config), (module.activation_config, module.weight_config)
    if wanted is None or [c and c.spec for c in wanted] != [c and c.spec for c in trained]:
        raise ValueError(
            f"{module} cannot be converted with {base}, for which it was not trained. Convert with the "
            f"base config of its prepare step, or convert without one and quantize the result"
        )


def _convert(
    module: MXFakeQuantizedLinear | MXFakeQuantizedExperts, config: QATConfig
) -> nn.Module:
    _check_converted(module, config)
    base = config.base_config
    if module.is_switched_off:
        warnings.warn(
            f"{module} is converted while its fake quantization is off, so it was not trained for the "
            f"quantized values; see torchao_mx.enable_fake_quant",
            stacklevel=2,
        )
    if isinstance(module, MXFakeQuantizedExperts):
        return module.to_source() if base is None else module.to_packed()
    linear = module.to_linear()
    return linear if base is None else handler_of(type(base))(linear, base)


def convert_inside(
    module: nn.Module,
    config: AOBaseConfig,
    is_in_training: Callable[[nn.Module], bool],
    how_to_prepare: str,
) -> nn.Module:
    """Convert the modules in training inside ``module``, which is not in training; warn if there are none.

    ``quantize_`` passes a handler the first module that ``filter_fn`` selects, which for a filter by name may
    be the model itself.
    """
    inside = {name: m for name, m in module.named_modules() if is_in_training(m)}
    if inside:
        for tie in ties_of(module, inside.values()):
            warnings.warn(tie, stacklevel=2)
        quantize_(module, config, filter_fn=lambda m, name: is_in_training(m))
    elif isinstance(module, FakeQuantized):
        warnings.warn(
            f"{module} was prepared with another config and stays in training; convert it with the config "
            f"of its prepare step",
            stacklevel=2,
        )
    elif is_in_high_precision(module):
        warnings.warn(
            f"{module} was never prepared, so convert leaves it in high precision; {how_to_prepare}, or "
            f"leave it out with filter_fn",
            stacklevel=2,
        )
    elif any(is_in_high_precision(m) for m in module.modules()):
        warnings.warn(
            f"nothing in {type(module).__name__} was prepared, so convert leaves it as it is; "
            f"{how_to_prepare}",
            stacklevel=2,
        )
    return module


def _torchaos_specs(config: TorchaoMXDynamicActivationMXWeightConfig) -> Specs:
    activation, weight = (
        QuantizeSpec(BlockFormat.from_dtype(dtype, config.block_size), config.scaling_mode)
        for dtype in (config.activation_dtype, config.weight_dtype)
    )
    return activation, weight


register_base(TorchaoMXDynamicActivationMXWeightConfig, _torchaos_specs)


def register_qat_handler() -> None:
    """Wrap torchao's handler of ``QATConfig`` in ours; further calls change nothing."""
    if is_registered(QATConfig):
        return
    torchao_handler = torchaos_handler(QATConfig)

    def handler(module: nn.Module, config: QATConfig, **kwargs: Any) -> nn.Module:
        if config.step == "convert":
            if isinstance(module, FakeQuantized):
                return in_place_of(module, _convert(module, config))
            if not is_fake_quantized(module):
                how = "prepare it with QATConfig(base_config, step='prepare') and train it"
                return convert_inside(module, config, is_fake_quantized, how)
        else:
            configs = _configs_of(config)
            if configs is not None:
                return in_place_of(module, _prepare(module, configs, config))
        return torchao_handler(module, config, **kwargs)

    register(
        QATConfig, handler, check_qat_module, claims=_is_ours, is_in_training=is_fake_quantized
    )
