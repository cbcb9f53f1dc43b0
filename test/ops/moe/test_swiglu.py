"""swiglu: values and every gradient against float64, on the CPU, in kernels, and compiled."""

import pytest
import torch
from _grids import DTYPES, generator, name_of, refusals, relative_error
from expecttest import assert_expected_inline
from torch.library import opcheck

from torchao_mx import ops, reference
from torchao_mx.ops.core.register import implementations
from torchao_mx.ops.moe.swiglu import swiglu_backward_op, swiglu_op

OPS = torch.ops.torchao_mx
PLAIN = dict(alpha=1.0, limit=None, up_offset=0.0)
GPT_OSS = dict(alpha=1.702, limit=7.0, up_offset=1.0)
# Triton's interpreter truncates to bfloat16: dx, and then the sum of its rows.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
C = 43  # of y: rows of no multiple of 16 bytes

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
each_layout = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
each_kind = pytest.mark.parametrize("kind", [PLAIN, GPT_OSS], ids=["plain", "gpt_oss"])

# Rows of each expert (None: no offs), rows of nobody, and whether there is a bias.
ROUTINGS = {
    "dense": (None, 11, False),
    "dense_bias": (None, 11, True),
    "dense_one_row": (None, 1, True),
    "dense_no_rows": (None, 0, True),
    "ragged": ([3, 0, 9, 1], 5, True),
    "no_bias": ([3, 0, 9, 1], 5, False),
    "first_and_last_empty": ([0, 8, 8, 0], 0, True),
    "one_expert": ([9], 2, True),
    "one_row": ([0, 1, 0], 0, True),
    "nobody": ([0, 0], 3, True),
    "no_rows": ([0, 0], 0, True),
}
each_routing = pytest.mark.parametrize("routing", ROUTINGS)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def halves_of(x, interleaved):
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def activation(x, *, interleaved, alpha, limit, up_offset):
    """transformers' GptOssExperts, its numbers given names."""
    gate, up = halves_of(x, interleaved)
    gate = gate.clamp(min=None, max=limit) if limit is not None else gate
    up = up.clamp(min=-limit, max=limit) if limit is not None else up
    glu = gate * torch.sigmoid(gate * alpha)
    return (up + up_offset) * glu


def case(routing, dtype, columns=C):
    """(x, bias or None, offs or None, dy), NaN in the rows of nobody."""
    counts, others, has_bias = ROUTINGS[routing]
    owned = sum(counts or [])
    n_rows = owned + others
    x, dy = 4 * randn(n_rows, 2 * columns), randn(n_rows, columns, seed=1)
    offs, lead = None, ()
    if counts is not None:
        offs, lead = torch.tensor(counts).cumsum(0).int(), (len(counts),)
        x[owned:], dy[owned:] = float("nan"), float("nan")
    bias = randn(*lead, 2 * columns, seed=2).to(dtype) if has_bias else None
    return x.to(dtype), bias, offs, dy.to(dtype)


def expected(x, bias, offs, dy, **options):
    """(y, dx, dbias if there is a bias) by torch's autograd, float64 on the CPU."""
    x, dy = x.cpu().double().requires_grad_(), dy.cpu().double()
    leaves = [x] if bias is None else [x, bias.cpu().double().requires_grad_()]
    owned = len(x) if offs is None else int(offs[-1])
    rows = x[:owned]
    if bias is not None:
        ends = torch.tensor([owned]) if offs is None else offs.cpu().long()
        counts = ends.diff(prepend=torch.tensor([0]))
        rows = rows + leaves[1].view(-1, x.shape[1]).repeat_interleave(counts, 0)
    y = activation(rows, **options)
    grads = torch.autograd.grad(y, leaves, dy[:owned])
    return torch.cat([y, y.new_zeros(len(x) - owned, y.shape[1])]), *grads


def by_op(x, bias, offs, dy, **options):
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    y = ops.swiglu(leaves[0], bias=None if bias is None else leaves[1], offs=offs, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def by_kernels(x, bias, offs, dy, interleaved, alpha, limit, up_offset):
    args = (bias, offs, interleaved, alpha, limit, up_offset)
    forward, backward = (implementations[op, "cuda"] for op in (swiglu_op, swiglu_backward_op))
    dx, dbias = backward(dy, x, *args, bias is not None)
    return forward(x, *args), dx, *([] if bias is None else [dbias])


def check(actual, wanted, dtype=None):
    """By value: a gradient that is twice what it should be fails. Zeros are zeros."""
    assert actual.shape == wanted.shape
    actual = actual.detach().cpu()
    assert not actual[wanted == 0].any()
    if wanted.any():
        assert relative_error(actual, wanted) <= BOUND[dtype or actual.dtype]
        assert relative_error(2 * actual, wanted) > 0.9


def check_case(run, device, routing, dtype, **options):
    x, bias, offs, dy = [None if t is None else t.to(device) for t in case(routing, dtype)]
    results = run(x, bias, offs, dy, **options)
    for actual, want in zip(results, expected(x, bias, offs, dy, **options), strict=True):
        assert actual.dtype == dtype
        check(actual, want)
    if device == "cuda":  # the interpreter has one order of doing things
        again = run(x, bias, offs, dy, **options)
        assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))


