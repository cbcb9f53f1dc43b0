"""Hopper's product with weights decoded to e4m3 in registers, against its definition."""

import pytest
import torch
from _fp8_operands import (
    E4M3,
    ENDS,
    ROWS,
    E,
    call,
    dense,
    each_direction,
    expected,
    operands,
    packed,
    randn,
    rows_and_added,
)
from _grids import generator, relative_error

from torchao_mx import MXFP4, ops
from torchao_mx.ops.packed_mm.fp8 import kernels
from torchao_mx.ops.packed_mm.fp8 import lowered as _fp8_lowered
from torchao_mx.ops.packed_mm.fp8 import product as _fp8
from torchao_mx.ops.packed_mm.hopper import product as _hopper
from torchao_mx.reference import fp8 as definition

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper", "rare_spreads")]
BF16 = torch.bfloat16
TILES = [
    (16, 128, 5, 1, 4, None),
    (32, 128, 5, 1, 4, None),
    (64, 128, 4, 1, 4, 168),
    (64, 128, 4, 2, 4, 168),
    (128, 128, 3, 2, 4, None),
    (128, 128, 4, 2, 4, None),
    (128, 256, 4, 2, 8, None),
    (256, 128, 4, 2, 8, None),
]


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")


@pytest.fixture
def rare_spreads(monkeypatch):
    """The definition, for blocks that lie more than 11 powers of two apart in a row."""
    monkeypatch.setattr(definition, "MAX_SPREAD", 11)


def on_gpu(args):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def product(args, transpose_weight):
    rest = ("float8_e4m3fn", _fp8.MAX_SCRATCH_BYTES, True)
    return call(_fp8.fp8_product, on_gpu(args), transpose_weight, *rest, packed=True).cpu()


def kernel(args, transpose_weight, tile):
    """The fused kernel with a tile, and the flagged columns."""
    a = on_gpu(args)
    lower = _fp8_lowered.lowered_rows if transpose_weight else _fp8_lowered.lowered_columns
    lowered, w_scale, flags = lower(a["qdata"], a["scale"])
    x = kernels.permuted_rows(a["x"], "halves" if transpose_weight else "pairs")
    rows, added = rows_and_added(a)
    y = _hopper.hopper_fp8_product(
        *x, a["qdata"], lowered, w_scale, rows, transpose_weight, added, tile
    )
    return y.cpu(), flags.cpu()


@pytest.mark.parametrize("powers", [0, 11, 20])
@pytest.mark.parametrize("top_k", [1, 4])
@each_direction
def test_product(powers, top_k, transpose_weight):
    args = operands(transpose_weight, dtype=BF16, powers=powers, top_k=top_k)
    y = product(args, transpose_weight)
    assert relative_error(y, expected(args, transpose_weight)) < 4e-3
    assert y[ENDS[-1] :].eq(0).all()
    assert torch.equal(y, product(args, transpose_weight))


@pytest.mark.parametrize("terms", ["none", "lora", "bias"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
@each_direction
def test_without_some_terms(terms, grouped, transpose_weight):
    args = operands(transpose_weight, dtype=BF16)
    args = args if grouped else dense(args)
    if terms != "lora":
        args.update(h=None, up=None)
    if terms != "bias":
        args.update(bias=None)
    y = product(args, transpose_weight)
    assert relative_error(y, expected(args, transpose_weight)) < 4e-3


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k", [32, 64, 96, 128, 160, 1024, 2880])
@pytest.mark.parametrize("n", [16, 144, 256])
@each_direction
def test_tiles_and_shapes(tile, k, n, transpose_weight):
    """Rows of x, of W and of K that are no whole tiles; several tiles an expert."""
    sizes = torch.tensor([0, 1, 130, 17, 64])
    rows, rank = int(sizes.sum()) + 3, 20
    reduced, columns = (k, n) if transpose_weight else (n, k)
    qdata, scale = packed(E, n, k, powers=3)
    args = dict(
        x=randn(rows, reduced, dtype=BF16), qdata=qdata, scale=scale, offs=sizes.cumsum(0).int(), order=None,
        top_k=1, n_rows=rows, h=randn(rows, rank, seed=3, dtype=BF16), up=randn(E, columns, rank, seed=4),
        scaling=0.5, bias=randn(E, columns, seed=5),
    )  # fmt: skip
    y, flags = kernel(args, transpose_weight, tile)
    assert flags.eq(0).all()
    assert relative_error(y, expected(args, transpose_weight)) < 4e-3


@each_direction
def test_a_code_at_each_place(transpose_weight):
    """x is the identity: no element may be taken for another."""
    n, k = 256, 384
    codes = torch.randint(0, 16, (1, n, k), dtype=torch.uint8, generator=generator(7))
    qdata = codes[..., ::2] | codes[..., 1::2] << 4
    scale = torch.randint(124, 131, (1, n, k // 32), dtype=torch.uint8, generator=generator(8))
    scale = scale.view(torch.float8_e8m0fnu)
    rows = k if transpose_weight else n
    args = dict(
        x=torch.eye(rows, dtype=BF16), qdata=qdata, scale=scale, offs=torch.tensor([rows], dtype=torch.int32),
        order=None, top_k=1, n_rows=rows, h=None, up=None, scaling=1.0, bias=None,
    )  # fmt: skip
    want = ops.dequantize(qdata, scale, MXFP4, dtype=torch.float32)[0]
    want = want.T if transpose_weight else want
    for tile in TILES:
        y, flags = kernel(args, transpose_weight, tile)
        assert flags.eq(0).all()
        assert torch.equal(y.float(), want), tile


@pytest.mark.parametrize("grad_compute_dtype", [None, E4M3], ids=str)
def test_through_the_verb(grad_compute_dtype):
    """As unpack8, but for the order of sums."""
    args = on_gpu(operands(True, dtype=BF16))
    a = torch.randn(E, 7, args["x"].shape[1], device="cuda", dtype=BF16)
    b = torch.randn(E, args["qdata"].shape[1], 7, device="cuda", dtype=BF16)
    results = []
    for strategy in ("fused8", "unpack8"):
        leaves = [t.detach().requires_grad_() for t in (args["x"], a, b)]
        y = ops.lora_grouped_mm(
            leaves[0], args["qdata"], args["scale"], MXFP4, args["offs"], *leaves[1:], 0.5,
            compute_dtype=E4M3, grad_compute_dtype=grad_compute_dtype, strategy=strategy,
        )  # fmt: skip
        y.sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert relative_error(got.float().cpu(), want.float().cpu()) < 8e-3
    assert len(results[0][0]) == ROWS


def test_where_it_is_not_for():
    args = dense(on_gpu(operands(True, dtype=BF16)))
    rest = ("float8_e5m2", _fp8.MAX_SCRATCH_BYTES, True)
    with pytest.raises(NotImplementedError, match="fused8"):
        call(_fp8.fp8_product, args, True, *rest, packed=True)
