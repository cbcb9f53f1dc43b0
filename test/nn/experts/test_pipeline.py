"""Routing and the pipeline of experts: values and every gradient against a loop over experts in float64."""

import pytest
import torch
import torch.nn.functional as F
from _grids import generator, relative_error

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, MXTensor, ops
from torchao_mx.nn.experts import pipeline
from torchao_mx.tensor import LoRATensor

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
both_devices = pytest.mark.parametrize("device", ["cpu", CUDA])
E, H, INNER, K, RANK = 4, 64, 32, 2, 4


def silu_gate(x, offs=None):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# --- route ----------------------------------------------------------------------------------------


@both_devices
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_route_sorts_stably_and_leaves_strangers_behind(tokens, dtype, device):
    ids = torch.randint(0, E + 3, (tokens, K), generator=generator()).to(dtype)
    order, offs = ops.route(ids.to(device), E)
    assert order.dtype == offs.dtype == torch.int32
    slots = list(enumerate(ids.flatten().tolist()))
    groups = [[i for i, e in slots if e == wanted] for wanted in range(E)]
    strangers = [i for i, e in slots if e >= E]
    assert order.tolist() == [i for group in groups for i in group] + strangers
    assert offs.tolist() == torch.tensor([len(g) for g in groups]).cumsum(0).tolist()


def test_route_takes_negative_ids_for_strangers():
    order, offs = ops.route(torch.tensor([[-1, 1], [0, -5]]), 2)
    assert order.tolist() == [2, 1, 0, 3] and offs.tolist() == [1, 2]


def test_route_of_more_experts_than_a_narrow_key_holds():
    ids = torch.tensor([[40_000], [3], [39_999]])
    order, offs = ops.route(ids, 40_000)
    assert order.tolist() == [1, 2, 0] and offs[-1] == 2 and offs[39_998] == 1


@both_devices
def test_route_compiles(device):
    ids = torch.randint(0, E, (9, K), generator=generator()).to(device)
    compiled = torch.compile(ops.route, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(ids, E), ops.route(ids, E)))


def test_refusals_of_route():
    ids = torch.zeros(3, K, dtype=torch.int64)
    with pytest.raises(TypeError, match="expert ids must be integers"):
        ops.route(ids.float(), E)
    with pytest.raises(ValueError, match=r"\[T, k\]"):
        ops.route(ids.flatten(), E)
    with pytest.raises(ValueError, match="at least 1 expert"):
        ops.route(ids, 0)


# --- the layer ------------------------------------------------------------------------------------


class Layer:
    """Weights ``[E, in, out]`` of one kind, what they train, and their values in float64."""

    def __init__(self, kind, device, dtype, *, bias=True, stored_transposed=False, seed=0):
        g = generator(seed)

        def randn(*shape):
            return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(device, dtype)

        self.trained, self.stored, self.values = {}, [], []
        for name, (c, d) in {"gate_up": (H, 2 * INNER), "down": (INNER, H)}.items():
            w = randn(E, c, d) if stored_transposed else randn(E, d, c)
            if kind in FORMATS:
                packed = MXTensor.from_hp(w, FORMATS[kind])
                weight, values = packed, packed.dequantize(torch.float32).double()
            elif kind == "lora":
                packed = MXTensor.from_hp(w, MXFP4)
                n, k = w.shape[1:]
                a, b = randn(E, RANK, k).requires_grad_(), randn(E, n, RANK).requires_grad_()
                self.trained |= {f"{name}.a": a, f"{name}.b": b}
                weight = LoRATensor(packed, a, b, 0.5)
                values = packed.dequantize(torch.float32).double()
            else:
                weight = w.requires_grad_()
                self.trained[name] = weight
                values = None
            self.stored.append(weight)
            self.values.append(values)
        self.kind, self.stored_transposed = kind, stored_transposed
        self.biases = [None, None]
        if bias:
            self.biases = [randn(E, d).requires_grad_() for d in (2 * INNER, H)]
            self.trained |= {"gate_up_bias": self.biases[0], "down_bias": self.biases[1]}

    def wide(self, trained):
        """The two weights in float64, differentiable in ``trained``."""
        for name, values in zip(("gate_up", "down"), self.values, strict=True):
            if self.kind == "lora":
                values = values + 0.5 * trained[f"{name}.b"] @ trained[f"{name}.a"]
            elif values is None:
                values = trained[name]
            yield values if self.stored_transposed else values.mT


