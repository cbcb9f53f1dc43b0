"""mm and its verbs: strategies, the unpack strategy's kernels, compilation, and what is refused."""

import pytest
import torch
from _grids import assert_close, assert_same_bytes, randn, refusals, relative_error
from expecttest import assert_expected_inline
from test_packed_mm import (
    RANK,
    E,
    K,
    N,
    S,
    each_direction,
    each_format,
    lora_inputs,
    offsets,
    weight,
)
from torch.library import opcheck

from torchao_mx import MXFP4, NVFP4, QuantizeSpec, ops, reference
from torchao_mx.ops.core.operands import Packed
from torchao_mx.ops.moe import narrow
from torchao_mx.ops.moe.group_sum import group_outer_op
from torchao_mx.ops.packed_mm import epilogue, strategy, unpack
from torchao_mx.ops.packed_mm import op as mm
from torchao_mx.ops.packed_mm.strategy import DEFAULT_SCRATCH, choose_strategy

OPS = torch.ops.torchao_mx


# --- choosing and slicing -------------------------------------------------------------------------


def test_choosing_a_strategy(monkeypatch):
    tables = {True: strategy.Crossover(100, 70, 30), False: strategy.Crossover(50, 40, 20)}
    monkeypatch.setattr(strategy, "HOPPER_CROSSOVER", tables[True])
    monkeypatch.setattr(strategy, "PORTABLE_CROSSOVER", tables[False])
    bf16, cpu, cuda = torch.bfloat16, torch.device("cpu"), torch.device("cuda", 0)
    for hopper, (over_k, over_n, dense) in tables.items():
        assert choose_strategy("auto", "", cuda, bf16, dense - 1, None, hopper) == "fused"
        assert choose_strategy("auto", "", cuda, bf16, dense, None, hopper) == "unpack"
        for over, rows in ((True, over_k), (False, over_n)):
            assert choose_strategy("auto", "", cuda, bf16, 4 * rows - 1, 4, hopper, over) == "fused"
            assert choose_strategy("auto", "", cuda, bf16, 4 * rows, 4, hopper, over) == "unpack"
    assert choose_strategy("fused", "", cuda, bf16, 400, 4) == "fused"
    assert choose_strategy("unpack", "", cuda, bf16, 1, 4) == "unpack"
    assert choose_strategy("auto", "", cuda, torch.float32, 10_000, 4) == "fused"
    assert choose_strategy("auto", "", cuda, torch.float32, 10_000, None) == "unpack"
    assert choose_strategy("auto", "float8_e4m3fn", cuda, bf16, 1, 4) == "unpack8"
    fp8_rows = [("fused8", 1), ("fused8", 4 * 1535), ("unpack8", 4 * 1536)]
    for wanted, n_rows in fp8_rows:
        args = ("auto", "float8_e4m3fn", cuda, bf16, n_rows, 4, True, False)
        assert choose_strategy(*args) == wanted
    assert choose_strategy("unpack8", "float8_e4m3fn", cuda, bf16, 1, 4, True) == "unpack8"
    assert choose_strategy("auto", "float8_e5m2", cuda, bf16, 1, None, True) == "unpack8"
    assert choose_strategy("fused", "", cpu, bf16, 1, None) == "reference"
    with pytest.raises(ValueError, match="strategy='fused'"):
        choose_strategy("unpack", "", cuda, torch.float16, 1, 4)


def test_slices_cover_the_columns_within_the_scratch():
    for columns in (1, 8, 44, 127, 128, 5760):
        for per_column in (2, 1000):
            for max_bytes in (1, 9000, 130_000, 10**7):
                parts = list(unpack.slices(columns, per_column, 8, max_bytes))
                assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])]
                assert parts[-1][1] == columns
                widths = [end - first for first, end in parts]
                assert all(w % 8 == 0 for w in widths[:-1])
                assert max(widths) * per_column <= max_bytes or max(widths) <= 8


# --- the kernels of the unpack strategy -----------------------------------------------------------


