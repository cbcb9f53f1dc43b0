"""Skinny grouped products, row sums and combines against plain torch in float64, into poisoned memory."""

import itertools
import math

import pytest
import torch
from _grids import assert_close, generator, name_of

from torchao_mx.ops.core import tiles
from torchao_mx.ops.moe import gather, narrow
from torchao_mx.ops.moe import groups as _groups

each_dtype = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("interpreter", torch.float32),  # the only dtype that the interpreter multiplies rightly
        *(
            pytest.param("cuda", dtype, marks=pytest.mark.gpu)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
    ],
    ids=name_of,
)
pytestmark = pytest.mark.usefixtures("poisoned")

# End offsets and rows: ragged, empty groups first, in the middle and last, rows behind the last offset.
GROUPS = {
    "dense": (None, 75),
    "dense_one_row": (None, 1),
    "one_group": ([40], 40),
    "ragged": ([7, 40, 41, 100], 100),
    "empty_groups": ([0, 33, 33, 60, 60], 60),
    "rows_behind": ([5, 5, 30], 70),
    "rows_behind_all": ([0, 0, 0], 20),
    "one_row": ([0, 1, 1], 1),
    "whole_tiles": ([16, 48, 176, 240], 240),
    "no_rows": ([0, 0], 0),
    "dense_no_rows": (None, 0),
}
each_groups = pytest.mark.parametrize("groups", GROUPS)


@pytest.fixture(autouse=True)
def here(device):
    if device == "interpreter" and torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process, not interpreted")


@pytest.fixture
def many_processors(monkeypatch):
    """Tiles and parts as on a GPU of this size, also in the interpreter."""
    monkeypatch.setattr(narrow, "multiprocessors", lambda device: 132)


def randn(*shape, dtype, device="interpreter", seed=0):
    x = torch.randn(shape, generator=generator(seed)).to(dtype)
    return x if device == "interpreter" else x.to(device)


def groups_of(name, device):
    """(offs or None, rows, list of (group, slice) on the host)."""
    ends, n_rows = GROUPS[name]
    if ends is None:
        return None, n_rows, [(0, slice(0, n_rows))]
    slices = [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends))]  # noqa: B905
    return on(device, torch.tensor(ends, dtype=torch.int32)), n_rows, slices


def order_of(n_rows, device, seed=5):
    return on(device, torch.randperm(n_rows, generator=generator(seed)).int())


def on(device, x):
    return x if device == "interpreter" else x.to(device)


