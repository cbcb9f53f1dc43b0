"""What the public verbs of ops make of operands as people pass them."""

import functools

import pytest
import torch
from _grids import name_of, randn, refusals, relative_error
from conftest import CUDA
from expecttest import assert_expected_inline

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, QuantizeSpec, ops
from torchao_mx.ops.packed_mm.strategy import DEFAULT_SCRATCH

E, N, K = 4, 96, 64
COUNTS = [3, 0, 5, 2]  # rows per expert; those after them are unassigned
OFFS = torch.tensor(COUNTS).cumsum(0).int()
OWNED = sum(COUNTS)
R = 16
each_format = pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, NVFP4], ids=name_of)
each_activation = pytest.mark.parametrize(
    "activation", [None, MXFP4, MXFP8_E4M3, NVFP4], ids=lambda f: f.name if f else "none"
)
each_device = pytest.mark.parametrize("where", ["cpu", CUDA])


def packed(fmt, *lead, device="cpu"):
    w = (randn(*lead, N, K, seed=1) / 16).to(device)
    pts = ops.per_tensor_scale(w, fmt, bool(lead)) if fmt.has_per_tensor_scale else None
    qdata, scale = ops.quantize(w, fmt, per_tensor_scale=pts)
    return (qdata, scale, fmt), {"per_tensor_scale": pts}


def dtype_on(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


# --- results are their owner's ----------------------------------------------------------------------


@each_device
@each_format
@pytest.mark.parametrize("scratch", [None, 20_000], ids=["whole", "slices"])
def test_gradients_of_a_shared_input_add_up(fmt, scratch, where):
    """A result may be changed in place, by its owner and by autograd, which adds gradients up so: no view may."""
    assert scratch is None or scratch < DEFAULT_SCRATCH
    dtype = dtype_on(where)
    args, kwargs = packed(fmt, E, device=where)
    x = randn(R, K, seed=2).to(where, dtype).requires_grad_()
    offs = OFFS.to(where)
    options = {"strategy": "unpack", "max_scratch_bytes": scratch} | kwargs

    def product(rows):
        return ops.grouped_mm(rows, *args, offs, **options)

    (product(x) + product(x) + product(x)).sum().backward()
    three, x.grad = x.grad, None
    product(x).mul_(3).sum().backward()
    assert relative_error(three, x.grad) < 2e-2


# --- any layout -------------------------------------------------------------------------------------


@each_device
@each_format
@pytest.mark.parametrize("strategy", ["fused", "unpack"])
def test_bias_of_any_strides(fmt, strategy, where):
    """A column of a matrix, and one number for all columns."""
    dtype = dtype_on(where)
    args, kwargs = packed(fmt, device=where)
    x, wide = (t.to(where) for t in (randn(9, K).to(dtype), 64 * randn(N, 7, seed=3)))
    product = functools.partial(ops.matmul, x, *args, strategy=strategy, **kwargs)
    for bias in (wide[:, 1], wide[0, 2].expand(N), wide[0, 2]):
        wanted = product().double() + bias.double()
        assert relative_error(product(bias=bias), wanted) < 1e-2


# --- unassigned rows --------------------------------------------------------------------------------


def poisons(x, rows):
    """x with other values in ``rows``; zeros first."""
    for value in (0.0, 1e3, 1e30, torch.inf, torch.nan):
        other = x.clone()
        other[rows] = value
        yield other


@each_device
@each_format
@each_activation
def test_rows_after_the_last_group(fmt, activation, where):
    """They change no value, scale or gradient of the others, and are zeros."""
    dtype = dtype_on(where)
    args, kwargs = packed(fmt, E, device=where)
    spec = None if activation is None else QuantizeSpec(activation)
    offs, results = OFFS.to(where), []
    dys = poisons(randn(R, N, seed=4).to(where, dtype), slice(OWNED, None))
    for x, dy in zip(
        poisons(randn(R, K, seed=2).to(where, dtype), slice(OWNED, None)), dys, strict=True
    ):
        x.requires_grad_()
        y = ops.grouped_mm(x, *args, offs, activation=spec, **kwargs)
        y.backward(dy)
        results.append((y.detach(), x.grad))
    for y, dx in results:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])
        assert not y[OWNED:].any() and not dx[OWNED:].any() and y[:OWNED].any()