@each_format
@pytest.mark.parametrize("columns", [64, 4096], ids=["short_rows", "long_rows"])
def test_decode_into(fmt, columns, kernel_device, poisoned):
    """Into rows with room behind, from slices along N and K."""
    w = randn(3, 20, columns, seed=1)
    pts = ops.per_tensor_scale(w, fmt, True) if fmt.has_per_tensor_scale else None
    packed = Packed(*ops.quantize(w, fmt, per_tensor_scale=pts), pts, fmt)
    for part in (packed, packed.slice_n(3, 20), packed.slice_k(32, 64)):
        there = Packed(*[None if t is None else t.to(kernel_device) for t in part[:3]], fmt)
        wide = torch.empty(3, part.n, part.k + 8, device=kernel_device)
        behind = wide[..., part.k :].clone()
        unpack._decode_into_triton(wide[..., : part.k], there)
        expected = reference.dequantize(part.qdata, part.scale, fmt, torch.float32, -1, pts)
        assert torch.equal(wide[..., : part.k].cpu(), expected)
        assert torch.equal(wide[..., part.k :].view(torch.int32), behind.view(torch.int32))


def test_decode_into_leaves_experts_without_rows_alone(kernel_device):
    packed = Packed(*ops.quantize(randn(4, 20, 64), MXFP4), None, MXFP4)
    there = packed._replace(
        qdata=packed.qdata.to(kernel_device), scale=packed.scale.to(kernel_device)
    )
    out = torch.full((4, 20, 64), float("nan"), device=kernel_device)
    offs = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=kernel_device)
    unpack._decode_into_triton(out, there, offs)
    expected = reference.dequantize(packed.qdata, packed.scale, MXFP4, torch.float32, -1, None)
    expected[[0, 2]] = float("nan")
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ordered", [True, False], ids=["order", "grouped"])
@pytest.mark.parametrize("extras", [True, False], ids=["h_and_one", "alone"])
def test_wide_rows(ordered, extras, kernel_device, poisoned):
    x, h = randn(6, 20), randn(12 if ordered else 6, RANK, seed=1) if extras else None
    order = torch.randperm(12, generator=torch.manual_seed(0)).int() if ordered else None
    args = (order, 2, h, extras)
    there = [t.to(kernel_device) if isinstance(t, torch.Tensor) else t for t in (x, *args)]
    rows = unpack._wide_rows_triton(*there, n_rows=12 if ordered else 6, depth=32)
    assert torch.equal(rows.cpu(), unpack._wide_rows(x, *args, 32))


@pytest.mark.parametrize("end", [0, 5, 16, 17, 40])
def test_zero_unassigned(end, kernel_device):
    y = torch.full((40, 1100), float("nan"), device=kernel_device)
    epilogue._zero_unassigned_triton(
        y, torch.tensor([0, end], dtype=torch.int32, device=kernel_device)
    )
    assert y[:end].isnan().all() and y[end:].eq(0).all()


