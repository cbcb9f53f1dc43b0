"""The ``quantize_`` handler of the recipe's config."""

from __future__ import annotations

import warnings

from torch import nn

from torchao_mx.nn.experts.layouts import layout_of
from torchao_mx.nn.modules import check_not_in_training, check_replaceable, in_place_of
from torchao_mx.nn.ptq import quantize_linear
from torchao_mx.nn.qat.handler import convert_inside
from torchao_mx.nn.recipes.config import NVFP4ForwardMXFP8BackwardConfig
from torchao_mx.nn.recipes.experts import NVFP4MXFP8Experts, check_recipe_experts
from torchao_mx.nn.recipes.linear import NVFP4MXFP8Linear, check_recipe_linear
from torchao_mx.nn.registry import register

_OURS = (NVFP4MXFP8Linear, NVFP4MXFP8Experts)


def _recipe_handler(module: nn.Module, config: NVFP4ForwardMXFP8BackwardConfig) -> nn.Module:
    """Make the twin under the recipe, or warn if it is made already; on convert, pack it."""
    if config.step == "convert":
        if isinstance(module, _OURS):
            return in_place_of(module, _convert(module))
        how = "prepare it with NVFP4ForwardMXFP8BackwardConfig() and train it"
        return convert_inside(module, config, is_under_recipe, how)
    if isinstance(module, _OURS):
        warnings.warn(f"{module} is already prepared and is left as it is", stacklevel=2)
        return module
    check_recipe_module(module, config)
    if layout_of(module) is not None:
        return in_place_of(module, NVFP4MXFP8Experts.from_experts(module, config))
    return in_place_of(module, NVFP4MXFP8Linear.from_linear(module, config))


def is_under_recipe(module: nn.Module) -> bool:
    """Return whether ``module`` is in training under the recipe, so that ``step="convert"`` converts it."""
    return isinstance(module, _OURS)


def _convert(module: NVFP4MXFP8Linear | NVFP4MXFP8Experts) -> nn.Module:
    if isinstance(module, NVFP4MXFP8Experts):
        return module.to_packed()
    spec = module.recipe.forward_spec
    return quantize_linear(module.to_linear(), spec, spec)


def check_recipe_module(module: nn.Module, config: NVFP4ForwardMXFP8BackwardConfig) -> None:
    """Raise if the handler would; change nothing."""
    if isinstance(module, _OURS):
        return
    if config.step == "convert":
        return
    check_not_in_training(module)
    (check_recipe_experts if layout_of(module) is not None else check_recipe_linear)(module, config)
    check_replaceable(module)


register(
    NVFP4ForwardMXFP8BackwardConfig,
    _recipe_handler,
    check_recipe_module,
    is_in_training=is_under_recipe,
)
