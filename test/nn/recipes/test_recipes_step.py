"""The recipe in a training step: what backward keeps, autocast, checkpointing, torch.compile, a transformer."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from _grids import (
    BASES,
    assert_close,
    assert_same_bytes,
    linear,
    name_of,
    prepare,
    quantize,
    randn,
)
from _recipes import (
    CONFIG,
    CONVERT,
    STOCHASTIC,
    K,
    N,
    each_dtype,
    recipe,
    step,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from torchao_mx import (
    MXFP8_E4M3,
    NVFP4MXFP8Linear,
    reference,
)
from torchao_mx.ops.block_scaled import recipe_linear as OP


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    model, x = recipe(), randn(33, K).requires_grad_()
    tensors = {"x": x, **dict(model[0].named_parameters())}
    tensors[frozen].requires_grad_(False)
    model(x).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is None} == {frozen}
    reference_model, other = recipe(), randn(33, K).requires_grad_()
    reference_model(other).sum().backward()
    whole = {"x": other, **dict(reference_model[0].named_parameters())}
    for name in tensors.keys() - {frozen}:
        assert_same_bytes(tensors[name].grad, whole[name].grad)


def saved_bytes(model, x):
    """What the forward pass saves for backward, parameters apart."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    for param in model.parameters():
        saved.pop(param.untyped_storage().data_ptr(), None)
    return sum(saved.values())


@each_dtype
def test_backward_keeps_the_packed_columns_of_x_alone(dtype):
    model, x = recipe(dtype=dtype), randn(100, K, dtype=dtype).requires_grad_()
    assert saved_bytes(model, x) == 128 * K * MXFP8_E4M3.bits_per_element / 8
    model[0].weight.requires_grad_(False)
    assert saved_bytes(model, x) == 0
    with torch.no_grad():
        assert saved_bytes(model.requires_grad_(), x) == 0


def test_evaluation_quantizes_no_columns(monkeypatch):
    asked = []
    op = OP.quantize_both_op
    monkeypatch.setattr(OP, "quantize_both_op", lambda *args: asked.append(args[5]) or op(*args))
    model = recipe()
    with torch.no_grad():
        model(randn(33, K))
    assert asked == [["row_values"], ["row_values"]]
    asked.clear()
    model(randn(33, K))
    assert asked == [["row_values", "columns"], ["row_values"]]


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "all"])
def test_ops(wanted, device):
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    x, w, dy = (
        randn(*shape, seed=n).to(device) for n, shape in enumerate([(33, K), (N, K), (33, N)])
    )
    forward, backward = ("nvfp4", "rceil"), ("mxfp8_e4m3", "rceil")
    keeps = wanted in ("weight", "all")
    args = (x, w, randn(N).to(device), *forward, *backward, False, keeps)
    opcheck(OP.recipe_linear_op, args, test_utils=utils)
    x_columns = OP.recipe_linear_op(*args)[1:] if keeps else (None, None)
    args = (
        dy, w if wanted in ("x", "all") else None, *x_columns, None, *backward, *backward, False, w.dtype,
        torch.bfloat16 if wanted in ("bias", "all") else None,
    )  # fmt: skip
    opcheck(OP.recipe_linear_backward_op, args, test_utils=utils)
    assert len(OP.recipe_linear_backward_op(*args)) == (3 if wanted == "all" else 1)