# --- the kernels of all files together -----------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fused", "unpack"])
@pytest.mark.parametrize("ordered", [True, False], ids=["order", "grouped"])
@each_direction
def test_kernels_in_the_interpreter(strategy, ordered, transpose_weight, monkeypatch):
    """The op as it runs on a GPU, its grouped kernels interpreted, against the reference."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process, not interpreted")
    packed, t = lora_inputs(needs="x a b bias")
    columns = N if transpose_weight else K
    t |= dict(
        x=randn(6 if ordered else 12, K if transpose_weight else N).requires_grad_(),
        bias=randn(E, columns, seed=2).requires_grad_(),
    )
    order = torch.randperm(12, generator=torch.manual_seed(0)) if ordered else None
    dy = randn(12, columns, seed=5)

    def run(strategy):
        y = ops.lora_grouped_mm(
            t["x"], *packed[:2], MXFP4, offsets([1, 0, 6, 2]), t["a"], t["b"], S, order=order,
            bias=t["bias"], transpose_weight=transpose_weight, strategy=strategy,
        )  # fmt: skip
        return y, *torch.autograd.grad(y, list(t.values()), dy)

    expected = run("auto")
    monkeypatch.setattr(mm, "choose_strategy", lambda *args: strategy)
    monkeypatch.setattr(mm, "rows_functions", lambda x: narrow)
    for got, want in zip(run(strategy), expected, strict=True):
        assert relative_error(got, want) < 1e-5


def test_a_per_tensor_scale_for_all_experts():
    """0-d, or expanded: one number in memory."""
    (qdata, scale, _), _ = weight(NVFP4, E)
    x, offs, one = randn(9, K), offsets([1, 0, 6, 2]), torch.tensor(0.37)
    results = [
        ops.grouped_mm(x, qdata, scale, NVFP4, offs, per_tensor_scale=pts, strategy=strategy)
        for pts in (one, one.expand(E, 1, 1), one.repeat(E, 1, 1))
        for strategy in ("auto", "unpack")
    ]
    for y in results[1:]:
        assert relative_error(y, results[0]) < 1e-6


@pytest.mark.parametrize(
    ("sizes", "n_rows"),
    [((3, 0, 14, 1), 18), ((3, 0, 8, 1), 18), ((0, 0, 0, 0), 18), ((0, 0, 0, 0), 0)],
    ids=["ragged", "rows_behind", "rows_behind_all", "no_rows"],
)
@pytest.mark.parametrize("strided", [False, True])
def test_group_outer(sizes, n_rows, strided, device):
    """A weight's gradient: each expert's rows alone, wherever its groups end, of rows of any strides."""
    dtype, n = (torch.bfloat16 if device == "cuda" else torch.float32), 48
    dy, x = (randn(n_rows, columns, seed=columns).to(device, dtype) for columns in (n, K))
    if strided:
        dy, x = dy.t().contiguous().t(), torch.cat([x, x], 1)[:, 1 : K + 1]
    offs = offsets(sizes)
    dw = group_outer_op(dy, x, offs.to(device), torch.float32)
    assert dw.shape == (E, n, K) and dw.dtype == torch.float32
    for actual, start, end in zip(dw, [0, *offs[:-1]], offs, strict=True):
        wanted = dy[start:end].double().t() @ x[start:end].double()
        if start < end:
            assert_close(actual, wanted, dtype)
        else:
            assert not actual.any()


# --- compilation ----------------------------------------------------------------------------------


def op_cases():
    for grouped in (True, False):
        for name, adapters in (("lora", True), ("plain", False)):
            packed, t = lora_inputs(grouped)
            offs = offsets([1, 0, 6, 2]) if grouped else None
            order = torch.randperm(18, generator=torch.manual_seed(0)).int() if grouped else None
            for transpose_weight in (True, False):
                down, up = (t["a"], t["b"]) if transpose_weight else (t["b"].mT, t["a"].mT)
                down, up = (down.detach().requires_grad_(), up.detach().requires_grad_())
                down, up = (down, up) if adapters else (None, None)
                x = randn(9, K if transpose_weight else N).requires_grad_()
                bias = randn(*packed[0].shape[:-2], N if transpose_weight else K).requires_grad_()
                tail = (S, "mxfp4", transpose_weight, "auto", "", "", DEFAULT_SCRATCH)
                key = f"{name}-{'grouped' if grouped else 'dense'}-{'wt' if transpose_weight else 'w'}"
                yield f"mm-{key}", OPS.mm, (x, *packed, bias, down, up, offs, order, *tail)
                n_rows, x = (18 if grouped else 9), x.detach()
                dy = randn(n_rows, bias.shape[-1], seed=5).requires_grad_()
                h = randn(n_rows, RANK) if adapters else None
                tail = (*tail[:4], "", DEFAULT_SCRATCH, True, 9, torch.float32)
                down, up = (None, None) if down is None else (down.detach(), up.detach())
                args = (dy, x if adapters else None, h, *packed, down, up, offs, order, *tail)
                yield f"mm_backward-{key}", OPS.mm_backward, args
    y, weights = randn(6, K).requires_grad_(), torch.rand(3, 2).requires_grad_()
    order = torch.tensor([3, 1, 5, 0, 2, 4], dtype=torch.int32)
    yield "combine", OPS.combine, (y, weights, order, offsets([1, 4]))
    args = (randn(3, K), y.detach(), weights.detach(), order, offsets([1, 4]))
    yield "combine_backward", OPS.combine_backward, args
    dy, x, offs = randn(18, N), randn(18, K), offsets([1, 0, 6, 2])
    yield "group_sum", OPS.group_sum, (dy, offs, torch.float64)
    yield "group_outer", OPS.group_outer, (dy, x, offs, torch.float64)


OP_CASES = {name: (op.default, args) for name, op, args in op_cases()}


@pytest.mark.parametrize("case", OP_CASES)
def test_ops_leave_their_arguments_alone(case):
    op, args = OP_CASES[case]
    tensors = [a.detach() for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    out = op(*args)
    for tensor, kept in zip(tensors, before, strict=True):
        assert_same_bytes(tensor, kept)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.numel() > 0]
    storages = {t.untyped_storage().data_ptr() for t in (*tensors, *out)}
    assert len(storages) == len({t.data_ptr() for t in tensors}) + len(out)


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck(case):
    op, args = OP_CASES[case]
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    opcheck(op, args, test_utils=utils if "mm" in case else [*utils, "test_schema"])


@pytest.mark.parametrize("strategy", ["auto", "unpack"])
def test_compiles_in_one_graph(strategy):
    (qdata, scale, _), _ = weight(MXFP4)
    packed, _ = weight(NVFP4, E)

    def run(x, a, b, a_E, b_E, bias_E, weights, order, offs):
        x = ops.matmul(x, qdata, scale, MXFP4, strategy=strategy)
        x = ops.lora_matmul(
            x, qdata, scale, MXFP4, a, b, S, transpose_weight=False, strategy=strategy
        )
        up = ops.lora_grouped_mm(
            x, *packed[:2], NVFP4, offs, a_E, b_E, S, order=order, per_tensor_scale=packed[2],
            bias=bias_E, strategy=strategy,
        )  # fmt: skip
        rows = ops.grouped_mm(
            torch.relu(up), *packed[:2], NVFP4, offs, per_tensor_scale=packed[2],
            transpose_weight=False, strategy=strategy,
        )  # fmt: skip
        return ops.combine(rows, weights, order)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    order = torch.randperm(18, generator=torch.manual_seed(0))
    results = []
    for function in (run, compiled, compiled):
        inputs = [
            randn(9, K), randn(RANK, K, seed=3), randn(N, RANK, seed=4), randn(E, RANK, K, seed=3),
            randn(E, N, RANK, seed=4), randn(E, N, seed=2), torch.rand(9, 2, generator=torch.manual_seed(1)),
        ]  # fmt: skip
        inputs = [t.requires_grad_() for t in inputs]
        out = function(*inputs, order, offsets([1, 0, 6, 2]))
        grads = torch.autograd.grad(out, inputs, randn(*out.shape, seed=5))
        results.append((out, *grads))
    for eager, *others in zip(*results, strict=True):
        assert eager.abs().sum() > 0
        assert all(torch.equal(eager, other) for other in others)


# --- what is refused ------------------------------------------------------------------------------


def test_refusals_of_grouped_operands():
    (qdata, scale, _), _ = weight(MXFP4, E)
    x, offs, order = randn(6, K), offsets([1, 2, 0, 3]), torch.arange(12)
    nvfp4, _ = weight(NVFP4, E)

    def g(x=x, qdata=qdata, scale=scale, fmt=MXFP4, offs=offs, **kwargs):
        return ops.grouped_mm(x, qdata, scale, fmt, offs, **kwargs)

    assert_expected_inline(
        refusals(
            [
                lambda: g(offs=offs.to("meta")),
                lambda: g(offs=offs.long()),
                lambda: g(offs=offs[:3]),
                lambda: g(offs=offs[None]),
                lambda: g(offs=offsets([3, -1, 0, 4])),
                lambda: g(offs=offsets([-1, 1, 0, 4])),
                lambda: g(offs=offsets([1, 2, 0, 4])),
                lambda: g(x=x[:, 1:]),
                lambda: g(x=x.double()),
                lambda: g(scale=scale[:3]),
                lambda: g(fmt="mxfp4"),
                lambda: g(x, *nvfp4[:2], NVFP4, per_tensor_scale=nvfp4[2][:2]),
                lambda: g(bias=randn(N)),
                lambda: g(bias=randn(E, K)),
                lambda: g(bias=randn(E, N).to("meta")),
                lambda: g(order=order.float()),
                lambda: g(order=order[:11]),
                lambda: g(order=order[:0]),
                lambda: g(order=order[None]),
                lambda: g(order=order.to("meta")),
                lambda: g(strategy="fastest"),
                lambda: g(strategy="unpack8"),
                lambda: g(max_scratch_bytes=0),
                lambda: g(strategy="unpack", activation=QuantizeSpec(MXFP4)),
            ]
        ),
        """\
