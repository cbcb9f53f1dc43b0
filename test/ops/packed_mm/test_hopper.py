"""The Hopper kernels against float64: every tile, both directions, scales of any size, and what surrounds them."""

import pytest
import torch
from _grids import generator, relative_error

from torchao_mx import MXFP4, MXFP8_E4M3, ops, reference
from torchao_mx.ops.core.tiles import hopper_backward_tile, hopper_forward_tile
from torchao_mx.ops.packed_mm.hopper import product
from torchao_mx.reference import Added, Rows

BOUND = 4e-3  # of bf16 results
FORWARD_TILES = [(rows, 128, 4, two, None) for rows in (16, 32, 64, 128) for two in (False, True)]
BACKWARD_TILES = [(rows, 4, two, None) for rows in (16, 32, 64) for two in (False, True)]
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]


def hopper(test):
    for mark in on_hopper:
        test = mark(test)
    return test


# E, N, K, top_k, tokens, rank, bias, one more than the largest scale byte. 150 and 200 leave the window of the
# fast decode; 2880 = 45 * 64 is an odd number of chunks, 96 and 320 end within a tile.
CASES = {
    "plain": (5, 256, 192, 2, 37, 16, True, 125),
    "rank_8": (5, 128, 320, 2, 300, 8, False, 125),
    "large_scales": (3, 96, 2880, 3, 129, 40, True, 200),
    "without_lora": (4, 160, 64, 1, 5, 0, False, 125),
    "one_token": (7, 256, 256, 3, 1, 16, True, 125),
    "rank_5": (3, 128, 128, 2, 100, 5, True, 150),
}


