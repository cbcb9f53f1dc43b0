"""mm, its verbs and combine: values and every gradient against float64, and what backward keeps."""

import _grids
import pytest
import torch
from _grids import name_of, relative_error
from conftest import CUDA

from torchao_mx import MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4, QuantizeSpec, ops, reference
from torchao_mx.ops.packed_mm.strategy import DEFAULT_SCRATCH

OPS = torch.ops.torchao_mx
K, N, E, RANK, S = 64, 44, 4, 5, 1.7  # N: rows of no multiple of 16 bytes
SCRATCH = 20_000  # bytes: several slices of the weight
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_format = pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, NVFP4], ids=name_of)
each_direction = pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])

# Where and how products are computed: x's dtype, the adapters', and what forces a strategy.
WAYS = {
    "reference": ("cpu", torch.float32, torch.float32, {}),
    "reference_bf16": ("cpu", torch.bfloat16, torch.float32, {}),
    "unpack": ("cpu", torch.float32, torch.bfloat16, dict(strategy="unpack")),
    "slices": ("cpu", torch.float32, torch.float32, dict(strategy="unpack", max_scratch_bytes=SCRATCH)),
    "slices_bf16": ("cpu", torch.bfloat16, torch.bfloat16, dict(strategy="unpack", max_scratch_bytes=1)),
    "fused": ("cuda", torch.bfloat16, torch.float32, dict(strategy="fused")),
    "fused_fp16": ("cuda", torch.float16, torch.float16, dict(strategy="fused")),
    "cuda_unpack": ("cuda", torch.bfloat16, torch.float32, dict(strategy="unpack")),
    "cuda_slices": ("cuda", torch.bfloat16, torch.bfloat16, dict(strategy="unpack", max_scratch_bytes=SCRATCH)),
}  # fmt: skip
each_way = pytest.mark.parametrize(
    "way", [pytest.param(k, marks=CUDA.marks if v[0] == "cuda" else ()) for k, v in WAYS.items()]
)

# Rows of each expert, and rows of nobody.
ROUTINGS = {
    "even": ([3, 3, 3, 3], 0),
    "ragged": ([1, 0, 6, 2], 1),
    "first_and_last_empty": ([0, 4, 4, 0], 0),
    "one_expert": ([0, 0, 8, 0], 0),
    "one_row": ([0, 1, 0, 0], 0),
    "rows_behind": ([2, 0, 1, 3], 6),
    "nobody": ([0, 0, 0, 0], 4),
    "no_rows": ([0, 0, 0, 0], 0),
}


def randn(*shape, **kwargs):
    return _grids.randn(*shape, **kwargs) / 16  # products of three of them have to fit in fp16


def weight(fmt, *lead, n=N, device="cpu"):
    """(qdata, scale, per-tensor scale) of ``[*lead, n, K]``, and its values in float64."""
    w = randn(*lead, n, K, seed=1)
    pts = ops.per_tensor_scale(w, fmt, bool(lead)) if fmt.has_per_tensor_scale else None
    packed = (*ops.quantize(w, fmt, per_tensor_scale=pts), pts)
    values = reference.dequantize(*packed[:2], fmt, torch.float32, -1, pts).double()
    return [None if t is None else t.to(device) for t in packed], values


def leaves(device, **tensors):
    return {k: t.to(device).requires_grad_() for k, t in tensors.items()}


def offsets(counts, device="cpu"):
    return torch.tensor(counts, device=device).cumsum(0).int()


def check(actual, expected, bound, name):
    """By value: a gradient that is uniformly too large fails."""
    actual, expected = actual.detach().cpu(), expected.detach()
    assert actual.shape == expected.shape, name
    if expected.eq(0).all():
        assert actual.eq(0).all(), name
    else:
        error = relative_error(actual, expected)
        assert error <= bound, f"{name}: relative error {error:.2e}"
        assert relative_error(actual * 1.1, expected) > 0.09


def check_against_float64(y, dy, inputs, exact, expected, bound):
    """``y`` and its gradients to ``inputs`` against ``expected``, made of ``exact``, the same in float64."""
    check(y, expected, bound, "y")
    grads = torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
    wanted = torch.autograd.grad(expected, [exact[k] for k in inputs], dy.cpu().double())
    for (name, x), grad, want in zip(inputs.items(), grads, wanted, strict=True):
        assert grad.dtype == x.dtype
        check(grad, want, max(bound, BOUND[x.dtype]), f"gradient of {name}")


def doubled(inputs):
    return {k: t.detach().cpu().double().requires_grad_() for k, t in inputs.items()}


