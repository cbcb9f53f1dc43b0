"""MXTensor on a GPU: moves, pinning, copies, products and their gradients."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from torchao_mx import (
    MXFP4,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    MXTensor,
    MXWeightOnlyConfig,
    QuantizeSpec,
)

pytestmark = pytest.mark.gpu

FORMATS = pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4], ids=str)


def weight(fmt, *shape, activation=None, device="cuda"):
    g = torch.Generator().manual_seed(sum(shape))
    data = torch.randn(shape, generator=g).bfloat16()
    return MXTensor.from_hp(data, fmt, activation=activation).to(device)


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@FORMATS
@pytest.mark.parametrize("shape", [(64, 96), (3, 64, 96)], ids=["2d", "3d"])
def test_moves_keep_the_bytes(fmt, shape):
    host = weight(fmt, *shape, device="cpu")
    moved = [host.cuda(), host.to("cuda"), host.pin_memory().to("cuda", non_blocking=True)]
    torch.cuda.synchronize()
    for w in moved:
        assert w.device.type == "cuda" and torch.equal(w.cpu(), host)
        assert torch.equal(w.dequantize().cpu(), host.dequantize())
        assert torch.equal(w.mT.dequantize().cpu(), host.mT.dequantize())
    assert host.pin_memory().is_pinned()
    assert torch.equal(copy.deepcopy(moved[0]), moved[0])
    assert torch.equal(
        MXTensor.from_hp(host.dequantize().cuda(), fmt).dequantize(), moved[0].dequantize()
    )


@FORMATS
def test_state_moves_between_devices(fmt):
    file = io.BytesIO()
    torch.save({"w": weight(fmt, 64, 96)}, file)
    file.seek(0)
    w = torch.load(file, weights_only=True, map_location="cpu")["w"]
    assert w.device.type == "cpu" and torch.equal(w.cuda(), weight(fmt, 64, 96))
    module = torch.nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    module.weight = torch.nn.Parameter(w, requires_grad=False)
    assert module.cuda().weight.qdata.is_cuda and module.weight.device.type == "cuda"


@FORMATS
@pytest.mark.parametrize("activation", [None, QuantizeSpec(MXFP8_E4M3)], ids=["a16", "a8"])
def test_products_and_gradients(fmt, activation):
    w = weight(fmt, 64, 96, activation=activation)
    wq = w.dequantize().float()
    x = torch.randn(5, 7, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    xq = x.detach() if activation is None else MXTensor.from_hp(x.detach(), MXFP8_E4M3).dequantize()
    bias = torch.randn(64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = F.linear(x, w, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert relative_error(y, xq.float() @ wq.t() + bias.float()) < 5e-3
    assert relative_error(x.grad, dy.float() @ wq) < 5e-3
    assert relative_error(bias.grad, dy.float().sum((0, 1))) < 5e-3
    assert torch.equal(x.detach() @ w.t(), F.linear(x.detach(), w))


@FORMATS
def test_grouped_products_with_empty_groups_and_rows_behind(fmt):
    w = weight(fmt, 4, 64, 96)
    x = torch.randn(40, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offs = torch.tensor([7, 7, 30, 33], device="cuda", dtype=torch.int32)
    y = torch._grouped_mm(x, w.mT, offs=offs)
    dy = torch.randn_like(y)
    y.backward(dy)
    experts = [0] * 7 + [2] * 23 + [3] * 3
    wq = w.dequantize().float()[experts]
    assert relative_error(y[:33], torch.einsum("rk,rnk->rn", x[:33].float(), wq)) < 5e-3
    assert relative_error(x.grad[:33], torch.einsum("rn,rnk->rk", dy[:33].float(), wq)) < 5e-3
    assert (y[33:] == 0).all() and (x.grad[33:] == 0).all()


def test_graph_capture():
    """No host synchronisation: a forward and backward can be captured and replayed."""
    from torchao.quantization import quantize_

    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 32)).cuda().bfloat16()
    quantize_(model, MXWeightOnlyConfig())
    x = torch.randn(16, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    y = graphed(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, model(x))
    assert torch.equal(dx, torch.autograd.grad(model(x).sum(), x)[0])