@each_device
@each_format
@each_activation
def test_tokens_of_other_ranks(fmt, activation, where):
    """A token none of whose experts is here, and routing weights of experts that are not."""
    dtype = dtype_on(where)
    args, kwargs = packed(fmt, E, device=where)
    spec = None if activation is None else QuantizeSpec(activation)
    ids = torch.tensor([[0, 9], [2, 3], [9, 9], [0, 2], [9, 9], [3, 9]], device=where)
    nobody = ids >= E
    order, offs = ops.route(ids, E)
    weights = torch.rand(6, 2, generator=torch.manual_seed(5)).to(where)
    results = []
    tokens = poisons(randn(6, K, seed=2).to(where, dtype), nobody.all(1))
    for x, w in zip(tokens, poisons(weights, nobody), strict=True):
        x.requires_grad_(), w.requires_grad_()
        rows = ops.grouped_mm(x, *args, offs, order=order, activation=spec, **kwargs)
        out = ops.combine(rows, w, order, offs=offs)
        out.backward(torch.ones_like(out))
        results.append((out.detach(), x.grad, w.grad))
    for result in results:
        for actual, expected in zip(result, results[0], strict=True):
            assert torch.equal(actual, expected)
        out, dx, dw = result
        assert not out[[2, 4]].any() and not dx[[2, 4]].any() and not dw[nobody].any()
        assert out[[0, 1, 3, 5]].any() and dw[~nobody].all()


def test_per_tensor_scale_of_rows_in_groups(device):
    x = randn(R, K).to(device)
    offs = OFFS.to(device)
    wanted = ops.per_tensor_scale(x[:OWNED].contiguous(), NVFP4)
    x[OWNED:] = torch.nan
    for rows in (x, x.t().contiguous().t()):
        assert torch.equal(ops.per_tensor_scale(rows, NVFP4, offs=offs), wanted)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    assert ops.per_tensor_scale(x, NVFP4, offs=none) == 2.0**-120


# --- orders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [[0, 1, 2, 2], [0, 1, 2, -1], [0, 1, 2, 4], [-1, -2, -3, -4]],
    ids=["twice", "negative", "beyond", "negatives"],
)
def test_an_order_is_a_permutation(order):
    """On the CPU, where values can be looked at."""
    args, _ = packed(MXFP4, E)
    offs, order = torch.tensor([1, 1, 3, 4]).int(), torch.tensor(order).int()
    a, b = randn(E, 4, K), randn(E, N, 4)
    for call in (
        lambda: ops.grouped_mm(randn(2, K), *args, offs, order=order),
        lambda: ops.grouped_mm(
            randn(2, K), *args, offs, order=order, activation=QuantizeSpec(MXFP4)
        ),
        lambda: ops.lora_grouped_mm(randn(2, K), *args, offs, a, b, 1.0, order=order),
        lambda: ops.combine(randn(4, K), torch.ones(2, 2), order),
    ):
        with pytest.raises(ValueError, match=r"order holds .* argsort"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["fused", "unpack", "fused8", "unpack8"])
def test_an_order_out_of_range_reads_no_other_memory(strategy):
    """Whatever it holds, no kernel leaves its tensors: the process goes on and other memory is as it was."""
    args, _ = packed(MXFP4, E, device="cuda")
    compute = torch.float8_e4m3fn if strategy.endswith("8") else None
    a, b = (randn(E, 4, K).cuda(), randn(E, N, 4).cuda())
    offs = torch.tensor([5, 5, 9, 12], dtype=torch.int32, device="cuda")
    x = randn(6, K).cuda().bfloat16().requires_grad_()
    order = torch.tensor([0, -5, 2**30, -(2**31), 2**31 - 1, 5, 6, 7, 8, 9, 10, 11]).int().cuda()
    for transpose_weight in (True, False):
        x = randn(6, K if transpose_weight else N).cuda().bfloat16().requires_grad_()
        y = ops.lora_grouped_mm(
            x, *args, offs, a, b, 1.0, order=order, strategy=strategy, compute_dtype=compute,
            transpose_weight=transpose_weight,
        )  # fmt: skip
        ops.combine(y, torch.ones(6, 2, device="cuda"), order).sum().backward()
        assert y[5:].isfinite().all()
    y = ops.grouped_mm(x[:, :K], *args, offs, order=order, activation=QuantizeSpec(MXFP4))
    torch.cuda.synchronize()
    assert y.shape == (12, N)