@each_routing
@each_dtype
@each_layout
@each_kind
def test_op(kind, interleaved, dtype, routing, device, poisoned):
    check_case(by_op, device, routing, dtype, interleaved=interleaved, **kind)


# In the interpreter, which is slow; on a GPU the op is these kernels.
@pytest.mark.parametrize(
    ("dtype", "routing"),
    [
        *((torch.float32, routing) for routing in ROUTINGS),
        *(
            (dtype, routing)
            for dtype in DTYPES[1:]
            for routing in ("dense_bias", "ragged", "no_bias")
        ),
    ],
    ids=name_of,
)
@each_layout
@each_kind
def test_kernels(kind, interleaved, dtype, routing, kernel_device, poisoned):
    check_case(by_kernels, kernel_device, routing, dtype, interleaved=interleaved, **kind)


@each_layout
@pytest.mark.parametrize("columns", [1, 16, 256, 300])
def test_columns(columns, interleaved, kernel_device, poisoned):
    x, bias, offs, dy = (t.to(kernel_device) for t in case("ragged", torch.float32, columns))
    options = dict(interleaved=interleaved, **GPT_OSS)
    wanted = expected(x, bias, offs, dy, **options)
    for actual, want in zip(by_kernels(x, bias, offs, dy, **options), wanted, strict=True):
        check(actual, want)


@each_layout
def test_views(interleaved, device, kernel_device, poisoned):
    """Rows apart, repeated rows, columns apart, and a gradient that is one number."""
    options, ends = dict(interleaved=interleaved, **PLAIN), torch.tensor([2, 4, 11]).int()
    for run, where in ((by_op, device), (by_kernels, kernel_device)):
        tensors = randn(22, 70), randn(64, 11), randn(11, 80, seed=1), torch.ones(()), ends
        whole, columns, wide, one, offs = (t.to(where) for t in tensors)
        for x in (whole[::2, 3:67], whole[:1, :64].expand(11, -1), columns.t()):
            for dy in (wide[:, 5:37], one.expand(11, 32)):
                args = (x, wide[::4, :64], offs, dy)
                wanted = expected(*args, **options)
                for actual, want in zip(run(*args, **options), wanted, strict=True):
                    check(actual, want)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's
@each_layout
@each_kind
def test_special_values(kind, interleaved, device, kernel_device):
    """At the limits, beyond and around fp32's ends: torch's values and NaNs, forward and backward."""
    inf, below, above = float("inf"), 7 - 2**-21, 7 + 2**-21
    values = [0, 1, below, 7, above, 30, 2e38, 3.4e38, inf]
    values = torch.tensor([*values, *(-v for v in values), float("nan")])
    gate, up = torch.cartesian_prod(values, values).unbind(1)
    x = (torch.stack((gate, up), -1).flatten() if interleaved else torch.cat((gate, up)))[None]
    dy, options = torch.ones(1, len(gate)), dict(interleaved=interleaved, **kind)
    y, dx = (t.float() for t in expected(x, None, None, dy, **options))
    # Of an infinite product torch takes inf * 0 where its slope is what counts.
    has_slope = torch.ones_like(up, dtype=bool) if kind is GPT_OSS else ~up.isinf()
    for run, where in ((by_op, device), (by_kernels, kernel_device)):
        results = run(x.to(where), None, None, dy.to(where), **options)
        gradients = zip(*(halves_of(t.cpu(), interleaved) for t in (results[1], dx)), strict=True)
        (dgate, want_dgate), dup = gradients
        gates = dgate[:, has_slope], want_dgate[:, has_slope]
        for actual, want in ((results[0].cpu(), y), gates, dup):
            torch.testing.assert_close(actual, want, rtol=2e-5, atol=1e-30, equal_nan=True)


