"""The size that a packed weight reports, its 1-D view, and averages of models with packed weights."""

import copy

import pytest
import torch
from _grids import randn
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.optim import swa_utils

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, MXTensor
from torchao_mx.tensor.flat import FlatMXTensor

N, K = 64, 96
each_format = pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, NVFP4], ids=str)
each_layout = pytest.mark.parametrize("transposed", [False, True], ids=["nk", "kn"])


def weight(fmt, *shape, transposed=False):
    w = MXTensor.from_hp(randn(*(shape or (N, K)), seed=1), fmt)
    return w.mT if transposed else w


def model(fmt=MXFP4):
    """A packed, frozen layer and a trained one."""
    net = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 2))
    net[0].weight = nn.Parameter(weight(fmt), requires_grad=False)
    return net


@each_layout
@each_format
@pytest.mark.parametrize("shape", [(N, K), (3, N, K)], ids=["2d", "3d"])
def test_sizes_are_those_of_the_packed_bytes(fmt, shape, transposed):
    w = weight(fmt, *shape, transposed=transposed)
    held = w.qdata.numel() + w.scale.numel()
    held += 0 if w.per_tensor_scale is None else 4 * w.per_tensor_scale.numel()
    for x in (w, nn.Parameter(w, requires_grad=False), w.detach(), w.to(torch.bfloat16)):
        assert x.nbytes == held
        assert x.numel() * x.element_size() == x.nelement() * x.itemsize == pytest.approx(held)
        assert x.numel() == w.dequantize().numel()


def test_sizes_of_an_empty_part():
    empty = weight(MXFP4)[:0]
    assert (empty.nbytes, empty.element_size()) == (0, 4)


FLATTENED = {
    "view": lambda w: w.view(-1),
    "view of numel": lambda w: w.view(w.numel()),
    "flatten": lambda w: w.flatten(),
    "ravel": lambda w: w.ravel(),
    "reshape": lambda w: w.reshape(-1),
    "torch.flatten": torch.flatten,
}


@each_layout
@each_format
@pytest.mark.parametrize("flatten", FLATTENED.values(), ids=FLATTENED)
def test_one_dimension_is_one_dimension(fmt, transposed, flatten):
    w = weight(fmt, 3, N, K, transposed=transposed)
    flat, want = flatten(w), w.dequantize().reshape(-1)
    assert flat.shape == want.shape
    assert torch.equal(flat.dequantize(), want)
    assert torch.equal(flat.dequantize(torch.bfloat16), w.dequantize(torch.bfloat16).reshape(-1))
    for back in (flat.view(w.shape), flat.unflatten(0, w.shape), flat.view(-1).reshape(w.shape)):
        assert isinstance(back, MXTensor)
        assert torch.equal(back.dequantize(), w.dequantize())
    for use in (
        lambda: flat.sum(),
        lambda: flat[:10],
        lambda: flat + 1,
        lambda: torch.cat([flat, want]),
        lambda: flat.numpy(),
        lambda: copy.deepcopy(flat),
        lambda: flat.view(2, -1),
    ):
        with pytest.raises(NotImplementedError, match=r"dequantize\(\)"):
            use()


def test_flattening_in_inference_mode():
    w = weight(MXFP4)
    with torch.inference_mode():
        for x in (w, w[:32], w.clone()):
            assert isinstance(x.view(-1), FlatMXTensor)


def test_vectors_of_parameters():
    net = model()
    with pytest.raises(NotImplementedError, match=r"dequantize\(\)"):
        parameters_to_vector(net.parameters())
    trained = [p for p in net.parameters() if p.requires_grad]
    assert parameters_to_vector(trained).shape == (N + 2 * N + 2,)


def test_gradients_are_clipped_beside_frozen_weights():
    net = model()
    net(randn(5, K)).sum().backward()
    norms = [p.grad.norm() for p in net.parameters() if p.grad is not None]
    total = clip_grad_norm_(net.parameters(), 0.1)
    torch.testing.assert_close(total, torch.stack(norms).norm())


STEPS = {
    "ema": (swa_utils.get_ema_multi_avg_fn(0.9), lambda old, new, n: 0.9 * old + 0.1 * new),
    "swa": (swa_utils.get_swa_multi_avg_fn(), lambda old, new, n: old + (new - old) / (n + 1)),
}


@pytest.mark.parametrize(("function", "formula"), STEPS.values(), ids=STEPS)
@each_format
def test_an_averaged_model_keeps_frozen_weights(fmt, function, formula):
    net = model(fmt)
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=function)
    packed, want = net[0].weight.dequantize(), None
    for n in range(3):
        with torch.no_grad():
            net[1].weight.add_(1 + n)
        want = net[1].weight.detach().clone() if n == 0 else formula(want, net[1].weight, n)
        averaged.update_parameters(net)
        torch.testing.assert_close(averaged.module[1].weight, want)
        kept = averaged.module[0].weight
        assert isinstance(kept, MXTensor)
        assert torch.equal(kept.dequantize(), packed)
        assert kept.qdata.data_ptr() != net[0].weight.qdata.data_ptr()


def test_averages_that_have_no_packed_form_are_refused():
    net = model()
    averaged = swa_utils.AveragedModel(net)  # on the CPU, one parameter after the other
    averaged.update_parameters(net)
    with pytest.raises(NotImplementedError, match="multi_avg_fn=get_ema_multi_avg_fn"):
        averaged.update_parameters(net)
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn())
    averaged.update_parameters(net)
    other = model()
    other[0].weight = nn.Parameter(
        MXTensor.from_hp(randn(N, K, seed=2), MXFP4), requires_grad=False
    )
    with pytest.raises(ValueError, match="before convert"):
        averaged.update_parameters(other)


def test_arithmetic_names_what_ends_in_it():
    w = weight(MXFP4)
    for use in (lambda: w + torch.zeros(N, K), lambda: w.data.add_(torch.zeros(N, K))):
        with pytest.raises(NotImplementedError, match=r"dequantize\(\).*merge_adapters=True"):
            use()
