"""Recorded launches: the third call of a kind repeats the second one's kernels, on whatever data it is given."""

import ctypes
import importlib
import pkgutil
import weakref

import pytest
import torch
import triton
from _grids import assert_same_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import torchao_mx.ops
from torchao_mx import MXFP4, NVFP4, reference
from torchao_mx.ops.block_scaled import recipe_linear
from torchao_mx.ops.core import replay as _replay
from torchao_mx.ops.core.launch import launched, launches, runner
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.packed_mm import exact_fp4
from torchao_mx.ops.packed_mm import op as mm

on_gpu = pytest.mark.gpu
E, N, K, RANK, TOP_K = 6, 96, 128, 8, 2


def test_every_kernel_can_be_recorded():
    """A kernel launched past ``launched`` would be missing from a replay."""
    plain = []
    for info in pkgutil.walk_packages(torchao_mx.ops.__path__, "torchao_mx.ops."):
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
    pts = reference.per_tensor_scale(w, fmt, True) if fmt.has_per_tensor_scale else None
    packed = (*reference.quantize(w, fmt, per_tensor_scale=pts), pts)
    h = torch.randn(len(dy), RANK, device="cuda").bfloat16()
    common = (a, b, offs, order, 0.5, fmt.name, True, strategy)
    scratch = mm.DEFAULT_SCRATCH
    return (
        (x, *packed, None, *common, compute, "", scratch),
        (dy, x, h, *packed, *common, "", scratch, True, len(x), None),
    )


def dense_calls(x, order, offs, a, b, w, dy):
    """The same with the first expert alone, and a bias."""
    packed = (*reference.quantize(w[0], MXFP4), None)
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
def test_8_bit_products(replays):
    for seed in range(4):
        forward, _ = calls(MXFP4, *operands(seed), strategy="auto", compute="float8_e4m3fn")
        assert_equal(mm.mm_op(*forward), mm._mm(*forward))
    assert len(replays) == 2


@on_gpu
def test_mxfp4_by_mxfp4(replays):
    held = []
    for seed in range(5):
        g = torch.Generator("cuda").manual_seed(seed)
        x, w = (torch.randn(n, K, device="cuda", generator=g).bfloat16() for n in (72, N))
        bias = torch.randn(N, device="cuda", generator=g).bfloat16()
        held.append((*reference.quantize(x, MXFP4), *reference.quantize(w, MXFP4), bias))
        wanted = exact_fp4._product_cuda(*held[-1])
        assert torch.equal(exact_fp4.mxfp4_product_op(*held[-1]), wanted)
    assert len(replays) == 3


@on_gpu
@pytest.mark.parametrize(("stochastic", "tokens"), [(False, 40), (True, 48)])
def test_a_step_of_the_recipe_is_one_replay_a_direction(stochastic, tokens, replays):
    """Forward is the same with either rounding, so that each has its own token count and recordings."""
    forward, backward = ("nvfp4", "rceil"), ("mxfp8_e4m3", "rceil")
    held = []
    for n in range(5):
        g = torch.Generator("cuda").manual_seed(n)
        x, w, bias, dy = (
            torch.randn(*shape, device="cuda", generator=g).bfloat16()
            for shape in ((tokens, K), (N, K), (N,), (tokens, N))
        )
        seed = torch.tensor(n, device="cuda") if stochastic else None
        args = (x, w, bias, *forward, *backward, False, True)
        y, *x_columns = recipe_linear._forward(*args)
        assert_same_bytes_each(recipe_linear.recipe_linear_op(*args), (y, *x_columns))
        args = (dy, w, *x_columns, seed, *backward, *backward, False, w.dtype, bias.dtype)
        wanted = recipe_linear._backward(*args)
        assert_same_bytes_each(recipe_linear.recipe_linear_backward_op(*args), wanted)
        held += [x, w, bias, dy]
    # Those of the other calls are of single quantizers.
    assert sum(len(r.steps) >= 5 for r in replays) == 6


def assert_same_bytes_each(got, want):
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a, b)


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


