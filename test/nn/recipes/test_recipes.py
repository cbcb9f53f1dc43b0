"""NVFP4 forward, MXFP8 backward in linear layers: operands match torchao, products match float64."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torchao
from _grids import (
    BASES,
    E4M3,
    E5M2,
    MODES,
    assert_close,
    assert_same_values,
    linear,
    name_of,
    prepare,
    quantize,
    randn,
    relative_error,
)
from _recipes import (
    CONFIG,
    CONFIGS,
    STOCHASTIC,
    K,
    N,
    each_bias,
    each_dtype,
    recipe,
    step,
)
from torch import nn
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import (
    NVFP4Tensor,
    nvfp4_quantize,
    per_tensor_amax_to_scale,
)

from torchao_mx import (
    NVFP4,
    NVFP4ForwardMXFP8BackwardConfig,
    reference,
)
from torchao_mx.ops.block_scaled import recipe_linear as OP

AT_LEAST_0_18 = tuple(int(n) for n in torchao.__version__.split(".")[:2]) >= (0, 18)
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_row_count = pytest.mark.parametrize("rows", [1, 16, 31, 32, 33, 100])


# --- the operands, against torchao ----------------------------------------------------------------


@pytest.fixture
def operands_of(monkeypatch):
    """Runs a step and returns the operands, decoded, that each product was given: y, dx and dw."""
    seen = []

    def spy(a, b, dtype, bias=None):
        columns = a.values.shape[1]
        seen.append([t.decoded(dtype, columns) for t in (a, b)])
        return product(a, b, dtype, bias)

    product = OP.block_scaled_mm
    monkeypatch.setattr(OP, "block_scaled_mm", spy)

    def run(model, x, dy):
        seen.clear()
        step(model, x, dy)
        return seen

    return run


def torchao_mxfp8(x, dtype, mode, axis=-1):
    """``x`` through torchao's to_mx and to_dtype, in blocks along an axis completed with zeros."""
    x = x if axis == -1 else x.mT
    columns = x.shape[1]
    whole = F.pad(x, (0, -columns % 32)).contiguous()
    scale, qdata = to_mx(whole, dtype, 32, mode)
    return to_dtype(qdata, scale, dtype, 32, x.dtype)[:, :columns]


@each_row_count
@pytest.mark.parametrize("mode", MODES, ids=name_of)
@pytest.mark.parametrize(
    ("backward", "grad"), [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)], ids=name_of
)
def test_backward_operands_are_torchaos(operands_of, backward, grad, mode, rows):
    """Each quantized by to_mx along the axis that its product reduces, bit for bit."""
    model = recipe(NVFP4ForwardMXFP8BackwardConfig(backward, grad, mode), dtype=torch.bfloat16)
    x, dy = (randn(rows, n, dtype=torch.bfloat16, seed=n) for n in (K, N))
    _, (dy_rows, w_columns), (dy_columns, x_columns) = operands_of(model, x, dy)
    weight = model[0].weight.detach()
    assert torch.equal(dy_rows, torchao_mxfp8(dy, grad, mode))
    assert torch.equal(w_columns, torchao_mxfp8(weight, backward, mode, axis=-2))
    assert torch.equal(dy_columns, torchao_mxfp8(dy, grad, mode, axis=-2))
    assert torch.equal(x_columns, torchao_mxfp8(x, backward, mode, axis=-2))


def nvfp4_values(x):
    """``x`` through torchao's NVFP4 quantizer and back."""
    pts = per_tensor_amax_to_scale(x.abs().max().float())
    scale, qdata = nvfp4_quantize(x, NVFP4.block_size, pts)
    tensor = NVFP4Tensor(qdata, scale, NVFP4.block_size, x.dtype, pts)
    return tensor.dequantize(x.dtype)


@pytest.mark.skipif(not AT_LEAST_0_18, reason="0.17 divides where 0.18 multiplies by a reciprocal")
@each_row_count
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@each_bias
def test_forward_is_torchaos(dtype, bias, rows):
    """Bit-equal to torchao's quantizer and the product of what it dequantizes."""
    model, x = recipe(bias=bias, dtype=dtype), randn(rows, K, dtype=dtype)
    weight = model[0].weight.detach()
    assert torch.equal(model(x), F.linear(nvfp4_values(x), nvfp4_values(weight), model[0].bias))


# --- the products, against float64 ----------------------------------------------------------------