def grouped_float64(x, w, counts, order, transpose_weight, a=None, b=None, bias=None):
    """Row by row: y of all rows, ``w [E, N, K]``."""
    w = w if a is None else w + S * b @ a
    rows = x if order is None else x[order // (len(order) // max(1, len(x)))]
    expert = torch.arange(E).repeat_interleave(torch.tensor(counts))
    w = w[expert] if transpose_weight else w[expert].mT
    y = torch.einsum("rnk,rk->rn", w, rows[: len(expert)])
    y = y if bias is None else y + bias[expert]
    return torch.cat([y, y.new_zeros(len(rows) - len(y), y.shape[1])])


# --- values and gradients -------------------------------------------------------------------------


@each_format
@each_direction
@each_way
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "plain"])
def test_dense(fmt, transpose_weight, way, lora):
    device, dtype, adapter_dtype, options = WAYS[way]
    (qdata, scale, pts), w = weight(fmt, device=device)
    reduced, columns = (K, N) if transpose_weight else (N, K)
    for shape in ((7,), (2, 3), (1,), (0,), ()):
        inputs = leaves(device, x=randn(*shape, reduced, dtype=dtype), bias=randn(columns, seed=2))
        args = (inputs["x"], qdata, scale, fmt)
        kwargs = dict(per_tensor_scale=pts, transpose_weight=transpose_weight, **options)
        kwargs["bias"] = inputs["bias"]
        if lora:
            inputs |= leaves(
                device,
                a=randn(RANK, K, dtype=adapter_dtype, seed=3),
                b=randn(N, RANK, dtype=adapter_dtype, seed=4),
            )
            y = ops.lora_matmul(*args, inputs["a"], inputs["b"], S, **kwargs)
        else:
            y = ops.matmul(*args, **kwargs)
        exact = doubled(inputs)
        w_all = w + S * exact["b"] @ exact["a"] if lora else w
        expected = exact["x"] @ (w_all.mT if transpose_weight else w_all) + exact["bias"]
        dy = randn(*shape, columns, dtype=dtype, seed=5).to(device)
        check_against_float64(y, dy, inputs, exact, expected, BOUND[dtype])


@each_direction
@each_way
@pytest.mark.parametrize(
    ("routing", "fmt"),
    [("ragged", NVFP4), *zip(ROUTINGS, (MXFP4, MXFP8_E4M3, NVFP4, MXFP4) * 2, strict=True)],
    ids=name_of,
)
@pytest.mark.parametrize("ordered", [True, False], ids=["order", "grouped"])
def test_grouped_lora(fmt, transpose_weight, way, routing, ordered):
    check_grouped(fmt, transpose_weight, way, routing, ordered, lora=True, bias=not ordered)


@each_direction
@pytest.mark.parametrize("way", ["reference", "slices"])
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4], ids=name_of)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_lora_of_all_formats(fmt, transpose_weight, way, routing):
    """And routings, here without a GPU's other ways."""
    check_grouped(fmt, transpose_weight, way, routing, True, lora=True, bias=True)


@each_direction
@each_way
@pytest.mark.parametrize(
    ("routing", "fmt"), [("ragged", MXFP4), ("rows_behind", NVFP4)], ids=name_of
)
@pytest.mark.parametrize("ordered", [True, False], ids=["order", "grouped"])
def test_grouped_mm(fmt, transpose_weight, way, routing, ordered):
    check_grouped(fmt, transpose_weight, way, routing, ordered, lora=False, bias=ordered)