# --- torch's own ops, which need no GPU -----------------------------------------------------------


def chain(x, w):
    """Views, a result in place, one written to a part of another, one in another dtype, and a tuple."""
    h = torch.mm(x[:, :4], w.t()[:4]).mul_(2)
    y = x.new_empty((len(x), 6))
    torch.mm(x, w.t(), out=y[:, :3])
    y[:, 3:].copy_(h.view(-1).view(len(x), 3))
    values, index = y.to(torch.promote_types(x.dtype, torch.float32)).sort(1)
    bits = values.view(torch.int32)[:, ::2] + 1
    return values + 1, index.contiguous(), bits.clone()


def of_two_parts(x, w):
    """A scratch that is written by parts and read as another dtype."""
    scratch = torch.empty((2, *x.shape), device=x.device)
    torch.add(x, 1, out=scratch[0])
    scratch[1].copy_(x)
    return (scratch.view(torch.int32).sum(0),)


@pytest.mark.parametrize("op", [chain, of_two_parts], ids=lambda op: op.__name__)
def test_calls_of_torch_are_replayed(op, replays, kernel_device):
    call, held = _replay.replayed(op), []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(n, 8, generator=g).to(kernel_device) for n in (5, 3))
        held += [x, w]
        x_before = x.clone()
        assert_equal(call(x, w), op(x, w))
        assert torch.equal(x, x_before)
    assert len(replays) == 3


class AddOne:
    """A compiled kernel as far as a recording knows it: int64 ``target = source + 1``, by address, here on the CPU."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.recorded = 0  # launches that a profiler's hooks were told of

    def __getitem__(self, grid):
        assert grid == (1, 1, 1)

        def launch(source, target, n, stream):
            self.recorded += 1
            self.add(source, target, n)

        return launch

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (x, y, z, function, metadata) == (1, 1, 1, "function", "metadata")
        assert launch_metadata is enter is leave is None
        self.add(*arguments)

    def add(self, source, target, n):
        numbers = ctypes.c_int64 * n
        values = [value + 1 for value in numbers.from_address(source)]
        numbers.from_address(target)[:] = values

    def launch(self, source, target):
        n = source.numel()
        self.add(source.data_ptr(), target.data_ptr(), n)
        if launches.recording is not None:
            launches.recording.append((self, (1,), [source, target, n]))


class AddOneToATuple(AddOne):
    """The same with its operands as a tuple, beside tuples without tensors."""

    def run(self, *arguments):
        *others, strides, operands, size = arguments
        assert strides == (1, (2, 3)) and type(operands) is tuple
        source, target, nothing, factor = operands
        assert nothing is None and factor == 0.5
        super().run(*others, source, target, *size)

    def launch(self, source, target):
        n = source.numel()
        self.add(source.data_ptr(), target.data_ptr(), n)
        if launches.recording is not None:
            arguments = [(1, (2, 3)), (source, target, None, 0.5), (n,)]
            launches.recording.append((self, (1,), arguments))


def of_launches_with_tuples(x):
    y = torch.empty((2, len(x)), dtype=x.dtype)
    AddOneToATuple().launch(x, y[1])
    AddOneToATuple().launch(y[1], y[0])
    return (y + 0,)


def test_tuples_of_tensors_are_replayed(replays):
    call = _replay.replayed(of_launches_with_tuples)
    for seed in range(5):
        x = torch.arange(3) + seed
        assert_equal(call(x), (torch.stack([x + 2, x + 1]),))
    assert len(replays) == 3


def of_launches(x):
    """Two scratches at most are there at a time, at addresses that come up again."""
    for _ in range(6):
        y = torch.empty_like(x)
        AddOne().launch(x, y)
        x = y
    return (x,)


def of_calls(x):
    y = x + 1
    for _ in range(5):
        y = y + 1
    return (y,)


def test_launches_are_replayed(replays):
    call, held = _replay.replayed(of_launches), []
    for seed in range(5):
        held.append(torch.arange(3) + seed)
        assert_equal(call(held[-1]), (held[-1] + 6,))
    assert len(replays) == 3


@pytest.mark.parametrize("is_recorded", [False, True], ids=["met_inside_alone", "recorded_before"])
def test_an_op_in_an_op_is_its_own_launches_and_calls(is_recorded, replays):
    """Not a call of the dispatcher's; a recording of its own is not replayed into the outer one."""

    def inner(x):
        y = torch.empty_like(x)
        AddOne().launch(x, y)
        return y * 2

    inner_call = _replay.replayed(inner)
    options = dict(cpu=inner_call, cuda=inner_call, fake=torch.empty_like)
    name = f"add_one_and_double_{is_recorded}".lower()
    inner_op = define_op(name, "(Tensor x) -> Tensor", **options)
    for n in range(3 * is_recorded):
        x = torch.arange(3) + n
        assert torch.equal(inner_op(x), (x + 1) * 2)
    assert len(replays) == is_recorded
    replays.clear()

    def outer(x):
        y = torch.empty_like(x)
        AddOne().launch(inner_op(x + 1), y)
        return (inner_op(y),)

    call, seen = _replay.replayed(outer), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for n in range(4):
        x = torch.arange(3) + n
        with Watch():
            assert_equal(call(x), ((((x + 2) * 2) + 2) * 2,))
    assert [len(recording.steps) for recording in replays][-2:] == [6, 6]
    assert seen.count(inner_op) == 2  # of the first call alone