def check_step(model, x, dy, dtype=None):
    """Y and the gradients against float64 products of the reference's operands."""
    layer, rows = model[0], dy.flatten(0, -2)
    operands = (x.flatten(0, -2), layer.weight, rows)
    config = layer.recipe
    # Found where torchao would find them: a GPU divides by a number by multiplying.
    scales = (reference.per_tensor_scale(t.detach(), NVFP4).cpu() for t in operands[:2])
    y, dx, dw = (
        a.double() @ b.double()
        for a, b in reference.recipe_products(
            *(t.detach().cpu() for t in operands), config.forward_spec, config.backward_spec,
            config.grad_spec, None, *scales,
        )
    )  # fmt: skip
    expected = [y, dx, dw]
    if layer.bias is not None:
        expected[0] = y + layer.bias.detach().cpu().to(x.dtype).double()
        expected.append(rows.double().sum(0))
    got = step(model, x, dy)
    assert [t.dtype for t in got] == [x.dtype, x.dtype, *(p.dtype for p in model.parameters())]
    for actual, wanted in zip(got, expected, strict=True):
        actual = actual.cpu().reshape(wanted.shape)
        assert_close(actual, wanted, dtype or x.dtype)
        assert relative_error(2 * actual, wanted) > 0.9  # the comparison is no formality


@each_config
@each_bias
@each_dtype
@pytest.mark.parametrize("shape", [(1,), (31,), (33,), (2, 32), (2, 1, 35)], ids=str)
def test_products(config, bias, dtype, shape, device):
    model = recipe(config, bias, dtype, device)
    x, dy = randn(*shape, K, dtype=dtype), randn(*shape, N, dtype=dtype, seed=3)
    check_step(model, x.to(device), dy.to(device))


@pytest.mark.parametrize(
    ("w_dtype", "x_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=name_of,
)
def test_weights_of_another_dtype(w_dtype, x_dtype, device):
    x, dy = (randn(33, n, dtype=x_dtype, seed=n).to(device) for n in (K, N))
    check_step(recipe(dtype=w_dtype, device=device), x, dy, dtype=torch.bfloat16)


def test_in_features_of_whole_nvfp4_blocks_alone(device):
    """48 is no multiple of 32, and is not reduced in backward."""
    model = recipe(k=48, device=device)
    check_step(model, randn(33, 48).to(device), randn(33, N, seed=3).to(device))


def test_operands_of_any_strides(device):
    xs = {
        "transposed": randn(K, 40).t(),
        "sliced": randn(40, 2 * K + 1)[:, 1 : K + 1],
        "stepped": randn(80, K)[::2],
        "swapped": randn(20, 2, K).transpose(0, 1),
        "expanded": randn(1, K).expand(40, -1),
    }
    for name, x in xs.items():
        model = linear(device=device)
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
        quantize(model, CONFIG)
        for dy in (
            randn(N, *x.shape[:-1], seed=3).movedim(0, -1),
            randn(N).expand(*x.shape[:-1], N),
        ):
            assert not x.is_contiguous() and not dy.is_contiguous(), name
            check_step(model, x.to(device), dy.to(device))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows(shape, device):
    for bias in (True, False):
        model = recipe(bias=bias, device=device)
        y, dx, *grads = step(model, torch.empty(*shape, K, device=device),
                             torch.empty(*shape, N, device=device))  # fmt: skip
        assert (y.shape, dx.shape) == ((*shape, N), (*shape, K))
        assert all(g.eq(0).all() and g.isfinite().all() for g in grads)
    assert recipe()(torch.ones(K)).shape == (N,)


def test_bias_gradient_is_summed_in_fp32():
    """Under autocast dY is bf16 and the bias fp32; 4097 ones are no bf16 number."""
    model = recipe()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(4097, K))
    y.backward(torch.ones_like(y))
    assert model[0].bias.grad.eq(4097).all()


@each_dtype
def test_forward_is_that_of_quantization_aware_training(dtype, device):
    x = randn(33, K, dtype=dtype).to(device)
    trained = prepare(linear(dtype=dtype, device=device), BASES["nvfp4"])(x)
    assert torch.equal(recipe(dtype=dtype, device=device)(x), trained)


# --- stochastic rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("config", [STOCHASTIC, NVFP4ForwardMXFP8BackwardConfig(
    E4M3, E5M2, stochastic_rounding=True)], ids=["e4m3", "grad_e5m2"])  # fmt: skip