ValueError: offs is on meta and x on cpu; move one with .to(device)
TypeError: offs has dtype torch.int64; end offsets are int32: use offs.int()
ValueError: x has shape (6, 64), the weight (4, 44, 32) (packed) and offs (3,); a grouped product takes x [R, K], a weight [E, N, K] and offs [E]
ValueError: x has shape (6, 64), the weight (4, 44, 32) (packed) and offs (1, 4); a grouped product takes x [R, K], a weight [E, N, K] and offs [E]
ValueError: offs is [3, 2, 2, 6] for 6 row(s); end offsets must ascend from 0 and not exceed the number of rows: use the cumulative sum of the experts' row counts
ValueError: offs is [-1, 0, 0, 4] for 6 row(s); end offsets must ascend from 0 and not exceed the number of rows: use the cumulative sum of the experts' row counts
ValueError: offs is [1, 3, 3, 7] for 6 row(s); end offsets must ascend from 0 and not exceed the number of rows: use the cumulative sum of the experts' row counts
ValueError: x has shape (6, 63); the weight reduces over 64 elements, which x's last axis must have
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: qdata has shape (4, 44, 32) and scale (3, 44, 2); in mxfp4 a scale covers 16 bytes of the last axis and the other axes are equal: pass the two results of one quantize
TypeError: fmt='mxfp4' is not a BlockFormat; use one from torchao_mx, such as MXFP4
ValueError: per_tensor_scale has shape (2, 1, 1); it must be 0-d, or [E, 1, 1] for x [E, M, K]: x has shape (4, 44, 32)
ValueError: bias has shape (44,); a grouped product with 4 experts of 44 columns takes a bias [4, 44]
ValueError: bias has shape (4, 64); a grouped product with 4 experts of 44 columns takes a bias [4, 44]
ValueError: bias is on meta and x on cpu; move one with .to(device)
TypeError: order has dtype torch.float32; row numbers are int32: use order.int()
ValueError: order has shape (11,) for 6 token(s); it must be [T * k], the argsort of the flattened [T, k] expert ids
ValueError: order has shape (0,) for 6 token(s); it must be [T * k], the argsort of the flattened [T, k] expert ids
ValueError: order has shape (1, 12) for 6 token(s); it must be [T * k], the argsort of the flattened [T, k] expert ids
ValueError: order is on meta and x on cpu; move one with .to(device)
ValueError: strategy='fastest'; it must be one of auto, fused, unpack, fused8, unpack8
ValueError: strategy='unpack8' with compute_dtype=None; only fused8 and unpack8 compute in torch.float8_e4m3fn: leave strategy out, or give both
ValueError: max_scratch_bytes=0; it must be a positive number, or None for the default
ValueError: strategy='unpack' with an activation; this product has only one strategy: leave strategy out""",
    )


def test_refusals_of_dense_operands():
    (qdata, scale, _), _ = weight(MXFP4)
    (qdata_E, scale_E, _), _ = weight(MXFP4, E)
    x = randn(6, K)
    spec = QuantizeSpec(MXFP4)
    assert_expected_inline(
        refusals(
            [
                lambda: ops.matmul(x, qdata, scale, MXFP4, bias=randn(K)),
                lambda: ops.matmul(x, qdata, scale, MXFP4, bias=randn(1, N)),
                lambda: ops.matmul(x, qdata, scale, MXFP4, bias=randn(N).to("meta")),
                lambda: ops.matmul(x, qdata, scale[:, :1], MXFP4),
                lambda: ops.matmul(x, qdata, scale, MXFP4, strategy="unpack", activation=spec),
                lambda: ops.matmul(randn(E, 6, K), qdata_E, scale_E, MXFP4, strategy="fused"),
                lambda: ops.matmul(x, qdata, scale, MXFP4, strategy=None),
            ]
        ),
        """\