def check_grouped(fmt, transpose_weight, way, routing, ordered, lora, bias):
    device, dtype, adapter_dtype, options = WAYS[way]
    counts, behind = ROUTINGS[routing]
    n_rows = sum(counts) + behind
    top_k = 2 if n_rows % 2 == 0 else 1
    (qdata, scale, pts), w = weight(fmt, E, device=device)
    reduced, columns = (K, N) if transpose_weight else (N, K)
    order = torch.randperm(n_rows, generator=torch.manual_seed(0)) if ordered else None
    x = randn(n_rows // top_k if ordered else n_rows, reduced, dtype=dtype)
    inputs = leaves(device, x=x, **(dict(bias=randn(E, columns, seed=2)) if bias else {}))
    args = (inputs["x"], qdata, scale, fmt, offsets(counts, device))
    kwargs = dict(
        per_tensor_scale=pts, bias=inputs.get("bias"), transpose_weight=transpose_weight,
        order=None if order is None else order.to(device), **options,
    )  # fmt: skip
    if lora:
        inputs |= leaves(
            device,
            a=randn(E, RANK, K, dtype=adapter_dtype, seed=3),
            b=randn(E, N, RANK, dtype=adapter_dtype, seed=4),
        )
        y = ops.lora_grouped_mm(*args, inputs["a"], inputs["b"], S, **kwargs)
    else:
        y = ops.grouped_mm(*args, **kwargs)
    exact = doubled(inputs)
    factors = {k: t for k, t in exact.items() if k != "x"}
    expected = grouped_float64(exact["x"], w, counts, order, transpose_weight, **factors)
    dy = randn(n_rows, columns, dtype=dtype, seed=5)
    dy[sum(counts) :] = float("nan")  # nobody's: must reach no gradient
    grads = torch.autograd.grad(y, list(inputs.values()), dy.to(device), retain_graph=True)
    dy = torch.nan_to_num(dy, 0.0).to(device)
    check_against_float64(y, dy, inputs, exact, expected, BOUND[dtype])
    for grad, same in zip(grads, torch.autograd.grad(y, list(inputs.values()), dy), strict=True):
        assert torch.equal(grad, same)  # and twice gives the same bits


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("tokens", [5, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_combine(top_k, tokens, dtype, device):
    order = torch.randperm(tokens * top_k, generator=torch.manual_seed(0))
    inputs = leaves(
        device, y=randn(tokens * top_k, K, dtype=dtype), weights=torch.rand(tokens, top_k)
    )
    out = ops.combine(inputs["y"], inputs["weights"], order.to(device))
    assert out.dtype == dtype
    exact = doubled(inputs)
    rows = exact["y"][order.argsort()].view(tokens, top_k, K)
    expected = torch.einsum("tj,tjc->tc", exact["weights"], rows)
    dout = randn(tokens, K, dtype=dtype, seed=5).to(device)
    check_against_float64(out, dout, inputs, exact, expected, BOUND[dtype])


@each_direction
def test_reference_in_float64_is_its_own_oracle(transpose_weight):
    """The reference's sums, which the kernels are held to, to 1e-12."""
    _, w = weight(MXFP4, E)
    counts, order = [1, 0, 6, 2], torch.randperm(12, generator=torch.manual_seed(0))
    reduced, columns = (K, N) if transpose_weight else (N, K)
    a, b = randn(E, RANK, K, seed=3).double(), randn(E, N, RANK, seed=4).double()
    x, bias = randn(6, reduced).double(), randn(E, columns, seed=2).double()
    down, up = (a, b) if transpose_weight else (b.mT, a.mT)
    offs = offsets(counts)
    y, h = reference.mm(x, w, down, up, offs, order, S, bias, transpose_weight)
    check(y, grouped_float64(x, w, counts, order, transpose_weight, a, b, bias), 1e-12, "y")
    rows = x[order // 2]
    expert = torch.arange(E).repeat_interleave(torch.tensor(counts))
    check(h[:9], torch.einsum("rk,rqk->rq", rows[:9], down[expert]), 1e-12, "h")
    one_hot = torch.nn.functional.one_hot(expert, E).double()
    gram = reference.gram(h, x, offs, order, 2, S, torch.float64, False)
    check(gram, S * torch.einsum("re,rq,rk->eqk", one_hot, h[:9], rows[:9]), 1e-12, "gram")
    assert torch.equal(gram.mT, reference.gram(h, x, offs, order, 2, S, torch.float64, True))
    check(reference.group_sum(y, offs, torch.float64), one_hot.mT @ y[:9], 1e-12, "group_sum")


def test_activation_with_order_and_bias():
    """The path beside mm, where x is quantized first."""
    (qdata, scale, _), w = weight(MXFP4, E, n=48)
    counts, order = [1, 0, 6, 2], torch.randperm(12, generator=torch.manual_seed(0))
    spec = QuantizeSpec(MXFP8_E4M3)
    inputs = leaves("cpu", x=randn(6, K), bias=randn(E, 48, seed=2))
    y = ops.grouped_mm(
        inputs["x"], qdata, scale, MXFP4, offsets(counts), order=order, bias=inputs["bias"],
        activation=spec,
    )  # fmt: skip
    exact = doubled(inputs)
    quantized = reference.fake_quantize(inputs["x"].detach(), MXFP8_E4M3).double()
    x = quantized + exact["x"] - exact["x"].detach()
    expected = grouped_float64(x, w, counts, order, True, bias=exact["bias"])
    check_against_float64(y, randn(12, 48, seed=5), inputs, exact, expected, 1e-5)


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
def test_eight_bit_compute(grouped):
    """Rounded, hence off by some per cent of its rounding; the adapters' gradients are not."""
    lead = (E,) if grouped else ()
    (qdata, scale, _), w = weight(MXFP4, *lead, n=48)
    gen = torch.manual_seed(0)
    inputs = leaves(
        "cpu",
        x=torch.randn(9, K, generator=gen).bfloat16(),
        a=torch.randn(*lead, RANK, K, generator=gen) / 8,
        b=torch.randn(*lead, 48, RANK, generator=gen) / 8,
    )
    counts, eight = [1, 0, 6, 2], torch.float8_e4m3fn
    args = (inputs["x"], qdata, scale, MXFP4, *([offsets(counts)] if grouped else []))
    verb = ops.lora_grouped_mm if grouped else ops.lora_matmul
    grad = eight if grouped else torch.float8_e5m2
    y = verb(*args, inputs["a"], inputs["b"], S, compute_dtype=eight, grad_compute_dtype=grad)
    exact = doubled(inputs)
    if grouped:
        expected = grouped_float64(exact["x"], w, counts, None, True, exact["a"], exact["b"])
    else:
        expected = exact["x"] @ (w + S * exact["b"] @ exact["a"]).mT
    assert 1e-2 < relative_error(y, expected) < 4e-2
    dy = torch.randn(9, 48, generator=gen).bfloat16()
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    wanted = torch.autograd.grad(expected, list(exact.values()), dy.double())
    assert 1e-2 < relative_error(grads[0], wanted[0]) < 8e-2
    check(grads[1], wanted[1], 1e-2, "a")
    check(grads[2], wanted[2], 1e-2, "b")


@each_direction
@pytest.mark.parametrize("ordered", [True, False], ids=["order", "grouped"])
@pytest.mark.parametrize(
    "routing", ["even", "ragged", "first_and_last_empty", "one_expert", "rows_behind"]
)
@pytest.mark.parametrize("strategy", ["fused8", "unpack8"])
def test_eight_bit_compute_of_groups(strategy, routing, ordered, transpose_weight):
    """Both ways round, the gradient too; the adapters' own gradients are not rounded to 8 bits."""
    counts, behind = ROUTINGS[routing]
    n, n_rows = 48, sum(counts) + behind
    (qdata, scale, _), w = weight(MXFP4, E, n=n)
    reduced, columns = (K, n) if transpose_weight else (n, K)
    gen = torch.manual_seed(0)
    order = torch.randperm(n_rows, generator=gen) if ordered else None
    inputs = leaves(
        "cpu",
        x=torch.randn(n_rows // 2 if ordered else n_rows, reduced, generator=gen).bfloat16(),
        a=torch.randn(E, RANK, K, generator=gen) / 8,
        b=torch.randn(E, n, RANK, generator=gen) / 8,
    )
    eight = torch.float8_e4m3fn
    y = ops.lora_grouped_mm(
        inputs["x"], qdata, scale, MXFP4, offsets(counts), inputs["a"], inputs["b"], S, order=order,
        transpose_weight=transpose_weight, strategy=strategy, compute_dtype=eight, grad_compute_dtype=eight,
    )  # fmt: skip
    exact = doubled(inputs)
    a, b = exact["a"], exact["b"]
    expected = grouped_float64(exact["x"], w, counts, order, transpose_weight, a, b)
    assert 1e-2 < relative_error(y, expected) < 4e-2
    assert y[sum(counts) :].eq(0).all()
    dy = torch.randn(n_rows, columns, generator=gen).bfloat16()
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    wanted = torch.autograd.grad(expected, list(exact.values()), dy.double())
    assert 1e-2 < relative_error(grads[0], wanted[0]) < 4e-2
    check(grads[1], wanted[1], 1e-2, "a")
    check(grads[2], wanted[2], 1e-2, "b")


# --- what is computed and kept --------------------------------------------------------------------


def lora_inputs(grouped=True, needs="x a b bias"):
    lead = (E,) if grouped else ()
    packed, _ = weight(MXFP4, *lead)
    tensors = dict(
        x=randn(9, K), a=randn(*lead, RANK, K, seed=3), b=randn(*lead, N, RANK, seed=4),
        bias=randn(*lead, N, seed=2),
    )  # fmt: skip
    for name in needs.split():
        tensors[name].requires_grad_()
    return packed, tensors


def lora(packed, t, grouped=True, **kwargs):
    offs = (offsets([1, 0, 6, 2]),) if grouped else ()
    verb = ops.lora_grouped_mm if grouped else ops.lora_matmul
    return verb(
        t["x"], *packed[:2], MXFP4, *offs, t["a"], t["b"], S, bias=t["bias"],
        per_tensor_scale=packed[2], **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
@pytest.mark.parametrize("needs", ["x", "a", "b", "bias", "a b", "x bias"])
def test_only_what_is_asked_for(grouped, needs):
    """The others' gradients stay None, x is kept for ``a`` alone, and the weight is kept by reference."""
    packed, everything = lora_inputs(grouped)
    lora(packed, everything, grouped).sum().backward()
    packed, t = lora_inputs(grouped, needs)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = lora(packed, t, grouped)
    addresses = [k.data_ptr() for k in kept]
    assert packed[0].data_ptr() in addresses
    assert (t["x"].data_ptr() in addresses) == ("a" in needs.split())
    assert all(k.numel() <= max(x.numel() for x in (*t.values(), packed[0])) for k in kept)
    y.sum().backward()
    for name, tensor in t.items():
        assert (tensor.grad is not None) == (name in needs.split())
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, everything[name].grad)


def test_h_has_no_gradient():
    packed, t = lora_inputs(grouped=False)
    args = (
        t["bias"],
        t["a"],
        t["b"],
        None,
        None,
        S,
        "mxfp4",
        True,
        "auto",
        "",
        "",
        DEFAULT_SCRATCH,
    )
    y, h = OPS.mm(t["x"], *packed, *args)
    assert y.requires_grad and not h.requires_grad
    assert torch.equal(h, t["x"].detach() @ t["a"].detach().mT)
    y, h = OPS.mm(t["x"], *packed, None, None, None, *args[3:])
    assert h.shape == (0,)


def test_gradients_lie_as_the_adapters_do():
    for transpose_weight in (True, False):
        packed, t = lora_inputs(needs="a b")
        t |= dict(x=randn(9, K if transpose_weight else N), bias=None)
        lora(packed, t, transpose_weight=transpose_weight).sum().backward()
        assert t["a"].grad.stride() == t["a"].stride()
        assert t["b"].grad.stride() == t["b"].stride()


def test_operands_of_any_strides():
    packed, t = lora_inputs()
    reference_y = lora(packed, t)
    dy = randn(1, N, seed=5).expand(9, -1)
    grads = torch.autograd.grad(reference_y, [t["x"], t["a"], t["b"]], dy.contiguous())
    odd = dict(
        x=t["x"].detach().t().contiguous().t().requires_grad_(),
        a=t["a"].detach().mT.contiguous().mT.requires_grad_(),
        b=torch.cat([t["b"].detach()] * 2, 2)[..., :RANK].requires_grad_(),
        bias=t["bias"].detach().repeat(1, 2)[:, :N],
    )
    for strategy in ("auto", "unpack"):
        y = lora(packed, odd, strategy=strategy)
        check(y, reference_y.double(), 1e-6, "y")
        for got, want in zip(
            torch.autograd.grad(y, [odd["x"], odd["a"], odd["b"]], dy), grads, strict=True
        ):
            check(got, want.double(), 1e-6, "gradient")


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
def test_second_derivatives(grouped):
    """A gradient penalty: with respect to dy where the adapters are frozen, refused where they are not."""
    packed, t = lora_inputs(grouped, "x bias")
    y = lora(packed, t, grouped)
    dy = randn(*y.shape, seed=5).requires_grad_()
    dx, dbias = torch.autograd.grad(y, [t["x"], t["bias"]], dy, create_graph=True)
    ddx, ddbias = randn(*dx.shape, seed=6), randn(*dbias.shape, seed=7)
    (ddy,) = torch.autograd.grad([dx, dbias], dy, [ddx, ddbias], retain_graph=True)
    assert torch.equal(ddy, lora(packed, t | dict(x=ddx, bias=ddbias), grouped))
    (ddy,) = torch.autograd.grad(dbias, dy, ddbias)
    assert torch.equal(ddy, lora(packed, t | dict(x=0 * ddx, bias=ddbias), grouped))
    packed, t = lora_inputs(grouped, "x a")
    (dx,) = torch.autograd.grad(lora(packed, t, grouped), t["x"], dy, create_graph=True)
    with pytest.raises(NotImplementedError, match="freeze them"):
        dx.sum().backward()
    y = randn(4, K).requires_grad_()
    out = ops.combine(y, torch.ones(2, 2), torch.arange(4))
    dout = torch.ones_like(out).requires_grad_()
    (grad,) = torch.autograd.grad(out, y, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
def test_under_autocast(grouped):
    packed, t = lora_inputs(grouped)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(packed, t, grouped)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in t.values()} == {torch.float32}
    assert torch.equal(y, lora(packed, t | dict(x=t["x"].bfloat16()), grouped))