def test_stochastic_rounding_is_of_dy_alone(config, device):
    """The operands are the reference's with the seed that the generator gives next."""
    model = recipe(config, device=device)
    x, dy = randn(33, K), randn(33, N, seed=3)
    torch.manual_seed(5)
    got = step(model, x.to(device), dy.to(device))
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (), device=device).cpu()
    expected = reference.recipe_products(
        x, model[0].weight.detach().cpu(), dy, config.forward_spec, config.backward_spec,
        config.grad_spec, seed,
    )  # fmt: skip
    nearest = step(recipe(CONFIG, device=device), x.to(device), dy.to(device))
    assert torch.equal(got[0], nearest[0])
    for i, (a, b) in enumerate((expected.dx, expected.dw), start=1):
        assert_close(got[i].cpu(), a.double() @ b.double())
        assert relative_error(got[i], nearest[i]) > 1e-3
    assert torch.equal(got[3], nearest[3])


def test_stochastic_rounding_follows_the_generator():
    model, x, dy = recipe(STOCHASTIC), randn(33, K), randn(33, N, seed=3)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append([step(model, x, dy) for _ in range(2)])
    for first, again in zip(*runs, strict=True):
        assert all(map(torch.equal, first, again))
    (one, two), _ = runs
    assert not torch.equal(one[1], two[1]) and not torch.equal(one[2], two[2])


def test_stochastic_gradients_are_unbiased():
    """The mean over draws tends to the products of the unrounded dY."""
    model, x, dy = recipe(STOCHASTIC, bias=False), randn(33, K), randn(33, N, seed=3)
    config, weight = STOCHASTIC, model[0].weight.detach()
    products = reference.recipe_products(
        x, weight, dy, config.forward_spec, config.backward_spec, config.grad_spec
    )
    exact = (dy.double() @ products.dx[1].double(), dy.double().mT @ products.dw[1].double())
    torch.manual_seed(0)
    draws = [step(model, x, dy)[1:] for _ in range(300)]
    for i, wanted in enumerate(exact):
        once = relative_error(draws[0][i], wanted)
        mean = relative_error(torch.stack([d[i] for d in draws]).double().mean(0), wanted)
        assert mean < 0.1 * once  # 300 ** -0.5 of it


# --- values that are not ordinary -----------------------------------------------------------------


def test_zeros_are_zero(device):
    model = recipe(bias=False, device=device)
    for x, dy in ((torch.zeros(33, K), randn(33, N)), (randn(33, K), torch.zeros(33, N))):
        y, dx, dw = step(model, x.to(device), dy.to(device))
        assert y.isfinite().all() and dx.isfinite().all() and dw.eq(0).all()
        assert (y if x.eq(0).all() else dx).eq(0).all()
    with torch.no_grad():
        model[0].weight.zero_()
    y, dx, dw = step(model, randn(33, K).to(device), randn(33, N).to(device))
    assert y.eq(0).all() and dx.eq(0).all() and dw.isfinite().all() and dw.ne(0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_shows(value, device):
    """In x: all of Y, and dW where x's column has it. In dY: dX of its row, dW of its column."""
    model = recipe(bias=False, device=device)
    x, dy = randn(70, K), randn(70, N, seed=3)
    bad = x.clone()
    bad[40, 7] = value
    y, dx, dw = step(model, bad.to(device), dy.to(device))
    assert y.isnan().all() and dx.isfinite().all()
    assert not dw[:, 7].isfinite().any() and dw[:, torch.arange(K) != 7].isfinite().all()
    bad = dy.clone()
    bad[40, 7] = value
    y, dx, dw = step(model, x.to(device), bad.to(device))
    assert y.isfinite().all()
    assert not dx[40].isfinite().any() and dx[torch.arange(70) != 40].isfinite().all()
    assert not dw[7].isfinite().any() and dw[torch.arange(N) != 7].isfinite().all()


def test_a_lone_giant_costs_its_block_alone():
    """Of 33 rows the last is a block of its own in backward: dW of the first 32 is as without it."""
    model, x, dy = recipe(bias=False), randn(33, K), randn(33, N, seed=3)
    dy[32] = 0
    x[32] = 1e6
    _, _, with_giant = step(model, x, dy)
    _, _, without = step(model, x[:32], dy[:32])
    assert_same_values(with_giant, without)