ValueError: bias has shape (64,); the product has 44 columns and takes a bias [44]
ValueError: bias has shape (1, 44); the product has 44 columns and takes a bias [44]
ValueError: bias is on meta and x on cpu; move one with .to(device)
ValueError: qdata has shape (44, 32) and scale (44, 1); in mxfp4 a scale covers 16 bytes of the last axis and the other axes are equal: pass the two results of one quantize
ValueError: strategy='unpack' with an activation; these products have only one strategy: leave strategy out
ValueError: strategy='fused' with a batch of weights; these products have only one strategy: leave strategy out
ValueError: strategy=None; it must be one of auto, fused, unpack, fused8, unpack8""",
    )


def test_refusals_of_adapters():
    (qdata, scale, _), _ = weight(MXFP4)
    (qdata_E, scale_E, _), _ = weight(MXFP4, E)
    x, offs, eight, e5m2 = (
        randn(6, K),
        offsets([1, 2, 0, 3]),
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
    a, b = randn(RANK, K), randn(N, RANK)

    def f(a=a, b=b, s=S, x=x, **kwargs):
        return ops.lora_matmul(x, qdata, scale, MXFP4, a, b, s, **kwargs)

    def g(a, b, **kwargs):
        return ops.lora_grouped_mm(x, qdata_E, scale_E, MXFP4, offs, a, b, S, **kwargs)

    assert_expected_inline(
        refusals(
            [
                lambda: f(a.T),
                lambda: f(a, b.T),
                lambda: f(a[:2]),
                lambda: f(a[0], b[:, 0]),
                lambda: f(a[:0], b[:, :0]),
                lambda: f(randn(N + 1, K), randn(N, N + 1)),
                lambda: f(a.double()),
                lambda: f(a, b.int()),
                lambda: f(a.to("meta")),
                lambda: f(a, b.to("meta")),
                lambda: f(s=torch.tensor(2.0)),
                lambda: f(x=x.double()),
                lambda: f(x=x[:, 1:]),
                lambda: f(compute_dtype=torch.bfloat16),
                lambda: f(grad_compute_dtype=torch.float16),
                lambda: f(grad_compute_dtype=torch.bfloat16),
                lambda: f(grad_compute_dtype=e5m2),
                lambda: f(compute_dtype=eight),
                lambda: ops.lora_matmul(x, *ops.quantize(randn(N, K), NVFP4), NVFP4, a, b, S, compute_dtype=eight),
                lambda: f(strategy="unpack8"),
                lambda: f(strategy="fused", compute_dtype=eight),
                lambda: g(a, b),
                lambda: g(a.expand(3, -1, -1), b.expand(3, -1, -1)),
                lambda: g(a.expand(E, -1, -1), b.expand(E, -1, -1), compute_dtype=eight, grad_compute_dtype=e5m2),
                lambda: ops.lora_matmul(x, qdata_E, scale_E, MXFP4, a, b, S),
                lambda: ops.lora_grouped_mm(x, qdata, scale, MXFP4, offs, a, b, S),
            ],
            (TypeError, ValueError, NotImplementedError),
        ),
        """\
