"""Hopper's product with weights decoded to e4m3 in registers, against its definition."""

import pytest
import torch
from _fp8_operands import E4M3, ENDS, ROWS, E, call, dense, expected, operands, packed, randn
from _grids import generator, relative_error

from torchao_mx import MXFP4, ops
from torchao_mx.ops import _fp8, _fp8_kernels, _fp8_weight, _hopper
from torchao_mx.reference import fp8 as definition

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper", "rare_spreads")]
BF16 = torch.bfloat16
TILES = [(16, 5, 1, None), (32, 5, 1, None), (64, 5, 1, 168), (64, 5, 2, None), (128, 4, 2, None)]


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


def product(args):
    rest = ("float8_e4m3fn", _fp8.MAX_SCRATCH_BYTES, None, True)
    return call(_fp8.fp8_product, on_gpu(args), True, *rest, pts=True).cpu()


def kernel(args, tile):
    """The fused kernel with a tile, and the flagged columns."""
    a = on_gpu(args)
    lowered, w_scale, flags = _fp8_weight.lowered_rows(a["qdata"], a["scale"])
    y = _hopper.hopper_fp8_product(
        *_fp8_kernels.permuted_rows(a["x"]), a["qdata"], lowered, w_scale, a["offs"], a["order"],
        a["top_k"], a["n_rows"], a["h"], a["up"], a["scaling"], a["bias"], tile,
    )  # fmt: skip
    return y.cpu(), flags.cpu()


@pytest.mark.parametrize("powers", [0, 11, 20])
@pytest.mark.parametrize("top_k", [1, 4])
def test_product(powers, top_k):
    args = operands(True, dtype=BF16, powers=powers, top_k=top_k)
    y = product(args)
    assert relative_error(y, expected(args, True)) < 4e-3
    assert y[ENDS[-1] :].eq(0).all()
    assert torch.equal(y, product(args))


@pytest.mark.parametrize("terms", ["none", "lora", "bias"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
def test_without_some_terms(terms, grouped):
    args = operands(True, dtype=BF16)
    args = args if grouped else dense(args)
    if terms != "lora":
        args.update(h=None, up=None)
    if terms != "bias":
        args.update(bias=None)
    assert relative_error(product(args), expected(args, True)) < 4e-3


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k", [32, 64, 96, 128, 160, 1024, 2880])
@pytest.mark.parametrize("n", [16, 144, 256])
def test_tiles_and_shapes(tile, k, n):
    """Rows of x, of W and of K that are no whole tiles; several tiles an expert."""
    sizes = torch.tensor([0, 1, 130, 17, 64])
    rows, rank = int(sizes.sum()) + 3, 20
    qdata, scale = packed(E, n, k, powers=3)
    args = dict(
        x=randn(rows, k, dtype=BF16), qdata=qdata, scale=scale, offs=sizes.cumsum(0).int(), order=None,
        top_k=1, n_rows=rows, h=randn(rows, rank, seed=3, dtype=BF16), up=randn(E, n, rank, seed=4),
        scaling=0.5, bias=randn(E, n, seed=5),
    )  # fmt: skip
    y, flags = kernel(args, tile)
    assert flags.eq(0).all()
    assert relative_error(y, expected(args, True)) < 4e-3


def test_a_code_at_each_place():
    """W one element of each code, x a single one: no element may be read for another."""
    k, n = 256, 128
    codes = torch.randint(0, 16, (1, n, k), dtype=torch.uint8, generator=generator(7))
    qdata = codes[..., ::2] | codes[..., 1::2] << 4
    scale = torch.randint(124, 131, (1, n, k // 32), dtype=torch.uint8, generator=generator(8))
    scale = scale.view(torch.float8_e8m0fnu)
    x = torch.eye(k, dtype=BF16)
    args = dict(
        x=x, qdata=qdata, scale=scale, offs=torch.tensor([k], dtype=torch.int32), order=None, top_k=1,
        n_rows=k, h=None, up=None, scaling=1.0, bias=None,
    )  # fmt: skip
    want = ops.dequantize(qdata, scale, MXFP4, dtype=torch.float32)[0].T
    for tile in TILES:
        y, flags = kernel(args, tile)
        assert flags.eq(0).all()
        assert torch.equal(y.float(), want.bfloat16().float()), tile


def test_through_the_verb():
    """Forward fused8, backward the default: as unpack8, but for the order of sums."""
    args = on_gpu(operands(True, dtype=BF16))
    a = torch.randn(E, 7, args["x"].shape[1], device="cuda", dtype=BF16)
    b = torch.randn(E, args["qdata"].shape[1], 7, device="cuda", dtype=BF16)
    results = []
    for strategy in ("fused8", "unpack8"):
        leaves = [t.detach().requires_grad_() for t in (args["x"], a, b)]
        y = ops.lora_grouped_mm(
            leaves[0], args["qdata"], args["scale"], MXFP4, args["offs"], *leaves[1:], 0.5,
            compute_dtype=E4M3, strategy=strategy,
        )  # fmt: skip
        y.sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert relative_error(got.float().cpu(), want.float().cpu()) < 8e-3
    assert len(results[0][0]) == ROWS


def test_where_it_is_not_for():
    """Reduced over N, the other axis."""
    args = on_gpu(operands(False, dtype=BF16))
    rest = ("float8_e4m3fn", _fp8.MAX_SCRATCH_BYTES, None, True)
    with pytest.raises(NotImplementedError, match="fused8"):
        call(_fp8.fp8_product, args, False, *rest, pts=True)
