"""Layers whose owner reads the weight itself: they are named, and correct if packed anyway."""

import warnings

import pytest
import torch
from _grids import BASES, randn
from torch import nn
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXFP4,
    NVFP4,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    QuantizeSpec,
    check_model,
    quantize_,
)
from torchao_mx.nn.raw_reads import raw_reads


class Mixer(nn.Module):
    """As Mamba's: one layer is called, of one the weight is taken, of one only its sizes."""

    def __init__(self):
        super().__init__()
        self.called, self.taken, self.asked = (nn.Linear(64, 64) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.called.weight)

    def forward(self, x):
        x = self.called(x).to(self.asked.weight.dtype)
        assert isinstance(self.asked.weight, torch.Tensor) and self.asked.weight is not None
        return (self.taken.weight @ x.mT).mT + self.asked.weight.shape[0]


class Heir(Mixer):
    """What it inherits reads."""


@pytest.mark.parametrize("cls", [Mixer, Heir])
def test_who_reads(cls):
    model = nn.ModuleDict({"mixer": cls()})
    assert raw_reads(model) == {"mixer.taken": f"{cls.__name__}.forward"}
    assert raw_reads(cls()) == {"taken": f"{cls.__name__}.forward"}


@pytest.mark.parametrize(
    "config",
    [
        QATConfig(BASES["w4a16"], step="prepare"),
        MXWeightOnlyLoRAConfig(r=4),
        NVFP4ForwardMXFP8BackwardConfig(),
    ],
    ids=["qat", "lora", "recipe"],
)
def test_training_past_the_layer_is_said(config):
    for call in (check_model, quantize_):
        with pytest.warns(
            UserWarning, match=r"mixer\.taken: Mixer\.forward reads the weight without"
        ):
            call(nn.ModuleDict({"mixer": Mixer()}), config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(nn.ModuleDict({"mixer": Mixer()}), config, lambda m, name: name.endswith("called"))


def test_a_packed_weight_multiplies_there_too():
    model = nn.Sequential(Mixer())
    x = randn(2, 5, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, MXWeightOnlyConfig())
    y = model(x)
    model[0].taken.weight = nn.Parameter(model[0].taken.weight.dequantize())
    assert torch.allclose(y, model(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", [None, MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("shape", [(64,), (64, 5), (3, 64, 5)], ids=str)
def test_from_the_left_is_the_layers_product(fmt, activation, shape):
    """Values and gradients, an activation's quantization included: bit for bit."""
    spec = None if activation is None else QuantizeSpec(activation)
    w = MXTensor.from_hp(randn(96, 64, seed=1), fmt, activation=spec)
    x = randn(*shape).requires_grad_()
    y = w @ x
    dy = randn(*y.shape, seed=2)
    y.backward(dy)
    left, x.grad = x.grad, None
    wanted = nn.functional.linear(x if x.dim() == 1 else x.mT, w)
    wanted = wanted if x.dim() == 1 else wanted.mT
    wanted.backward(dy)
    assert torch.equal(y, wanted) and torch.equal(left, x.grad)