ValueError: lora_a has shape (64, 5) and lora_b (44, 5); a weight [44, 64] takes lora_a [r, 64] and lora_b [44, r]
ValueError: lora_a has shape (5, 64) and lora_b (5, 44); a weight [44, 64] takes lora_a [r, 64] and lora_b [44, r]
ValueError: lora_a has shape (2, 64) and lora_b (44, 5); a weight [44, 64] takes lora_a [r, 64] and lora_b [44, r]
ValueError: lora_a has shape (64,) and lora_b (44,); a weight [44, 64] takes lora_a [r, 64] and lora_b [44, r]
ValueError: the adapters have rank 0; a weight of 44 x 64 takes a rank from 1 to 44
ValueError: the adapters have rank 45; a weight of 44 x 64 takes a rank from 1 to 44
TypeError: lora_a has dtype torch.float64; adapters are bfloat16, float16 or float32: convert it with .to(torch.bfloat16)
TypeError: lora_b has dtype torch.int32; adapters are bfloat16, float16 or float32: convert it with .to(torch.bfloat16)
ValueError: lora_a is on meta and x on cpu; move one with .to(device)
ValueError: lora_b is on meta and x on cpu; move one with .to(device)
TypeError: scaling is a Tensor; it must be a Python number: use .item() once, outside the training loop, or multiply lora_b by it
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (6, 63); the weight reduces over 64 elements, which x's last axis must have
ValueError: compute_dtype=torch.bfloat16; it must be None (x's dtype) or torch.float8_e4m3fn
ValueError: grad_compute_dtype=torch.float16; it must be None or torch.bfloat16 (x's dtype), torch.float8_e4m3fn or torch.float8_e5m2
ValueError: grad_compute_dtype=torch.bfloat16 and x has dtype torch.float32; gradients have x's dtype: convert x, or leave grad_compute_dtype out
ValueError: grad_compute_dtype=torch.float8_e5m2 without a compute_dtype; give compute_dtype=torch.float8_e4m3fn too
TypeError: x has dtype torch.float32; the 8-bit GEMMs return bfloat16: use x.bfloat16(), or leave compute_dtype out
ValueError: compute_dtype=torch.float8_e4m3fn with a weight in nvfp4; only MXFP4 weights convert to e4m3 without loss: leave compute_dtype out, or use MXFP4
ValueError: strategy='unpack8' with compute_dtype=None; only fused8 and unpack8 compute in torch.float8_e4m3fn: leave strategy out, or give both
ValueError: strategy='fused' with compute_dtype=torch.float8_e4m3fn; only fused8 and unpack8 compute in torch.float8_e4m3fn: leave strategy out, or give both
ValueError: lora_a has shape (5, 64) and lora_b (44, 5); a weight [4, 44, 64] takes lora_a [4, r, 64] and lora_b [4, 44, r]
ValueError: lora_a has shape (3, 5, 64) and lora_b (3, 44, 5); a weight [4, 44, 64] takes lora_a [4, r, 64] and lora_b [4, 44, r]
ValueError: grad_compute_dtype=torch.float8_e5m2 with experts; torch._scaled_grouped_mm takes only e4m3: use torch.float8_e4m3fn, or leave grad_compute_dtype out
ValueError: the weight has shape (4, 44, 32) (packed); lora_matmul takes W [N, K]: for experts use lora_grouped_mm
ValueError: x has shape (6, 64), the weight (44, 32) (packed) and offs (4,); a grouped product takes x [R, K], a weight [E, N, K] and offs [E]""",
    )  # fmt: skip


def test_refusals_of_combine():
    y, weights, order = randn(6, K), torch.rand(3, 2), torch.arange(6)
    c = ops.combine
    assert_expected_inline(
        refusals(
            [
                lambda: c(y[:5], weights, order),
                lambda: c(y, weights.flatten(), order),
                lambda: c(y.double(), weights, order),
                lambda: c(y, weights.int(), order),
                lambda: c(y, weights.to("meta"), order),
                lambda: c(y, weights, order.float()),
                lambda: c(y, weights, torch.arange(9)),
                lambda: c(y, weights, torch.arange(5)),
                lambda: c(y[:0], weights[:, :0], order[:0]),
            ]
        ),
        """\
ValueError: y has shape (5, 64) and weights (3, 2); they must be [T * k, C] and [T, k], k at least 1
ValueError: y has shape (6, 64) and weights (6,); they must be [T * k, C] and [T, k], k at least 1
TypeError: y has dtype torch.float64 and weights torch.float32; both must be bfloat16, float16 or float32: convert them
TypeError: y has dtype torch.float32 and weights torch.int32; both must be bfloat16, float16 or float32: convert them
ValueError: weights is on meta and x on cpu; move one with .to(device)
TypeError: order has dtype torch.float32; row numbers are int32: use order.int()
ValueError: order has shape (9,) and y (6, 64); order needs one number per row
ValueError: order has shape (5,) for 3 token(s); it must be [T * k], the argsort of the flattened [T, k] expert ids
ValueError: y has shape (0, 64) and weights (3, 0); they must be [T * k, C] and [T, k], k at least 1""",
    )