# --- what is no tensor ------------------------------------------------------------------------------


def test_refusals_of_what_is_no_dense_tensor():
    x = randn(8, K)
    (qdata, scale, fmt), _ = packed(MXFP4)
    others = {
        "none": None,
        "list": [[1.0] * K],
        "sparse": x.to_sparse(),
        "nested": torch.nested.nested_tensor([x, x[:2]]),
    }
    calls = []
    for t in others.values():
        calls += [
            lambda t=t: ops.quantize(t, MXFP4),
            lambda t=t: ops.fake_quantize(t, MXFP4),
            lambda t=t: ops.matmul(t, qdata, scale, fmt),
        ]
    calls += [
        lambda: ops.dequantize(None, scale, MXFP4),
        lambda: ops.dequantize(qdata, scale.float(), MXFP4),
        lambda: ops.per_tensor_scale([1.0], NVFP4),
        lambda: ops.per_tensor_scale(x, MXFP4),
        lambda: ops.quantize_both("x", None, None),
        lambda: ops.swiglu(3.0),
        lambda: ops.swiglu(x, bias=[0.0] * K),
        lambda: ops.route([[0, 1]], 2),
        lambda: ops.combine(None, x, x),
        lambda: ops.matmul(x, qdata, scale, fmt, bias=0.5),
        lambda: ops.matmul(x, qdata.tolist(), scale, fmt),
        lambda: ops.lora_matmul(x, qdata, scale, fmt, None, None, 1.0),
        lambda: ops.grouped_mm(x, qdata[None], scale[None], fmt, [8]),
    ]
    assert_expected_inline(
        refusals(calls, (TypeError, ValueError, NotImplementedError)),
        """\
TypeError: x is a NoneType; it must be a torch.Tensor: use torch.as_tensor(x)
TypeError: x is a NoneType; it must be a torch.Tensor: use torch.as_tensor(x)
TypeError: x is a NoneType; it must be a torch.Tensor: use torch.as_tensor(x)
TypeError: x is a list; it must be a torch.Tensor: use torch.as_tensor(x)
TypeError: x is a list; it must be a torch.Tensor: use torch.as_tensor(x)
TypeError: x is a list; it must be a torch.Tensor: use torch.as_tensor(x)
NotImplementedError: x is a tensor of layout sparse_coo; it must be dense: use .to_dense()
NotImplementedError: x is a tensor of layout sparse_coo; it must be dense: use .to_dense()
NotImplementedError: x is a tensor of layout sparse_coo; it must be dense: use .to_dense()
NotImplementedError: x is a tensor of layout nested; it must be dense: use torch.nested.to_padded_tensor
NotImplementedError: x is a tensor of layout nested; it must be dense: use torch.nested.to_padded_tensor
NotImplementedError: x is a tensor of layout nested; it must be dense: use torch.nested.to_padded_tensor
TypeError: qdata is a NoneType; it must be a torch.Tensor: use torch.as_tensor(qdata)
TypeError: mxfp4 needs qdata of dtype torch.uint8 and scale of dtype torch.float8_e8m0fnu; got torch.uint8 and torch.float32: reinterpret bytes with .view(dtype)
TypeError: x is a list; it must be a torch.Tensor: use torch.as_tensor(x)
ValueError: mxfp4 has no per-tensor scale; leave per_tensor_scale out
TypeError: x is a str; it must be a torch.Tensor: use torch.as_tensor(x)
TypeError: x is a float; it must be a torch.Tensor: use torch.as_tensor(x)
TypeError: bias is a list; it must be a torch.Tensor: use torch.as_tensor(bias)
TypeError: top_k_index is a list; it must be a torch.Tensor: use torch.as_tensor(top_k_index)
TypeError: y is a NoneType; it must be a torch.Tensor: use torch.as_tensor(y)
TypeError: bias is a float; it must be a torch.Tensor: use torch.as_tensor(bias)
TypeError: qdata is a list; it must be a torch.Tensor: use torch.as_tensor(qdata)
TypeError: lora_a is a NoneType; it must be a torch.Tensor: use torch.as_tensor(lora_a)
TypeError: offs is a list; it must be a torch.Tensor: use torch.as_tensor(offs)""",
    )
