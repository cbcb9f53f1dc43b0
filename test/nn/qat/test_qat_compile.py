"""QAT in a training step: what backward keeps, autocast, gradient checkpointing, torch.compile."""

import pytest
import torch
from _grids import (
    BASES,
    DTYPES,
    assert_close,
    assert_same_bytes,
    convert,
    linear,
    name_of,
    prepare,
    quantized,
    randn,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

K, N = 64, 96
SOME = {name: BASES[name] for name in ("w4a16", "w4a4", "w4a8", "nvfp4")}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
some_bases = pytest.mark.parametrize("base", SOME.values(), ids=SOME)


def network(dtype=torch.float32, device="cpu"):
    return nn.Sequential(
        *linear(dtype=dtype, device=device),
        nn.GELU(),
        *linear(bias=False, dtype=dtype, device=device, k=N, n=32),
    )


def saved_for_backward(model, x):
    """{storage: bytes} of what the forward pass saves, parameters apart."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    for param in model.parameters():
        saved.pop(param.untyped_storage().data_ptr(), None)
    return saved


def packed_bytes(tensor, spec):
    per_tensor = 4 if spec.format.has_per_tensor_scale else 0
    return tensor.numel() * spec.format.bits_per_element / 8 + per_tensor


@each_base
@each_dtype
def test_backward_keeps_packed_operands(base, dtype):
    model, x = prepare(linear(dtype=dtype), base), randn(128, K, dtype=dtype).requires_grad_()
    saved = saved_for_backward(model, x)
    weight = packed_bytes(model[0].weight, base.weight_spec)
    if base.activation_spec is None:  # the caller's own x, by reference
        assert saved.pop(x.untyped_storage().data_ptr())
        assert sum(saved.values()) <= weight
    else:
        assert x.untyped_storage().data_ptr() not in saved
        assert sum(saved.values()) <= weight + packed_bytes(x, base.activation_spec)


def test_backward_keeps_nothing_that_it_will_not_need():
    x = randn(128, K)
    model = prepare(linear(), BASES["w4a4"])
    assert sum(saved_for_backward(model, x).values()) == packed_bytes(
        x, BASES["w4a4"].activation_spec
    )
    model[0].weight.requires_grad_(False)
    weight = packed_bytes(model[0].weight, BASES["w4a4"].weight_spec)
    assert sum(saved_for_backward(model, x.requires_grad_()).values()) == weight
    with torch.no_grad():
        assert not saved_for_backward(model, x)


@some_bases
def test_under_autocast(base):
    model, x, dy = linear(), randn(5, K), randn(5, N, seed=3)
    prepare(model, base)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.requires_grad_())
    y.backward(dy.bfloat16())
    assert y.dtype == torch.bfloat16
    grads = [p.grad for p in (x, *model.parameters())]
    assert {g.dtype for g in grads} == {torch.float32}
    wq = quantized(model[0].weight, base.weight_spec).double()
    xq = quantized(x.detach().bfloat16(), base.activation_spec).double()
    expected = (dy.double() @ wq, dy.double().mT @ xq, dy.double().sum(0))
    for grad, wanted in zip(grads, expected, strict=True):
        assert_close(grad, wanted, torch.bfloat16)
    convert(model, base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@some_bases
def test_gradient_checkpointing(base, use_reentrant):
    model = prepare(network(), base)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        x = randn(5, K).requires_grad_()
        run(x).square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for actual, expected in zip(*grads, strict=True):
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("base", [BASES["w4a16"], BASES["w4a4"]], ids=["w4a16", "w4a4"])
def test_second_derivatives_are_right_or_refused(base):
    """A gradient penalty; straight through, it is that of the plain product of quantized operands."""
    model, x = prepare(linear(bias=False), base), randn(5, K).requires_grad_()
    try:
        penalty(model, x).backward()
    except RuntimeError:
        return
    operands = ((x, base.activation_spec), (model[0].weight, base.weight_spec))
    xq, wq = (quantized(t, spec).double().requires_grad_() for t, spec in operands)
    penalty(lambda xq: xq @ wq.mT, xq).backward()
    assert_close(model[0].weight.grad, wq.grad)


def penalty(model, x):
    """The squared norm of a loss's gradient in x."""
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return dx.square().sum()


def run(model, x, dy):
    """The output, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]


@some_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_compiled_whole_is_eager(base, dtype):
    """fullgraph=True refuses any graph break; aot_eager traces forward and backward."""
    torch._dynamo.reset()
    model = prepare(network(dtype), base)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((5,), (2, 3)):
        x, dy = (randn(*shape, n, dtype=dtype, seed=n) for n in (K, 32))
        for actual, expected in zip(run(compiled, x, dy), run(model, x, dy), strict=True):
            assert_same_bytes(actual, expected)


def test_dynamic_shapes_do_not_recompile():
    torch._dynamo.reset()
    model = prepare(network(), BASES["w4a4"])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 5, 8):
        x, dy = randn(rows, K), randn(rows, 32, seed=3)
        for actual, expected in zip(run(compiled, x, dy), run(model, x, dy), strict=True):
            assert_same_bytes(actual, expected)
    assert counter.frame_count == 1


def test_converted_model_compiles_whole():
    torch._dynamo.reset()
    base = BASES["w4a8"]
    model = convert(prepare(network(), base), base)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, dy = randn(5, K), randn(5, 32, seed=3)
    for actual, expected in zip(run(compiled, x, dy), run(model, x, dy), strict=True):
        assert_same_bytes(actual, expected)


def test_compiled_under_autocast():
    torch._dynamo.reset()
    model = prepare(network(), BASES["w4a4"])

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x = randn(5, K)
    assert compiled(x).dtype == torch.bfloat16
    assert torch.equal(compiled(x), forward(x))


@pytest.mark.parametrize("base", [BASES["w4a4"]], ids=["w4a4"])
def test_inductor(base, device):
    """With its own kernels for what is around our ops: GELU's rounding may differ."""
    torch._dynamo.reset()
    model = prepare(network(device=device), base)
    compiled = torch.compile(model, fullgraph=True)
    x, dy = randn(8, K).to(device), randn(8, 32, seed=3).to(device)
    for actual, expected in zip(run(compiled, x, dy), run(model, x, dy), strict=True):
        assert_close(actual, expected)