@each_layout
@each_kind
def test_reference_in_float64(kind, interleaved):
    """Its backward is the derivative of its forward."""
    x, bias, offs, dy = case("ragged", torch.float64, columns=3)
    options = (offs, interleaved, *kind.values())
    leaves = [x.nan_to_num().requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, b: reference.swiglu(x, b, *options), leaves)
    wanted = torch.autograd.grad(reference.swiglu(*leaves, *options), leaves, dy.nan_to_num())
    dx = reference.swiglu_backward(dy, x, bias.detach(), *options)
    torch.testing.assert_close(dx, wanted[0])
    torch.testing.assert_close(reference.group_sum(dx, offs, torch.float64), wanted[1])


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (2, 0, 8)])
def test_leading_axes(shape, device):
    x = randn(*shape).to(device).requires_grad_()
    y = ops.swiglu(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    wide = x.detach().cpu().double().requires_grad_()
    activation(wide, interleaved=False, **PLAIN).sum().backward()
    check(x.grad, wide.grad)


def test_bias_of_another_dtype(device, kernel_device):
    for run, where in ((by_op, device), (by_kernels, kernel_device)):
        x, bias, offs, dy = (t.to(where) for t in case("ragged", torch.bfloat16))
        args, options = (x, bias.float() / 3, offs, dy), dict(interleaved=True, **GPT_OSS)
        y, dx, dbias = run(*args, **options)
        assert (y.dtype, dx.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        for actual, want in zip((y, dx, dbias), expected(*args, **options), strict=True):
            check(actual, want, torch.bfloat16)


@pytest.mark.parametrize("needs", ["x", "bias"])
def test_gradients_only_where_they_are_wanted(needs, device):
    x, bias, offs, dy = (t.to(device) for t in case("ragged", torch.float32))
    leaf = (x if needs == "x" else bias).requires_grad_()
    ops.swiglu(x, bias=bias, offs=offs, interleaved=False).backward(dy)
    assert [t.grad is not None for t in (x, bias)] == [needs == "x", needs == "bias"]
    wanted = expected(x.detach(), bias.detach(), offs, dy, interleaved=False, **PLAIN)
    check(leaf.grad, wanted[1 if needs == "x" else 2])


def test_under_autocast():
    x, bias = randn(5, 8).requires_grad_(), randn(8, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.swiglu(x, bias=bias)
    grads = torch.autograd.grad(y.sum(), (x, bias))
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.float32, torch.float32]
    x, bias = (t.detach() for t in (x, bias))
    wanted = expected(x.bfloat16(), bias, None, torch.ones(5, 4), interleaved=False, **PLAIN)
    for actual, want in zip((y, *grads), wanted, strict=True):
        check(actual, want, torch.bfloat16)


# --- compilation ----------------------------------------------------------------------------------


def op_cases():
    for routing in ("dense", "dense_bias", "ragged", "no_bias"):
        x, bias, offs, dy = case(routing, torch.float32, columns=6)
        x, dy, options = x.nan_to_num(), dy.nan_to_num(), (True, *GPT_OSS.values())
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, bias)]
        yield f"swiglu-{routing}", OPS.swiglu, (*leaves, offs, *options)
        args = (dy, x, bias, offs, *options, bias is not None)
        yield f"swiglu_backward-{routing}", OPS.swiglu_backward, args


OP_CASES = {name: (op.default, args) for name, op, args in op_cases()}


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck(case):
    op, args = OP_CASES[case]
    utils = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    opcheck(op, args, test_utils=utils)  # fmt: skip