FORMATS = {"mxfp4": MXFP4, "mxfp8": MXFP8_E4M3, "nvfp4": NVFP4}


def loop(hidden, ids, weights, gate_up, down, gate_up_bias, down_bias):
    """A token and a slot at a time."""
    out = torch.zeros(len(hidden), H, dtype=torch.float64)
    rows = []
    for t in range(len(hidden)):
        total = out[t]
        for j in range(ids.shape[1]):
            e = ids[t, j].item()
            if e >= E:
                continue
            x = hidden[t] @ gate_up[e] + (0 if gate_up_bias is None else gate_up_bias[e])
            y = silu_gate(x) @ down[e] + (0 if down_bias is None else down_bias[e])
            total = total + weights[t, j] * y
        rows.append(total)
    return torch.stack(rows) if rows else out


def run(layer, hidden, ids, weights, **options):
    return pipeline.experts(
        hidden, ids, weights, *layer.stored, silu_gate, gate_up_bias=layer.biases[0],
        down_bias=layer.biases[1], transpose_weight=not layer.stored_transposed, n_experts=E, **options,
    )  # fmt: skip


def check(layer, tokens, dtype, device, *, strangers=False, k=K, bound=None, **options):
    g = generator(tokens)
    hidden = torch.randn(tokens, H, generator=g).to(device, dtype).requires_grad_()
    weights = torch.rand(tokens, k, generator=g).to(device).requires_grad_()
    ids = torch.rand(tokens, E + 2 * strangers, generator=g).topk(k).indices
    dout = torch.randn(tokens, H, generator=g).to(device, dtype)
    leaves = {"hidden": hidden, "weights": weights, **layer.trained}
    for leaf in leaves.values():
        leaf.grad = None
    out = run(layer, hidden, ids.to(device), weights, **options)
    assert out.dtype == dtype and out.shape == hidden.shape
    out.backward(dout)
    wide = {n: t.detach().cpu().double().requires_grad_() for n, t in leaves.items()}
    layer.values = [None if v is None else v.cpu() for v in layer.values]
    want = loop(
        wide["hidden"], ids, wide["weights"], *layer.wide(wide), wide.get("gate_up_bias"),
        wide.get("down_bias"),
    )  # fmt: skip
    want.backward(dout.cpu().double())
    bound = bound or {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
    results = {"out": (out, want)} | {n: (leaf.grad, wide[n].grad) for n, leaf in leaves.items()}
    for name, (got, expected) in results.items():
        assert got is not None and got.isfinite().all(), name
        if expected.norm() == 0:
            assert got.eq(0).all(), name
        else:
            assert relative_error(got.cpu(), expected) < bound, name
    return out


@pytest.mark.parametrize("stored_transposed", [False, True], ids=["x_w_t", "x_w"])
@pytest.mark.parametrize("kind", [*FORMATS, "lora", "plain"])
@pytest.mark.parametrize("tokens", [1, 23])
def test_values_and_gradients(kind, tokens, stored_transposed):
    layer = Layer(kind, "cpu", torch.float32, stored_transposed=stored_transposed)
    check(layer, tokens, torch.float32, "cpu")


@pytest.mark.parametrize("stored_transposed", [False, True], ids=["x_w_t", "x_w"])
@pytest.mark.parametrize("kind", [*FORMATS, "lora", "plain"])
def test_a_transposed_view_says_the_same(kind, stored_transposed):
    layer = Layer(kind, "cpu", torch.float32, stored_transposed=stored_transposed)
    hidden = torch.randn(9, H, generator=generator())
    weights = torch.rand(9, K, generator=generator())
    ids = torch.rand(9, E, generator=generator()).topk(K).indices
    want = run(layer, hidden, ids, weights)
    layer.stored = [w.mT for w in layer.stored]
    layer.stored_transposed = not stored_transposed
    assert torch.equal(run(layer, hidden, ids, weights), want)


@pytest.mark.gpu
@pytest.mark.parametrize("stored_transposed", [False, True], ids=["x_w_t", "x_w"])
@pytest.mark.parametrize("kind", [*FORMATS, "lora", "plain"])
@pytest.mark.parametrize("tokens", [1, 23, 300])
def test_values_and_gradients_on_the_gpu(kind, tokens, stored_transposed):
    layer = Layer(kind, "cuda", torch.bfloat16, stored_transposed=stored_transposed)
    check(layer, tokens, torch.bfloat16, "cuda")


@pytest.mark.parametrize("kind", ["mxfp4", "lora", "plain"])
def test_experts_of_other_ranks_add_nothing(kind):
    check(Layer(kind, "cpu", torch.float32), 23, torch.float32, "cpu", strangers=True)


@pytest.mark.parametrize("kind", ["mxfp4", "lora", "plain"])
def test_one_expert_a_token_and_no_biases(kind):
    check(Layer(kind, "cpu", torch.float32, bias=False), 11, torch.float32, "cpu", k=1)


@both_devices
@pytest.mark.parametrize("kind", ["mxfp4", "lora", "plain"])
def test_no_tokens(kind, device):
    layer = Layer(kind, device, torch.bfloat16)
    hidden = torch.randn(0, H, device=device).bfloat16().requires_grad_()
    out = run(
        layer, hidden, torch.zeros(0, K, dtype=torch.int64, device=device), torch.rand(0, K, device=device)
    )  # fmt: skip
    out.sum().backward()
    assert out.shape == (0, H) and hidden.grad.shape == (0, H)
    assert all(t.grad is None or t.grad.eq(0).all() for t in layer.trained.values())


@both_devices
@pytest.mark.parametrize("kind", ["mxfp4", "lora", "plain"])
def test_two_runs_are_bit_equal(kind, device):
    layer = Layer(kind, device, torch.bfloat16)
    hidden = torch.randn(65, H, generator=generator()).to(device).bfloat16()
    ids = torch.rand(65, E, generator=generator()).topk(K).indices.to(device)
    weights = torch.rand(65, K, generator=generator()).to(device)
    results = []
    for _ in range(2):
        leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        for t in layer.trained.values():
            t.grad = None
        out = run(layer, leaves[0], ids, leaves[1])
        out.sum().backward()
        results.append([out, *(t.grad for t in (*leaves, *layer.trained.values()))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ["mxfp4", "lora"])
def test_options_reach_both_products(kind, monkeypatch):
    name, seen = ("lora_grouped_mm" if kind == "lora" else "grouped_mm"), []
    op = getattr(ops, name)

    def watched(*args, **kwargs):
        seen.append(kwargs["strategy"])
        return op(*args, **kwargs)

    monkeypatch.setattr(ops, name, watched)
    check(Layer(kind, "cpu", torch.float32), 5, torch.float32, "cpu", strategy="unpack")
    assert seen == ["unpack", "unpack"]


@pytest.mark.parametrize("kind", ["mxfp4", "plain"])
def test_compiles_whole(kind):
    layer = Layer(kind, "cpu", torch.bfloat16)
    hidden = torch.randn(9, H, generator=generator()).bfloat16()
    ids = torch.rand(9, E, generator=generator()).topk(K).indices
    weights = torch.rand(9, K, generator=generator())

    def step(leaf):
        return run(layer, leaf, ids, weights)

    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaf = hidden.clone().requires_grad_()
        out = function(leaf)
        out.sum().backward()
        results.append((out, leaf.grad))
    assert all(map(torch.equal, *results))


def test_refusals():
    x, offs = torch.randn(4, H), torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match="only packed weights take strategy"):
        pipeline.grouped_linear(x, torch.randn(E, H, 8), offs, strategy="fused")