def test_profilers_hear_of_replayed_launches(monkeypatch):
    kernel, x, y = AddOne(), torch.arange(3), torch.zeros(3, dtype=torch.long)
    launch = runner(kernel, (1,))
    arguments = (x.data_ptr(), y.data_ptr(), 3)
    launch(*arguments, stream=0)
    assert kernel.recorded == 0 and torch.equal(y, x + 1)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launch(*arguments, stream=0)
    assert kernel.recorded == 1


@pytest.mark.parametrize(
    "op", [lambda x, n: x + n[0], lambda x, n: [x + n[0], x - n[0]]], ids=["one", "list"]
)
def test_results_are_of_the_ops_kind(op, replays):
    call = _replay.replayed(op)
    for value in range(4):
        x = torch.full((3,), float(value))
        got, want = call(x, [2, 3]), op(x, [2, 3])
        assert type(got) is type(want)
        assert_equal(list(got), list(want))
    assert torch.equal(torch.stack(list(call(x, [4, 3]))), torch.stack(list(op(x, [4, 3]))))
    assert len(replays) == 2


@pytest.mark.parametrize("op", [of_launches, of_calls], ids=lambda op: op.__name__)
def test_what_is_allocated_is_dropped_after_its_last_use(op):
    """As in the op, also while it is recorded, in the second call."""
    tracked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tracked.append(weakref.ref(result))
            alive.append(sum(ref() is not None for ref in tracked))
            return result

    call, x = _replay.replayed(op), torch.arange(3)
    for _ in range(4):
        alive = []
        with Watch():
            (y,) = call(x)
        assert torch.equal(y, x + 6)
        assert len(alive) == 6
        assert max(alive) == 2
        tracked.clear()


def test_a_tensor_from_outside_is_not_replayed(replays):
    """It is an input that no replay would be given anew."""
    outside = torch.ones(4)
    call = _replay.replayed(lambda x: (x + outside,))
    for value in range(4):
        outside = torch.full((4,), float(value))
        assert_equal(call(torch.ones(4)), (torch.full((4,), value + 1.0),))
    assert not replays


@pytest.mark.parametrize(
    "op",
    [
        lambda x: (x * x.sum().item(),),
        lambda x: (x[x > 1],),
        lambda x: (x.view(-1),),
        lambda x: (x[:0] + 1, x + 1),
    ],
    ids=["of_a_number", "of_unknown_size", "of_its_input", "empty"],
)
def test_what_cannot_be_replayed_is_not(op, replays):
    call = _replay.replayed(op)
    for value in range(5):
        x = torch.full((4,), float(value))
        assert_equal(call(x), op(x))
    assert not replays


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