@each_layout
def test_compiles_in_one_graph(interleaved, device):
    def run(x, bias, offs, alpha):
        hidden = ops.swiglu(
            2 * x, interleaved=interleaved, alpha=alpha, limit=7, up_offset=1, bias=bias, offs=offs
        )
        return ops.swiglu(hidden, interleaved=interleaved)  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for routing in ("ragged", "first_and_last_empty"):
        x, bias, offs, _ = (t.to(device) for t in case(routing, torch.bfloat16, columns=32))
        for alpha in (1.702, 1.5):
            results = []
            for function in (run, compiled):
                leaves = [t.detach().requires_grad_() for t in (x, bias)]
                y = function(*leaves, offs, alpha)
                results.append((y, *torch.autograd.grad(y.sum(), leaves)))
            for eager, other in zip(*results, strict=True):
                assert eager.any() and torch.equal(eager, other)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Experts' offsets are read on the device: a captured step follows new ones."""
    x, bias, offs, dy = (t.cuda() for t in case("ragged", torch.bfloat16))
    options = dict(interleaved=True, **GPT_OSS)
    by_kernels(x, bias, offs, dy, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = by_kernels(x, bias, offs, dy, **options)
    offs.copy_(torch.tensor([1, 7, 7, 12]))
    graph.replay()
    for actual, want in zip(results, by_kernels(x, bias, offs, dy, **options), strict=True):
        assert torch.equal(actual, want)


@pytest.mark.gpu
@each_layout
def test_past_2_31_elements(interleaved):
    n_rows, columns, last = 2**17 + 64, 2**13 + 32, 64
    x = torch.zeros(n_rows, 2 * columns, dtype=torch.bfloat16, device="cuda")
    x[-last:] = randn(last, 2 * columns, dtype=torch.bfloat16).cuda()
    dy = torch.ones(1, columns, dtype=torch.bfloat16, device="cuda").expand(n_rows, -1)
    options = dict(interleaved=interleaved, **GPT_OSS)
    y, dx = by_kernels(x, None, None, dy, **options)
    wanted = expected(x[-last:], None, None, dy[-last:], **options)
    check(y[-last:], wanted[0])
    check(dx[-last:], wanted[1])


@pytest.mark.gpu
def test_device_need_not_be_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.ones(9, 32, device="cuda:1", requires_grad=True)
    y = ops.swiglu(x)
    y.sum().backward()
    check(y, activation(torch.ones(9, 32), interleaved=False, **PLAIN))
    assert x.grad.isfinite().all()


# --- what is refused ------------------------------------------------------------------------------


def test_second_derivatives_are_refused(device):
    x = randn(3, 8).to(device).requires_grad_()
    (dx,) = torch.autograd.grad(ops.swiglu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu has no second derivative"):
        dx.sum().backward()


def test_refusals():
    x, bias, offs = randn(6, 8), randn(2, 8), torch.tensor([2, 6]).int()
    nan, inf = float("nan"), float("inf")

    def f(x=x, **kwargs):
        return lambda: ops.swiglu(x, **kwargs)

    assert_expected_inline(
        refusals(
            [
                f(x.double()),
                f(x.int()),
                f(x[:, 1:]),
                f(x[:, :0]),
                f(x[0, 0]),
                f(alpha=nan),
                f(alpha=-inf),
                f(alpha=torch.tensor(1.0)),
                f(alpha=None),
                f(up_offset=inf),
                f(limit=0.0),
                f(limit=-7),
                f(limit=nan),
                f(limit="7"),
                f(offs=offs.long()),
                f(offs=offs.to("meta")),
                f(offs=offs[None]),
                f(offs=offs[:0]),
                f(x[None], offs=offs),
                f(x[0], offs=offs),
                f(offs=torch.tensor([4, 2]).int()),
                f(offs=torch.tensor([4, 7]).int()),
                f(bias=bias),
                f(bias=bias[0, :4]),
                f(bias=bias[0], offs=offs),
                f(bias=bias[:1], offs=offs),
                f(bias=bias.double(), offs=offs),
                f(bias=bias.to("meta"), offs=offs),
            ]
        ),
        """\
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
TypeError: x has dtype torch.int32; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (6, 7); its last axis must hold as many gates as ups: an even number of columns, at least 2
ValueError: x has shape (6, 0); its last axis must hold as many gates as ups: an even number of columns, at least 2
ValueError: x has shape (); its last axis must hold as many gates as ups: an even number of columns, at least 2
ValueError: alpha=nan; it must be a finite number
ValueError: alpha=-inf; it must be a finite number
TypeError: alpha is a Tensor; it must be a Python number: call .item() on a tensor once, outside the training loop
TypeError: alpha is a NoneType; it must be a Python number: call .item() on a tensor once, outside the training loop
ValueError: up_offset=inf; it must be a finite number
ValueError: limit=0.0; it must be a positive number, or None for no clamp
ValueError: limit=-7; it must be a positive number, or None for no clamp
ValueError: limit=nan; it must be a positive number, or None for no clamp
TypeError: limit is a str; it must be a Python number: call .item() on a tensor once, outside the training loop
TypeError: offs has dtype torch.int64; end offsets are int32: use offs.int()
ValueError: offs is on meta and x on cpu; move one with .to(device)
ValueError: offs has shape (1, 2); it must be [E], the end offsets of one group or more: use the cumulative sum of the groups' row counts
ValueError: offs has shape (0,); it must be [E], the end offsets of one group or more: use the cumulative sum of the groups' row counts
ValueError: x has shape (1, 6, 8) and offs (2,); with experts they must be [R, 2 C] and [E], E at least 1: flatten x's leading axes, or leave offs out
ValueError: x has shape (8,) and offs (2,); with experts they must be [R, 2 C] and [E], E at least 1: flatten x's leading axes, or leave offs out
ValueError: offs is [4, 2] for 6 row(s); end offsets must ascend from 0 and not exceed the number of rows: use the cumulative sum of the experts' row counts
ValueError: offs is [4, 7] for 6 row(s); end offsets must ascend from 0 and not exceed the number of rows: use the cumulative sum of the experts' row counts
ValueError: bias has shape (2, 8) and x (6, 8), without offs; the bias must be [8]
ValueError: bias has shape (4,) and x (6, 8), without offs; the bias must be [8]
ValueError: bias has shape (8,) and x (6, 8), with offs; the bias must be [2, 8]
ValueError: bias has shape (1, 8) and x (6, 8), with offs; the bias must be [2, 8]
TypeError: bias has dtype torch.float64; it must be bfloat16, float16 or float32: convert it with .to(torch.bfloat16)
ValueError: bias is on meta and x on cpu; move one with .to(device)""",
    )
