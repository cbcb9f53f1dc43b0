"""Products with x rounded to fp8 by rows, against their definition and against float64.

There is no fp8 GEMM on the CPU: there, that one product is emulated in fp32 and everything around it runs in
Triton's interpreter.
"""

import pytest
import torch
import triton.language as tl
from _fp8_operands import (
    E4M3,
    E5M2,
    ENDS,
    ROWS,
    E,
    K,
    N,
    call,
    dense,
    each_direction,
    exact,
    expected,
    in_float64,
    operands,
    packed,
    randn,
)
from _grids import assert_same_bytes, generator, refusals, relative_error
from expecttest import assert_expected_inline

from torchao_mx.ops.packed_mm.fp8 import product as _fp8
from torchao_mx.reference import fp8 as definition

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


# --- the whole ------------------------------------------------------------------------------------


def emulated(x8, w8, x_scale, w_scale, offs):
    """The GEMM in fp32; rows of nobody are left as NaN."""
    y, start = torch.full((x8.shape[0], w8.shape[1]), torch.nan), 0
    for e, end in enumerate([x8.shape[0]] if offs is None else offs.tolist()):
        y[start:end] = (x8[start:end].float() @ w8[e].float().t()) * w_scale[e]
        start = end
    return y * x_scale[:, None]


@pytest.fixture
def run(kernel_device, monkeypatch):
    """``run(args, transpose_weight, scratch)`` through the launches, on the CPU in fp32."""

    everything = _fp8.MAX_SCRATCH_BYTES

    def on_device(args, transpose_weight, scratch=everything, kind="float8_e4m3fn"):
        there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        return call(_fp8.fp8_product, there, transpose_weight, kind, scratch, packed=True).cpu()

    def interpreted(args, transpose_weight, scratch=everything, kind="float8_e4m3fn"):
        rest = (_fp8.KINDS[kind], scratch, tl.float32)
        return call(_fp8._product_on_gpu, args, transpose_weight, *rest, fmt=None)

    if kernel_device == "cuda":
        return on_device
    monkeypatch.setattr(_fp8, "_scaled_product", emulated)
    return interpreted


def arguments(kernel_device, *args, **kwargs):
    return operands(
        *args, dtype=torch.bfloat16 if kernel_device == "cuda" else torch.float32, **kwargs
    )


# bf16: rounded twice, before and after the low-rank term.
TOLERANCE = {"cuda": 4e-3, "cpu": 1e-5}


@each_direction
@pytest.mark.parametrize("powers", [0, 20], ids=["fits", "spread"])
@pytest.mark.parametrize("scratch", [2**28, 1], ids=["at_once", "in_parts"])
@pytest.mark.parametrize("top_k", [1, 4])
def test_product(kernel_device, run, transpose_weight, powers, scratch, top_k):
    a = arguments(kernel_device, transpose_weight, powers=powers, top_k=top_k)
    want = expected(a, transpose_weight)
    y = run(a, transpose_weight, scratch)
    assert relative_error(y, want) < TOLERANCE[kernel_device]
    assert (y[ENDS[-1] :] == 0).all()
    if kernel_device == "cuda":
        assert torch.equal(y, run(a, transpose_weight, scratch))