class Problem:
    """Operands of a product, and the product in float64; ``case`` is one of CASES, or its name."""

    def __init__(self, case, transpose_weight, *, tail=0, ordered=True, seed=0):
        e, n, k, top_k, tokens, rank, has_bias, largest = CASES.get(case, case)
        g = generator(seed)
        reduced, columns = (k, n) if transpose_weight else (n, k)
        self.qdata = torch.randint(0, 256, (e, n, k // 2), generator=g, dtype=torch.uint8)
        self.scale = torch.randint(115, largest, (e, n, k // 32), generator=g, dtype=torch.uint8)
        ids = torch.rand(tokens, e, generator=g).topk(top_k).indices.flatten()
        self.order = ids.argsort(stable=True).int()
        rows = len(ids)
        self.offs = ids.bincount(minlength=e).cumsum(0).clamp(max=rows - tail).int()
        self.top_k, self.rows = (top_k if ordered else 1), rows
        self.x = torch.randn(tokens if ordered else rows, reduced, generator=g).bfloat16()
        self.h = torch.randn(rows, rank, generator=g).bfloat16() if rank else None
        self.up = torch.randn(e, columns, rank, generator=g) if rank else None
        self.bias = torch.randn(e, columns, generator=g).bfloat16() if has_bias else None
        if not transpose_weight and rank:
            self.up = self.up.mT.contiguous().mT  # strides as an adapter's transpose has them
        self.order = self.order if ordered else None
        self.transpose_weight, self.columns = transpose_weight, columns

    def dense(self):
        """The first expert alone, with all rows of x."""
        for name in ("qdata", "scale", "up", "bias"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[0])
        self.rows, self.top_k = len(self.x), 1
        self.h = None if self.h is None else self.h[: self.rows]
        self.offs = self.order = None
        return self

    def expected(self):
        e8m0 = self.scale.view(torch.float8_e8m0fnu)
        w = reference.dequantize(self.qdata, e8m0, MXFP4, torch.float32).double()
        x = self.x if self.order is None else self.x[self.order // self.top_k]
        y = torch.zeros(self.rows, self.columns, dtype=torch.float64)
        ends = [self.rows] if self.offs is None else self.offs.tolist()
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            of_expert = (lambda t: t) if self.offs is None else (lambda t, e=e: t[e])
            values = of_expert(w)
            part = x[start:end].double() @ (values.T if self.transpose_weight else values)
            if self.h is not None:
                up = of_expert(self.up).bfloat16().double()
                part += 0.5 * self.h[start:end].double() @ up.T
            if self.bias is not None:
                part += of_expert(self.bias).double()
            y[start:end] = part
        return y

    def run(self, tile=None, splits=None):
        def cuda(t):
            return None if t is None else t.cuda()

        rows = Rows(cuda(self.offs), cuda(self.order), self.top_k, self.rows)
        added = Added(cuda(self.h), cuda(self.up), 0.5, cuda(self.bias))
        y = product.hopper_product(
            cuda(self.x), cuda(self.qdata), cuda(self.scale), rows, self.transpose_weight, added, tile, splits
        )  # fmt: skip
        return y.cpu()


def check(problem, tile=None, splits=None):
    y, expected = problem.run(tile, splits), problem.expected()
    assert y.isfinite().all()
    assert relative_error(y, expected) < BOUND
    if problem.offs is not None:
        assert y[problem.offs[-1] :].eq(0).all()


@hopper
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [None, *FORWARD_TILES], ids=str)
def test_forward(case, tile):
    check(Problem(case, True), tile)


@hopper
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [None, *BACKWARD_TILES], ids=str)
def test_backward(case, tile):
    check(Problem(case, False), tile)


@hopper
@pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
@pytest.mark.parametrize("case", ["plain", "rank_8", "large_scales"])
def test_rows_behind_rows_in_order_and_dense(case, transpose_weight):
    check(Problem(case, transpose_weight, tail=7))
    check(Problem(case, transpose_weight, ordered=False))
    check(Problem(case, transpose_weight, ordered=False).dense())


# 45 chunks in both directions: parts of odd and even numbers of them, and of one. 45 parts are the most.
@hopper
@pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
@pytest.mark.parametrize("splits", [None, 2, 3, 8, 44, 64])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(
    ("rank", "bias", "largest"),
    [(16, True, 125), (40, False, 200), (0, True, 125), (0, False, 150)],
)
def test_dense_parts(transpose_weight, splits, rows, rank, bias, largest):
    case = (1, 45 * 32, 45 * 64, 1, rows, rank, bias, largest)
    problem = Problem(case, transpose_weight, ordered=False).dense()
    two_operands = FORWARD_TILES[-1] if transpose_weight else BACKWARD_TILES[-1]
    for tile in (None, two_operands):
        check(problem, tile, splits)
        assert torch.equal(problem.run(tile, splits), problem.run(tile, splits))


@hopper
@pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
@pytest.mark.parametrize("splits", [1, 4, 7])
def test_one_part_leaves_the_window(transpose_weight, splits):
    """A single large scale: its columns of the result, and the others, which it does not drown."""
    case = (1, 45 * 32, 45 * 64, 1, 7, 16, True, 125)
    problem = Problem(case, transpose_weight, ordered=False).dense()
    row, block = 700, 50
    problem.scale[row, block] = 160
    large = torch.zeros(problem.columns, dtype=torch.bool)
    large[slice(row, row + 1) if transpose_weight else slice(32 * block, 32 * block + 32)] = True
    y, expected = problem.run(splits=splits), problem.expected()
    for columns in (large, ~large):
        assert relative_error(y[:, columns], expected[:, columns]) < BOUND


@hopper
@pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
def test_two_runs_are_equal(transpose_weight):
    problem = Problem("plain", transpose_weight)
    assert torch.equal(problem.run(), problem.run())


@hopper
@pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
def test_a_nan_scale_reaches_its_block_and_no_other(transpose_weight):
    qdata = torch.randint(0, 256, (64, 64), dtype=torch.uint8, device="cuda")
    scale = torch.full((64, 4), 120, dtype=torch.uint8, device="cuda")
    scale[3, 1] = 255
    x = torch.randn(5, 128 if transpose_weight else 64, device="cuda").bfloat16()
    rows = Rows(None, None, 1, 5)
    y = product.hopper_product(x, qdata, scale, rows, transpose_weight, Added())
    columns = [3] if transpose_weight else list(range(32, 64))
    assert y.isnan().all(0).nonzero().flatten().tolist() == columns
    assert y.isnan().any(0).nonzero().flatten().tolist() == columns


@hopper
@pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
def test_bad_offsets_stay_within_the_rows(transpose_weight):
    """Their rows are undefined; nothing may be read or written outside."""
    problem = Problem("plain", transpose_weight)
    for offs in ([9, 3, -5, 900, 20], [-1, -1, -1, -1, -1], [10**6] * 5):
        problem.offs = torch.tensor(offs, dtype=torch.int32)
        assert problem.run().shape == (problem.rows, problem.columns)


@hopper
def test_more_than_2_31_elements():
    e, n, k = 17, 16384, 8192
    qdata = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(115, 125, (e, n, k // 32), dtype=torch.uint8, device="cuda")
    offs = torch.tensor([0] * (e - 1) + [4], dtype=torch.int32, device="cuda")
    e8m0 = scale[-1].view(torch.float8_e8m0fnu)
    w = ops.dequantize(qdata[-1], e8m0, MXFP4, torch.bfloat16)
    for transpose_weight in (True, False):
        x = torch.randn(4, k if transpose_weight else n, device="cuda").bfloat16()
        rows = Rows(offs, None, 1, 4)
        y = product.hopper_product(x, qdata, scale, rows, transpose_weight, Added())
        assert relative_error(y, x.double() @ (w.T if transpose_weight else w).double()) < BOUND


@hopper
def test_where_they_apply():
    x = torch.empty(4, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(2, 64, 64, device="cuda", dtype=torch.uint8)
    assert product.takes_hopper(x, weight, MXFP4)
    assert not product.takes_hopper(x.half(), weight, MXFP4)
    assert not product.takes_hopper(x, weight, MXFP8_E4M3)
    assert not product.takes_hopper(x, weight[:, :33], MXFP4)
    assert not product.takes_hopper(x, weight[..., :48], MXFP4)
    assert not product.takes_hopper(x.cpu(), weight, MXFP4)


# --- without a Hopper GPU -------------------------------------------------------------------------


def test_how_many_parts():
    def parts(rows, reduced, columns, forward=True):
        tile_t, *_, two, _ = (
            hopper_forward_tile(rows, 0) if forward else hopper_backward_tile(rows, 0)
        )
        programs = -(-rows // tile_t) * -(-columns // (128 if forward else 256))
        return product._splits(rows, reduced, 64 if forward else 32, programs, two, 132)

    assert [parts(rows, 14336, 4096) for rows in (1, 64, 128, 1024)] == [12, 12, 6, 1]
    assert [parts(rows, 4096, 14336) for rows in (1, 64, 128, 256)] == [3, 3, 1, 1]
    assert [parts(rows, 14336, 4096, False) for rows in (1, 64, 256)] == [24, 14, 3]
    assert [parts(rows, 4096, 14336, False) for rows in (1, 64, 256)] == [7, 4, 1]
    assert parts(1, 1024, 1024) == 2
    assert parts(1, 256, 256) == 1


# The orders in which the kernels want their operands.


def test_permuted(kernel_device):
    """Within 64 columns, 8 word + 4 half + i goes to 16 i + 2 word + half."""
    x = torch.randn(5, 3 * 64, generator=generator(0))
    got = product.permuted(x.to(kernel_device)).cpu()
    for word in range(8):
        for half in range(2):
            for i in range(4):
                came, went = 8 * word + 4 * half + i, 16 * i + 2 * word + half
                assert torch.equal(got[:, went::64], x[:, came::64])


@pytest.mark.parametrize("shape", [(32, 2), (96, 6), (3, 160, 90)], ids=str)
def test_paired_scales(kernel_device, shape):
    scale = torch.randint(0, 256, shape, generator=generator(0), dtype=torch.uint8)
    assert torch.equal(product.paired_scales(scale.to(kernel_device)).cpu(), scale.mT)