def test_a_weight_changed_before_backward_is_noticed():
    model, x = recipe(), randn(33, K).requires_grad_()
    y = model(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_autocast(device):
    model, x, dy = recipe(device=device), randn(33, K), randn(33, N, seed=3)
    x = x.to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = model(x)
    y.backward(dy.to(device).bfloat16())
    assert y.dtype == torch.bfloat16
    grads = [p.grad for p in (x, *model.parameters())]
    assert {g.dtype for g in grads} == {torch.float32}
    products = reference.recipe_products(
        x.detach().cpu().bfloat16(), model[0].weight.detach().cpu(), dy.bfloat16(),
        CONFIG.forward_spec, CONFIG.backward_spec, CONFIG.grad_spec,
    )  # fmt: skip
    expected = [a.double() @ b.double() for a, b in (products.dx, products.dw)]
    for grad, wanted in zip(grads, [*expected, dy.bfloat16().double().sum(0)], strict=True):
        assert_close(grad.cpu(), wanted, torch.bfloat16)
    quantize(model, CONVERT)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradient_checkpointing(use_reentrant):
    model, x, dy = recipe(), randn(33, K), randn(33, N, seed=3)
    plain = step(model, x, dy)
    run = nn.Sequential(model)
    run.forward = lambda x: checkpoint(model, x, use_reentrant=use_reentrant)
    for actual, expected in zip(step(run, x, dy), plain, strict=True):
        assert_same_bytes(actual, expected)


def test_second_derivatives_are_refused():
    model, x = recipe(), randn(5, K).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def network(config=CONFIG, dtype=torch.float32, device="cpu"):
    layers = (
        *linear(dtype=dtype, device=device),
        nn.GELU(),
        *linear(bias=False, dtype=dtype, device=device, k=N, n=32),
    )
    return quantize(nn.Sequential(*layers), config)


@pytest.mark.parametrize("config", [CONFIG, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_compiled_whole_is_eager(config, dtype):
    """fullgraph=True refuses any graph break; aot_eager traces forward and backward."""
    torch._dynamo.reset()
    model = network(config, dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((5,), (2, 33)):
        x, dy = (randn(*shape, n, dtype=dtype, seed=n) for n in (K, 32))
        results = []
        for run in (compiled, model):
            torch.manual_seed(0)
            results.append(step(run, x, dy))
        for actual, expected in zip(*results, strict=True):
            assert_same_bytes(actual, expected)


def test_dynamic_shapes_do_not_recompile():
    """Of more rows than a block, whole blocks or not (a single one is a case of its own to torch.compile)."""
    torch._dynamo.reset()
    model, graphs = network(), []
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (33, 64, 100):
        x, dy = randn(rows, K), randn(rows, 32, seed=3)
        for actual, expected in zip(step(compiled, x, dy), step(model, x, dy), strict=True):
            assert_same_bytes(actual, expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_inductor(device):
    torch._dynamo.reset()
    model = network(device=device)
    compiled = torch.compile(model, fullgraph=True)
    x, dy = randn(33, K).to(device), randn(33, 32, seed=3).to(device)
    for actual, expected in zip(step(compiled, x, dy), step(model, x, dy), strict=True):
        assert_close(actual, expected)


class Block(nn.Module):
    """Pre-norm attention and a gated MLP: every place where the recipe is used."""

    def __init__(self, dim=64, heads=2, hidden=96):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.RMSNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


@pytest.mark.parametrize("config", [CONFIG, STOCHASTIC], ids=["nearest", "stochastic"])
def test_a_transformer_block_trains(config, device):
    """As far as quantization-aware training does, whose backward is in high precision; then it converts."""
    losses = {}
    for name in ("qat", "recipe"):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block()).to(device)
        if name == "recipe":
            quantize(model, config)
            layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
            assert len(layers) == 12 and all(type(m) is NVFP4MXFP8Linear for m in layers)
        else:
            prepare(model, BASES["nvfp4"])
        x, target = torch.randn(2, 8, 21, 64).to(device)  # 168 tokens, no whole blocks
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[name] = []
        for _ in range(40):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["recipe"][0] == losses["qat"][0]
    assert losses["recipe"][-1] < 0.15 * losses["recipe"][0]
    assert losses["recipe"][-1] < 1.1 * losses["qat"][-1]
    trained = model(x)
    assert torch.equal(quantize(model, CONVERT)(x), trained)


@pytest.mark.gpu
def test_a_step_waits_for_nothing_and_replays():
    """No synchronisation; a CUDA graph's replays round anew, and otherwise compute the same."""
    for config, is_same in ((CONFIG, True), (STOCHASTIC, False)):
        model = recipe(config, dtype=torch.bfloat16, device="cuda")
        x = randn(100, K, dtype=torch.bfloat16).cuda().requires_grad_()
        dy = randn(100, N, dtype=torch.bfloat16, seed=3).cuda()

        def gradients(model=model, x=x, dy=dy):
            return torch.autograd.grad(model(x), (x, model[0].weight), dy)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradients()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
        draws = []
        for _ in range(2):
            graph.replay()
            draws.append([t.clone() for t in captured])
        assert [torch.equal(a, b) for a, b in zip(*draws, strict=True)] == [is_same] * 2