@each_direction
@pytest.mark.parametrize("terms", ["none", "lora", "bias"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
def test_product_without_some_terms(kernel_device, run, transpose_weight, terms, grouped):
    a = arguments(kernel_device, transpose_weight)
    a = a if grouped else dense(a)
    if terms != "lora":
        a["h"] = a["up"] = None
    if terms != "bias":
        a["bias"] = None
    want = expected(a, transpose_weight)
    for scratch in (2**28, 1):
        assert relative_error(run(a, transpose_weight, scratch), want) < TOLERANCE[kernel_device]


@each_direction
def test_a_dense_product_may_have_e5m2_rows(kernel_device, run, transpose_weight):
    a = dense(arguments(kernel_device, transpose_weight, powers=20))
    want = expected(a, transpose_weight, E5M2)
    y = run(a, transpose_weight, kind="float8_e5m2")
    assert relative_error(y, want) < TOLERANCE[kernel_device]


@each_direction
def test_operands_that_are_views(kernel_device, run, transpose_weight):
    a = arguments(kernel_device, transpose_weight)
    want = expected(a, transpose_weight)
    a["x"] = a["x"].t().contiguous().t()
    a["qdata"] = torch.cat([a["qdata"], a["qdata"]], -1)[..., : K // 2]
    a["scale"] = torch.cat([a["scale"].view(torch.uint8)] * 2, -1)[..., : K // 32].view(
        torch.float8_e8m0fnu
    )
    assert relative_error(run(a, transpose_weight), want) < TOLERANCE[kernel_device]


@each_direction
@pytest.mark.parametrize("ends", [[0] * E, [0, 0, 0, 0, 97], [97] * E, [1, 2, 3, 4, 5]], ids=str)
def test_lopsided_groups(kernel_device, run, transpose_weight, ends):
    a = arguments(kernel_device, transpose_weight, powers=20)
    a["offs"] = torch.tensor(ends, dtype=torch.int32)
    y, want = run(a, transpose_weight), expected(a, transpose_weight)
    assert (y[ends[-1] :] == 0).all()
    if ends[-1]:
        assert relative_error(y, want) < TOLERANCE[kernel_device]


@each_direction
def test_rows_that_are_not_finite_stay_alone(kernel_device, run, transpose_weight):
    a = arguments(kernel_device, transpose_weight, powers=20)
    a["x"][30, 5], a["x"][40, 6], a["x"][50, 7] = torch.nan, torch.inf, -torch.inf
    y, bad = run(a, transpose_weight), torch.zeros(ROWS, dtype=torch.bool)
    bad[[30, 40, 50]] = True
    assert not y[bad].isfinite().any() and y[~bad].isfinite().all()


def test_no_rows(kernel_device, run):
    a = {**arguments(kernel_device, True), "n_rows": 0, "offs": torch.zeros(E, dtype=torch.int32)}
    a["x"], a["h"] = a["x"][:0], a["h"][:0]
    assert run(a, True).shape == (0, N)


@pytest.mark.gpu
@each_direction
def test_product_past_one_tile(transpose_weight):
    """Shapes near a layer's, several tiles along every axis, a flagged expert, against float64."""
    e, n, k, tokens, top_k = 8, 768, 1056, 1000, 4
    reduced, columns = (k, n) if transpose_weight else (n, k)
    qdata, scale = packed(e, n, k)
    wide = packed(n, k, powers=20)
    qdata[3], scale.view(torch.uint8)[3] = wide[0], wide[1].view(torch.uint8)
    rows = tokens * top_k
    a = dict(
        x=randn(tokens, reduced, dtype=torch.bfloat16),
        qdata=qdata, scale=scale, order=torch.randperm(rows, generator=generator(6)).int(),
        offs=torch.tensor([500, 500, 1700, 2100, 2101, 2200, 3500, 3990], dtype=torch.int32),
        top_k=top_k, n_rows=rows, h=randn(rows, 16, seed=3, dtype=torch.bfloat16),
        up=randn(e, columns, 16, seed=4), scaling=0.5, bias=randn(e, columns, seed=5),
    )  # fmt: skip
    want = expected(a, transpose_weight)
    there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in a.items()}
    for scratch in (2**28, 2**20):
        y = call(
            _fp8.fp8_product, there, transpose_weight, "float8_e4m3fn", scratch, packed=True
        ).cpu()
        assert relative_error(y, want) < 4e-3
        assert (y[3990:] == 0).all()


# --- accuracy, measured ---------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(E4M3, 0.025, 0.027), (E5M2, 0.050, 0.054)], ids=["e4m3", "e5m2"]
)
def test_error_on_gaussians(transpose_weight, dtype, low, high):
    """Root mean square over the result's, as fp8_product's docstring states it."""
    n, k, rows = 512, 1024, 256
    a = dict(
        x=randn(rows, k if transpose_weight else n), offs=None, order=None, top_k=1, n_rows=rows
    )
    a.update(h=None, up=None, scaling=0.0, bias=None)
    a["qdata"], a["scale"] = packed(n, k)
    y = expected(a, transpose_weight, dtype)
    x, w = a["x"].double(), exact(a["qdata"], a["scale"]).double()
    error = relative_error(y, x @ (w.mT if transpose_weight else w))
    assert low < error < high


@each_direction
def test_only_rounding_x_costs_accuracy(transpose_weight):
    """With rows that fp8 holds, the reference equals float64 to fp32 accuracy, flagged columns and all."""
    a = operands(transpose_weight, powers=20)
    a["x"] = a["x"].to(E4M3).float()
    a["x"][:, 0] = 448.0
    assert relative_error(expected(a, transpose_weight), in_float64(a, transpose_weight)) < 1e-6


@each_direction
def test_flagged_columns_see_x_unrounded(transpose_weight):
    a = operands(transpose_weight, powers=20)
    fits = definition.fits_fp8(a["qdata"], a["scale"], transpose_weight)
    if not transpose_weight:
        fits = fits.repeat_interleave(32, -1)
    y, want = expected(a, transpose_weight), in_float64(a, transpose_weight)
    mine = slice(ENDS[2], ENDS[3])  # the fourth expert's rows
    assert (~fits[3]).any()
    assert relative_error(y[mine][:, ~fits[3]], want[mine][:, ~fits[3]]) < 1e-6
    if fits[3].any():
        assert relative_error(y[mine][:, fits[3]], want[mine][:, fits[3]]) > 1e-3


def test_the_verb_on_the_cpu_is_the_reference():
    a = operands(True, dtype=torch.bfloat16, powers=20, top_k=4)
    y = call(_fp8.fp8_product, a, True, packed=True)
    assert y.dtype == torch.bfloat16
    assert_same_bytes(y, expected(a, True))
    assert_same_bytes(call(_fp8.fp8_product, a, True, "float8_e4m3fn", 1, packed=True), y)


# --- scratch and refusals -------------------------------------------------------------------------


def test_scratch_is_bounded_in_equal_parts():
    parts = _fp8.columns_at_a_time
    assert parts(128, 1024, 2048, 2**28) == 1024  # exactly 256 MiB
    assert parts(32, 5760, 2880, 2**28) == 2880
    assert parts(1, 80, 96, 2**28) == 80
    assert parts(5, 80, 96, 1) == 32
    for experts, columns, reduced in ((7, 4096, 1000), (3, 14336, 4096), (64, 2912, 992)):
        for bound in (2**20, 2**24, 2**26):
            width = parts(experts, columns, reduced, bound)
            assert width == columns or width % 32 == 0
            assert experts * reduced * width <= max(bound, experts * reduced * 32)


def test_refusals():
    a = operands(True, dtype=torch.bfloat16)
    odd = {**a, "qdata": a["qdata"][:, :72], "scale": a["scale"][:, :72]}

    def product(args):
        return call(_fp8.fp8_product, args, True, packed=True)

    calls = [
        lambda: product({**a, "x": a["x"].float()}),
        lambda: product(odd),
    ]
    errors = (TypeError, ValueError, NotImplementedError)
    assert_expected_inline(
        refusals(calls, errors),
        """\
TypeError: x has dtype torch.float32; the 8-bit GEMMs return bfloat16: use x.bfloat16(), or leave compute_dtype out
ValueError: the weight has N=72 rows, but the 8-bit GEMMs need a multiple of 16 along every axis: pad the weight, or leave compute_dtype out""",
    )
