"""Recorded launches: the third call of a kind repeats the second one's kernels, on whatever data it is given."""

import importlib
import pkgutil

import pytest
import torch

import torchao_mx.ops
from torchao_mx import MXFP4, NVFP4, ops
from torchao_mx.ops import _replay, mm
from torchao_mx.ops._launch import launched

on_gpu = pytest.mark.gpu
E, N, K, RANK, TOP_K = 6, 96, 128, 8, 2


def test_every_kernel_can_be_recorded():
    """A kernel launched past ``launched`` would be missing from a replay."""
    plain = []
    for info in pkgutil.iter_modules(torchao_mx.ops.__path__, "torchao_mx.ops."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            launches = hasattr(value, "__getitem__") and hasattr(value, "run")  # Triton's own
            if name.endswith("_kernel") and launches and not isinstance(value, launched):
                plain.append(f"{info.name}.{name}")
    assert not plain


def operands(seed, tokens=40):
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, K, device="cuda", dtype=torch.bfloat16, generator=g)
    ids = torch.randint(0, E, (tokens * TOP_K,), device="cuda", generator=g)
    order, offs = ids.argsort(stable=True).int(), ids.bincount(minlength=E).cumsum(0).int()
    a = torch.randn(E, RANK, K, device="cuda", generator=g)
    b = torch.randn(E, N, RANK, device="cuda", generator=g)
    w = torch.randn(E, N, K, device="cuda", generator=g)
    dy = torch.randn(tokens * TOP_K, N, device="cuda", dtype=torch.bfloat16, generator=g)
    return x, order, offs, a, b, w, dy


def calls(fmt, x, order, offs, a, b, w, dy, strategy="", compute=""):
    """The arguments of mm and of mm_backward."""
    pts = ops.per_tensor_scale(w, fmt, True) if fmt.has_per_tensor_scale else None
    packed = (*ops.quantize(w, fmt, per_tensor_scale=pts), pts)
    h = torch.randn(len(dy), RANK, device="cuda").bfloat16()
    common = (a, b, offs, order, 0.5, fmt.name, True, strategy)
    scratch = mm.DEFAULT_SCRATCH
    return (
        (x, *packed, None, *common, compute, "", scratch),
        (dy, x, h, *packed, *common, "", scratch, True, len(x), None),
    )


def dense_calls(x, order, offs, a, b, w, dy):
    """The same with the first expert alone, and a bias."""
    packed = (*ops.quantize(w[0], MXFP4), None)
    h = torch.randn(len(x), RANK, device="cuda").bfloat16()
    common = (a[0], b[0], None, None, 0.5, "mxfp4", True, "auto")
    dy, bias = dy[: len(x)], torch.randn(N, device="cuda").bfloat16()
    return (
        (x, *packed, bias, *common, "", "", 0),
        (dy, x, h, *packed, *common, "", 0, True, len(x), torch.bfloat16),
    )


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def replays(monkeypatch):
    """The recordings that were replayed."""
    replays = []
    replay = _replay._Recording.replay

    def counted(self, inputs):
        replays.append(self)
        return replay(self, inputs)

    monkeypatch.setattr(_replay._Recording, "replay", counted)
    return replays


@on_gpu
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("strategy", ["fused", "unpack"])
def test_a_replay_computes_what_the_call_does(fmt, strategy, replays):
    held = []
    for seed in range(5):
        held.append(operands(seed))  # kept, so that each call meets other addresses
        forward, backward = calls(fmt, *held[-1], strategy=strategy)
        assert_equal(mm.mm_op(*forward), mm._mm(*forward))
        assert_equal(mm.mm_backward_op(*backward), mm._mm_backward(*backward))
    if strategy == "fused":
        assert len(replays) == 6  # three of five calls, both ways


@on_gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_dense_step_of_few_rows_is_replayed(tokens, replays):
    held = []
    for seed in range(5):
        held.append(operands(seed, tokens))
        forward, backward = dense_calls(*held[-1])
        assert_equal(mm.mm_op(*forward), mm._mm(*forward))
        assert_equal(mm.mm_backward_op(*backward), mm._mm_backward(*backward))
    assert len(replays) == 6


@on_gpu
def test_8_bit_products():
    for seed in range(4):
        forward, _ = calls(MXFP4, *operands(seed), strategy="auto", compute="float8_e4m3fn")
        assert_equal(mm.mm_op(*forward), mm._mm(*forward))


@on_gpu
def test_recordings_are_bounded(monkeypatch):
    calls = []

    def op(x):
        calls.append(1)
        return (torch.empty_like(x),)

    monkeypatch.setattr(_replay, "MAX_RECORDINGS", 4)
    call = _replay.replayed(op)
    for n in range(1, 10):
        call(torch.empty(n, device="cuda"))
    for _ in range(5):
        (out,) = call(torch.empty(9, device="cuda"))
    assert out.shape == (9,)
    assert len(calls) < 9 + 5


@on_gpu
def test_what_cannot_be_replayed_is_not():
    def with_a_torch_op(x):
        return (x + 1,)

    def of_its_input(x):
        return (x.view(-1),)

    for op in (with_a_torch_op, of_its_input):
        call = _replay.replayed(op)
        for value in range(5):
            x = torch.full((4,), float(value), device="cuda")
            assert torch.equal(call(x)[0], op(x)[0])


@on_gpu
def test_inputs_that_share_memory():
    """Recorded when the inputs were apart; then two are parts of one tensor."""
    for seed in range(4):
        data = operands(seed)
        _, backward = calls(MXFP4, *data, strategy="fused")
        assert_equal(mm.mm_backward_op(*backward), mm._mm_backward(*backward))
    both = torch.randn(RANK + N, len(data[-1]), device="cuda").bfloat16().mT.contiguous()
    dy, h = both[:, :N].contiguous(), both[:, N:].contiguous()
    memory = torch.cat([dy.flatten(), h.flatten()])
    backward = (
        memory[: dy.numel()].view_as(dy),
        backward[1],
        memory[dy.numel() :].view_as(h),
        *backward[3:],
    )
    assert_equal(mm.mm_backward_op(*backward), mm._mm_backward(*backward))
