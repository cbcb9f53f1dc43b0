"""What the tests of the recipe share: its configs, a model of one layer under it, a step."""

import pytest
import torch
from _grids import DTYPES, E4M3, E5M2, linear, name_of, quantize

from torchao_mx import NVFP4ForwardMXFP8BackwardConfig, ScaleCalculationMode

K, N = 64, 96
CONFIG = NVFP4ForwardMXFP8BackwardConfig()
CONVERT = NVFP4ForwardMXFP8BackwardConfig(step="convert")
STOCHASTIC = NVFP4ForwardMXFP8BackwardConfig(stochastic_rounding=True)
CONFIGS = {
    "e4m3": CONFIG,
    "e5m2": NVFP4ForwardMXFP8BackwardConfig(E5M2, E5M2),
    "grad_e5m2_floor": NVFP4ForwardMXFP8BackwardConfig(E4M3, E5M2, ScaleCalculationMode.FLOOR),
}
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def recipe(config=CONFIG, bias=True, dtype=torch.float32, device="cpu", **kwargs):
    return quantize(linear(bias, dtype, device, **kwargs), config)


def step(model, x, dy):
    """The output, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]