def gathered(x, order, top_k):
    """Grouped rows of ``x [T, C]``, float64 on the CPU."""
    x = x.cpu().double()
    return x if order is None else x[order.cpu().long() // top_k]


def check(actual, expected, dtype=None):
    assert actual.shape == expected.shape
    actual = actual.cpu()
    assert not actual[expected == 0].any()
    if expected.abs().sum() > 0:
        assert_close(actual, expected, dtype)


def check_repeats(device, call, result):
    """The same bits again; the interpreter, which is slow, has one order of doing things."""
    assert device == "interpreter" or torch.equal(call(), result)


def expected_low_rank(x, down, slices, order, top_k, n_rows, scale_by=1.0):
    rows, down = gathered(x, order, top_k), down.to(x.dtype).cpu().double()
    h = torch.zeros(n_rows, down.shape[-2], dtype=torch.float64)
    for e, part in slices:
        h[part] = scale_by * rows[part] @ (down if down.dim() == 2 else down[e]).mT
    return h


def adapter(groups, r, columns, dtype, device, transposed=False, seed=1):
    """``[E, r, C]`` (``[r, C]`` dense), a view of ``[E, C, r]`` if transposed."""
    lead = () if GROUPS[groups][0] is None else (len(GROUPS[groups][0]),)
    shape = (*lead, columns, r) if transposed else (*lead, r, columns)
    down = randn(*shape, dtype=dtype, device=device, seed=seed)
    return down.mT if transposed else down


def check_low_rank(
    device, dtype, groups, r, columns, top_k=None, transposed=False, down_dtype=None
):
    offs, n_rows, slices = groups_of(groups, device)
    order = None if top_k is None else order_of(n_rows, device)
    x = randn(n_rows // (top_k or 1), columns, dtype=dtype, device=device)
    down = adapter(groups, r, columns, down_dtype or dtype, device, transposed)

    def call():
        return narrow.low_rank(x, down, offs, order, top_k or 1, n_rows, scale_by=0.75)

    h = call()
    assert h.dtype == dtype and h.is_contiguous()
    check(h, expected_low_rank(x, down, slices, order, top_k or 1, n_rows, 0.75))
    check_repeats(device, call, h)


@each_dtype
@each_groups
def test_low_rank_groups(device, dtype, groups):
    check_low_rank(device, dtype, groups, r=16, columns=96)


@each_dtype
@pytest.mark.parametrize("r", [5, 16, 33, 130, 256])
@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_ranks_and_strides(device, dtype, r, transposed):
    check_low_rank(device, dtype, "ragged", r, columns=160, transposed=transposed)


@each_dtype
@pytest.mark.parametrize("columns", [8, 96, 131, 2880])
def test_low_rank_columns(device, dtype, columns):
    check_low_rank(device, dtype, "rows_behind", 16, columns)


@each_dtype
@pytest.mark.parametrize("groups", ["dense", "ragged", "empty_groups", "whole_tiles", "no_rows"])
def test_low_rank_gathers(device, dtype, groups, many_processors):
    check_low_rank(device, dtype, groups, r=16, columns=96, top_k=5)


@each_dtype
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("groups", ["dense", "dense_one_row", "ragged", "rows_behind"])
@pytest.mark.parametrize("columns", [131, 256])
def test_low_rank_splits(device, dtype, groups, top_k, columns, many_processors, monkeypatch):
    """Columns cut into parts: even, and with the last ones short or empty."""
    if top_k is not None and groups == "dense_one_row":
        pytest.skip("one row is no multiple of five")
    monkeypatch.setattr(narrow, "MIN_COLUMNS_PER_SPLIT", 16)
    monkeypatch.setattr(tiles, "LOW_RANK_COLUMNS", 32)
    add_splits, parts = narrow.add_splits, []
    monkeypatch.setattr(narrow, "add_splits", lambda *a: parts.append(a[2]) or add_splits(*a))
    for transposed in (False, True):
        check_low_rank(device, dtype, groups, 16, columns, top_k, transposed)
    assert set(parts) == {8 if columns == 131 else 16}


@pytest.mark.parametrize("device", ["interpreter"])
def test_few_rows_fill_a_gpu(device, many_processors):
    """An H200's 132 multiprocessors: a dense product of 64 rows, one of 2048 in 32 groups, one of very many."""
    assert narrow._splits(14336 // narrow.MIN_COLUMNS_PER_SPLIT, 4, torch.device("cpu")) == 16
    assert narrow._splits(2048 // narrow.MIN_COLUMNS_PER_SPLIT, 160, torch.device("cpu")) == 4
    assert narrow._splits(14336 // narrow.MIN_COLUMNS_PER_SPLIT, 1024, torch.device("cpu")) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_casts_the_adapter(device, transposed):
    for dtype in (torch.bfloat16, torch.float16):
        check_low_rank(
            device, dtype, "ragged", 16, 160, transposed=transposed, down_dtype=torch.float32
        )


def check_gram(device, dtype, groups, r, columns, top_k=None, out=torch.float32, scaling=1.25):
    offs, n_rows, slices = groups_of(groups, device)
    order = None if top_k is None else order_of(n_rows, device)
    left = randn(n_rows, r, dtype=dtype, device=device)
    right = randn(n_rows // (top_k or 1), columns, dtype=dtype, device=device, seed=1)
    rows = gathered(right, order, top_k or 1)
    expected = scaling * torch.stack(
        [left[part].cpu().double().mT @ rows[part] for _, part in slices]
    )
    expected = expected[0] if offs is None else expected
    for transposed in (False, True):
        args = (left, right, offs, order, top_k or 1, scaling, out, transposed)
        actual = narrow.gram(*args)
        assert actual.dtype == out and actual.is_contiguous()
        check(actual, expected.mT if transposed else expected)
        check_repeats(device, lambda args=args: narrow.gram(*args), actual)


@each_dtype
@each_groups
def test_gram_groups(device, dtype, groups):
    check_gram(device, dtype, groups, r=16, columns=96)


@each_dtype
@pytest.mark.parametrize("r", [5, 16, 33, 130, 256])
@pytest.mark.parametrize("columns", [96, 131])
def test_gram_ranks(device, dtype, r, columns):
    check_gram(device, dtype, "rows_behind", r, columns, out=dtype)


@each_dtype
@pytest.mark.parametrize("groups", ["dense", "ragged", "empty_groups", "whole_tiles", "no_rows"])
def test_gram_gathers(device, dtype, groups):
    check_gram(device, dtype, groups, r=16, columns=320, top_k=5)


@each_dtype
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("groups", ["dense", "ragged", "empty_groups", "rows_behind"])
def test_gram_splits(device, dtype, groups, top_k, many_processors, monkeypatch):
    """Groups cut into parts, some of them without rows."""
    monkeypatch.setattr(narrow, "MIN_ROWS_PER_SPLIT", 3)
    assert narrow._row_splits(60, 5, 5, torch.device("cpu")) == 4
    check_gram(device, dtype, groups, r=16, columns=96, top_k=top_k, out=dtype)


@each_dtype
@each_groups
@pytest.mark.parametrize("columns", [96, 131])
def test_group_sum(device, dtype, groups, columns, many_processors, monkeypatch):
    offs, n_rows, slices = groups_of(groups, device)
    dy = randn(n_rows, columns, dtype=dtype, device=device)
    expected = torch.stack([dy[part].cpu().double().sum(0) for _, part in slices])
    expected = expected[0] if offs is None else expected
    for min_rows in (2048, 3):
        monkeypatch.setattr(narrow, "MIN_ROWS_PER_SPLIT", min_rows)
        for out in {torch.float32, dtype}:
            actual = narrow.group_sum(dy, offs, out)
            assert actual.dtype == out
            check(actual, expected)
            check_repeats(device, lambda out=out: narrow.group_sum(dy, offs, out), actual)


def routed(device, dtype, n_tokens, top_k, columns, weights_dtype=torch.float32):
    n_rows = n_tokens * top_k
    y = randn(n_rows, columns, dtype=dtype, device=device)
    weights = randn(n_tokens, top_k, dtype=weights_dtype, device=device, seed=1)
    return y, weights, order_of(n_rows, device)


def combined(y, order, top_k, weights):
    """The definition, differentiable."""
    slots = torch.empty_like(y).index_copy(0, order.long(), y).view(-1, top_k, y.shape[1])
    return slots.sum(1) if weights is None else (slots * weights[:, :, None]).sum(1)


@each_dtype
@pytest.mark.parametrize("top_k", [1, 4, 6, 8])
@pytest.mark.parametrize("columns", [16, 131, 2880])
def test_sum_rows(device, dtype, top_k, columns):
    y, weights, order = routed(device, dtype, 9, top_k, columns)
    inv = gather.inverse(order)
    assert inv.dtype == torch.int32
    assert torch.equal(inv.cpu().long(), torch.argsort(order.cpu().long()))
    for w in (None, weights):
        actual = gather.sum_rows(y, order, top_k, w)
        assert actual.dtype == dtype
        wide = None if w is None else w.cpu().double()
        check(actual, combined(y.cpu().double(), order.cpu(), top_k, wide))
        assert torch.equal(gather.sum_rows(y, order, top_k, w, inv=inv), actual)


@each_dtype
@pytest.mark.parametrize("top_k", [1, 4, 6, 8])
@pytest.mark.parametrize("columns", [16, 131, 2880])
def test_combine_backward(device, dtype, top_k, columns):
    for weights_dtype in {torch.float32, dtype}:
        y, weights, order = routed(device, dtype, 9, top_k, columns, weights_dtype)
        dout = randn(9, columns, dtype=dtype, device=device, seed=2)
        wide = [t.cpu().double().requires_grad_() for t in (y, weights)]
        out = combined(wide[0], order.cpu(), top_k, wide[1])
        expected = torch.autograd.grad(out, wide, dout.cpu().double())
        results = gather.combine_backward(dout, y, weights, order)
        again = gather.combine_backward(dout, y, weights, order, inv=gather.inverse(order))
        assert (results[0].dtype, results[1].dtype) == (dtype, weights_dtype)
        for actual, wanted, repeated in zip(results, expected, again, strict=True):
            check(actual, wanted)
            assert torch.equal(actual, repeated)


@each_dtype
def test_views(device, dtype):
    """Rows apart, repeated rows, and rows whose elements are apart."""
    offs, n_rows, slices = groups_of("ragged", device)
    order, down = order_of(n_rows, device), adapter("ragged", 16, 96, dtype, device)
    left = randn(n_rows, 40, dtype=dtype, device=device, seed=3)[:, 1:17]
    weights = randn(n_rows // 4, 4, dtype=dtype, device=device, seed=4)
    whole = randn(n_rows, 200, dtype=dtype, device=device)
    for x in (
        whole[:, 3:99],
        whole[:1, :96].expand(n_rows, -1),
        randn(96, n_rows, dtype=dtype, device=device).t(),
        whole[:, :1].expand(-1, 96),
    ):
        dense = x.cpu().double()
        expected = expected_low_rank(x, down, slices, None, 1, n_rows)
        check(narrow.low_rank(x, down, offs, None, 1, n_rows), expected)
        grams = torch.stack([left[part].cpu().double().mT @ dense[part] for _, part in slices])
        check(narrow.gram(left, x, offs, None, 1, 1.0, torch.float32, False), grams)
        sums = torch.stack([dense[part].sum(0) for _, part in slices])
        check(narrow.group_sum(x, offs, torch.float32), sums)
        wide_order, wide = order.cpu(), weights.cpu().double()
        check(gather.sum_rows(x, order, 4, weights), combined(dense, wide_order, 4, wide))
        dout = x[: n_rows // 4]
        dy, dweights = gather.combine_backward(dout, x, weights, order)
        leaves = [dense.requires_grad_(), wide.requires_grad_()]
        out = combined(leaves[0], wide_order, 4, leaves[1])
        grads = torch.autograd.grad(out, leaves, dout.cpu().double())
        check(dy, grads[0])
        check(dweights, grads[1])


@each_dtype
def test_bad_offsets_and_orders_stay_inside(device, dtype):
    """Offsets that fall, or leave the rows, still partition them; rows are clamped."""
    down = adapter("ragged", 16, 96, dtype, device)
    x = randn(100, 96, dtype=dtype, device=device)
    for ends, used in (
        ([50, 20, 70, 60], [50, 50, 70, 70]),
        ([-5, 30, 400, 2**31 - 1], [0, 30, 100, 100]),
        ([-(2**31), -1, 2**31 - 1, 3], [0, 0, 100, 100]),
    ):
        bad, good = (on(device, torch.tensor(t, dtype=torch.int32)) for t in (ends, used))
        for call in (
            lambda offs: narrow.low_rank(x, down, offs, None, 1, 100),
            lambda offs: narrow.gram(x[:, :16], x, offs, None, 1, 1.0, torch.float32, False),
            lambda offs: narrow.group_sum(x, offs, torch.float32),
        ):
            assert torch.equal(call(bad), call(good))
    order = on(device, torch.tensor([-(2**31), 2**31 - 1, -1, 100] * 25, dtype=torch.int32))
    assert narrow.low_rank(x[:25], down, good, order, 4, 100).isfinite().all()
    assert narrow.gram(x[:, :16], x[:25], good, order, 4, 1.0, dtype, False).isfinite().all()
    gather.combine_backward(x[:25], x, x[:25, :4], order)
    gather.sum_rows(x, order, 4, None)


@each_dtype
def test_no_rows_columns_or_ranks(device, dtype):
    def empty(*shape, of=dtype):
        return on(device, torch.empty(shape, dtype=of))

    order, offs = empty(0, of=torch.int32), on(device, torch.tensor([3, 8], dtype=torch.int32))
    assert gather.inverse(order).shape == (0,)
    assert gather.sum_rows(empty(0, 32), order, 4, None).shape == (0, 32)
    results = gather.combine_backward(empty(0, 32), empty(0, 32), empty(0, 4), order)
    assert [t.shape for t in results] == [(0, 32), (0, 4)]
    assert narrow.low_rank(empty(8, 32), empty(2, 0, 32), offs, None, 1, 8).shape == (8, 0)
    assert not narrow.low_rank(empty(8, 0), empty(2, 16, 0), offs, None, 1, 8).any()
    assert narrow.gram(empty(8, 16), empty(8, 0), offs, None, 1, 1.0, dtype, True).shape == (
        2, 0, 16
    )  # fmt: skip


@pytest.mark.parametrize("device", ["interpreter"])
def test_tiles_are_bounded(device):
    """``max_tiles`` is what the worst partition needs."""
    for tile, n_rows, n_groups in itertools.product((1, 2, 4), range(13), range(4)):
        needed = []
        for cuts in itertools.combinations_with_replacement(range(n_rows + 1), n_groups):
            sizes = (b - a for a, b in itertools.pairwise((0, *cuts, n_rows)))
            needed.append(sum(math.ceil(size / tile) for size in sizes))
        assert _groups.max_tiles(n_rows, n_groups, tile) == max(needed)


@pytest.mark.parametrize("device", ["interpreter"])
def test_tiles_fill_a_gpu_of_any_generation(device):
    """Pipelines fit in the shared memory of the smallest GPU, at every rank and dtype."""
    for r in (1, 16, 64, 128, 256):
        for n_rows, n_groups in ((64, 128), (2048, 0), (2048, 128), (131072, 0), (131072, 32)):
            for x_bytes, down_bytes in ((2, 2), (2, 4), (4, 4)):
                rows, columns, ranks, stages, _ = tiles.low_rank_tile(
                    n_rows, n_groups, r, x_bytes, down_bytes, 132
                )
                used = stages * columns * (rows * x_bytes + ranks * down_bytes)
                assert stages >= 2 and used <= tiles.SHARED_BYTES
                rows, columns, ranks, stages, _ = tiles.gram_tile(
                    n_rows, max(1, n_groups), r, x_bytes
                )
                used = stages * rows * (columns + ranks) * x_bytes
                assert stages >= 2 and used <= tiles.SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_past_2_31_elements(device):
    """Offsets are 64-bit: the last rows are right."""
    n_rows, columns, last = 2**17 + 64, 2**14 + 64, 64
    x = torch.zeros(n_rows, columns, dtype=torch.bfloat16, device=device)
    x[-last:] = randn(last, columns, dtype=torch.bfloat16, device=device)
    offs = torch.tensor([5, n_rows], dtype=torch.int32, device=device)
    order = torch.arange(n_rows, dtype=torch.int32, device=device)
    down = randn(2, 16, columns, dtype=torch.bfloat16, device=device, seed=1)
    left = randn(n_rows, 16, dtype=torch.bfloat16, device=device, seed=2)
    tail, tail_down = x[-last:].cpu().double(), down[1].cpu().double()
    h = narrow.low_rank(x, down, offs, order, 1, n_rows)
    assert_close(h[-last:], (tail @ tail_down.mT).to(device))
    gram = narrow.gram(left, x, offs, order, 1, 1.0, torch.float32, False)
    assert_close(gram[1].cpu(), left[-last:].cpu().double().mT @ tail)
    assert_close(narrow.group_sum(x, offs, torch.float32)[1].cpu(), tail.sum(0))
    weights = randn(n_rows, 1, dtype=torch.float32, device=device, seed=3)
    out = gather.sum_rows(x, order, 1, weights)
    assert_close(out[-last:].cpu(), tail * weights[-last:].cpu().double())
    del out
    dy, dweights = gather.combine_backward(x, x, weights, order)
    assert_close(dy[-last:].cpu(), tail * weights[-last:].cpu().double())
    assert_close(dweights[-last:].cpu(), tail.square().sum(1, keepdim=True))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_device_need_not_be_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.ones(32, 32, device="cuda:1")
    order = torch.arange(32, dtype=torch.int32, device="cuda:1")
    assert (narrow.low_rank(x, x[:16], None, order, 1, 32) == 32).all()
    assert (narrow.gram(x, x, None, order, 1, 1.0, torch.float32, False) == 32).all()
    assert (narrow.group_sum(x, None, torch.float32) == 32).all()
    assert (gather.sum_rows(x, order, 1, None) == 1).all()
    assert (gather.combine_backward(x, x, x[:, :1].contiguous(), order)[1] == 32).all()
