"""torch.compile of transformer blocks: one graph each, eager's values, few compilations; CUDA graphs."""

import functools

import pytest
import torch
import torch.nn.functional as F
from _experts import EXPERTS, HIDDEN, INNER, GptOss, Titan, inputs
from _grids import (
    BASES,
    assert_close,
    assert_same_values,
    generator,
    prepare,
    quantize,
    relative_error,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchao_mx import MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts, is_linear

HEADS, BATCH = 4, 2
SIZES = (5, 9, 3, 16, 2)  # tokens of a sequence


def selected(module, name):
    return is_experts(module) or (is_linear(module) and "layers" in name and "gate" not in name)


def with_adapters(model):
    config = MXWeightOnlyLoRAConfig(r=4, lora_alpha=8)
    quantize(model.requires_grad_(False), config, filter_fn=selected)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


KINDS = {
    "w4a16 QAT": lambda model: prepare(model, BASES["w4a16"], filter_fn=selected),
    "w4a4 QAT": lambda model: prepare(model, BASES["w4a4"], filter_fn=selected),
    "LoRA": with_adapters,
    "packed": lambda model: quantize(model, MXWeightOnlyConfig(), filter_fn=selected),
    "packed w4a8": lambda model: quantize(model, BASES["w4a8"], filter_fn=selected),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.last = nn.Linear(INNER, HIDDEN)

    def forward(self, x):
        gate, up = self.first(x).chunk(2, -1)
        return self.last(F.silu(gate) * up)


class MoE(nn.Module):
    """As torchtitan calls its GroupedExperts: with rows sorted by expert, and the rows an expert."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Titan()

    def forward(self, x):
        rows = x.flatten(0, 1)
        # Four tokens each prefer a pair of neighbours, so far that rounding never picks another expert.
        pair = torch.arange(len(rows), device=x.device)[:, None] // 4 % (EXPERTS - 1)
        expert = torch.arange(EXPERTS, device=x.device)
        preference = 4 * (expert == pair) + 2 * (expert == pair + 1)
        scores, ids = torch.sigmoid(self.gate(rows) / 8 + preference).topk(2)
        ids = ids.flatten()
        order = ids.argsort(stable=True)
        sizes = torch.zeros(EXPERTS, dtype=torch.long, device=x.device)
        sizes = sizes.scatter_add(0, ids, torch.ones_like(ids))
        y = self.experts(rows[order // 2], sizes) * scores.flatten()[order, None]
        return torch.zeros_like(rows).index_add(0, order // 2, y.to(rows.dtype)).view_as(x)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.attention, self.mlp = Attention(), mlp()

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Its blocks are in ``layers``, as those of transformers' models."""

    def __init__(self, mlp, layers):
        super().__init__()
        self.layers = nn.ModuleList(Block(mlp) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """A model of transformers between its embeddings and its head."""

    def __init__(self, name, layers):
        super().__init__()
        pytest.importorskip("transformers", "5.8")
        from test_load import moe_models
        from transformers import AutoConfig, AutoModel

        fields = moe_models()[name] | {"num_hidden_layers": layers}
        config = AutoConfig.for_model(name, **fields, use_cache=False)
        self.model = AutoModel.from_config(config)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.1 * torch.randn(p.shape))  # its experts' are 0.02, its sinks and biases 0

    def forward(self, x):
        return self.model(inputs_embeds=x).last_hidden_state


MODELS = {
    "dense": functools.partial(Model, FeedForward),
    "titan": functools.partial(Model, MoE),
    "gpt_oss": functools.partial(Decoder, "gpt_oss"),
    "qwen3_moe": functools.partial(Decoder, "qwen3_moe"),
}
# Each kind with two models, each model with two kinds and more: a compilation takes seconds. Packed
# gpt_oss is compiled under activation checkpointing, below.
each_pair = pytest.mark.parametrize(
    ("name", "kind"),
    [("dense", "w4a4 QAT"), ("dense", "LoRA"), ("dense", "packed w4a8"),
     ("titan", "w4a16 QAT"), ("titan", "LoRA"), ("titan", "packed"),
     ("gpt_oss", "w4a16 QAT"), ("gpt_oss", "LoRA"),
     ("qwen3_moe", "w4a4 QAT"), ("qwen3_moe", "packed w4a8")],
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


def model_of(name, kind, layers=2, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    model = KINDS[kind](MODELS[name](layers))
    return model.to(device, dtype)


def layers_of(model):
    return next(layers for name, layers in model.named_modules() if name.endswith("layers"))


def compile_layers(model, backend="aot_eager", **options):
    """Each layer by itself; returns what counts the compilations and keeps their graphs."""
    counter = CompileCounterWithBackend(backend)
    for layer in layers_of(model):
        layer.compile(fullgraph=True, backend=counter, **options)
    return counter


def step(model, size, mark=False):
    """The output and the gradients, by name, for ``size`` tokens of a sequence."""
    p, g = next(model.parameters()), generator(size)
    x, dy = (torch.randn(BATCH, size, HIDDEN, generator=g).to(p.device, p.dtype) for _ in range(2))
    if mark:
        torch._dynamo.mark_dynamic(x, 1)
    model.zero_grad(set_to_none=True)
    y = model(x.requires_grad_())
    y.backward(dy)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach().clone() for n, t in {"y": y, "x": x.grad, **grads}.items()}


def check(got, want, compare=assert_same_values):
    assert got.keys() == want.keys() and len(want) >= 2
    for name, value in want.items():
        compare(got[name], value)


@each_pair
def test_two_graphs_for_all_layers_and_token_counts(name, kind):
    """One for the first token count and one for all others; bit for bit, as aot_eager runs eager's ops."""
    model = model_of(name, kind)
    wants = [step(model, size) for size in SIZES]
    counter = compile_layers(model)
    for size, want in zip(SIZES, wants, strict=True):
        check(step(model, size), want)
    assert counter.frame_count == 2


def test_some_of_these_token_counts_leave_experts_without_rows():
    model, seen = model_of("titan", "LoRA"), []
    layers_of(model)[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: seen.append(args[1])
    )
    for size in SIZES:
        step(model, size)
    empty = [int((sizes == 0).sum()) for sizes in seen]
    assert 0 in empty and 2 in empty


@pytest.mark.parametrize("name", ["dense", "titan"])
@pytest.mark.parametrize("kind", ["LoRA", "packed"])
def test_one_graph_where_token_counts_are_said_to_vary(name, kind):
    """torch.compile raises if anything that it traces fixes an axis that is marked."""
    model = model_of(name, kind, layers=1)
    wants = [step(model, size) for size in SIZES]
    counter = compile_layers(model)
    for size, want in zip(SIZES, wants, strict=True):
        check(step(model, size, mark=True), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["titan", "gpt_oss"])
def test_more_layers_than_a_function_may_have_graphs(name):
    """A graph serves all layers that are alike: nothing in it depends on one layer's modules or configs."""
    layers = torch._dynamo.config.recompile_limit + 1
    model = model_of(name, "LoRA", layers)
    want = step(model, 5)
    counter = compile_layers(model)
    check(step(model, 5), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["w4a4 QAT", "LoRA"])
def test_one_token_and_none(kind):
    """Sizes that torch.compile gives graphs of their own."""
    model = model_of("titan", kind, layers=1)
    wants = {size: step(model, size) for size in (1, 0, 4)}
    compile_layers(model)
    for size, want in wants.items():
        check(step(model, size), want)


@pytest.mark.parametrize("kind", ["LoRA", "packed", "w4a16 QAT"])
def test_under_activation_checkpointing(kind):
    """transformers checkpoints around the compiled layer, whose forward runs again in backward."""
    model = model_of("gpt_oss", kind).train()
    want = step(model, 5)
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    counter = compile_layers(model)
    check(step(model, 5), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "ops"),
    [("dense", {"mm"}), ("titan", {"mm"}), ("gpt_oss", {"mm", "swiglu", "combine"}),
     ("qwen3_moe", {"mm", "swiglu", "combine"})],
)  # fmt: skip
def test_graphs_have_the_ops_that_eager_runs(name, ops):
    model = model_of(name, "LoRA", layers=1)
    counter = compile_layers(model)
    step(model, 5)
    [graph] = counter.graphs
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {f"torchao_mx.{op}.default" for op in ops} <= targets


@pytest.mark.parametrize(
    ("name", "kind"), [("dense", "w4a16 QAT"), ("titan", "packed"), ("gpt_oss", "LoRA")]
)
def test_inductor(name, kind, device):
    """Its kernels for what is around our ops add in another order than eager's.

    A C++ compiler takes seconds for each, so that attention is in the dense model's graph only.
    """
    model = model_of(name, kind, layers=1, device=device)
    wants = [step(model, size) for size in SIZES[:2]]
    if name == "dense":
        compile_layers(model, "inductor", dynamic=True)
    else:
        layers_of(model)[0].mlp.compile(fullgraph=True, dynamic=True)
    for size, want in zip(SIZES, wants, strict=False):
        check(step(model, size), want, assert_close)


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["w4a16 QAT", "LoRA", "packed"])
@pytest.mark.parametrize("name", ["dense", "titan"])
def test_reduce_overhead(name, kind):
    model = model_of(name, kind, device="cuda", dtype=torch.bfloat16)
    want = step(model, 64)
    skipped = torch._dynamo.utils.counters["inductor"]
    skipped.clear()
    for layer in layers_of(model):
        layer.compile(fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # the first calls warm up and record, the others replay
        torch.compiler.cudagraph_mark_step_begin()
        got = step(model, 64)
    assert skipped["cudagraph_skips"] == 0
    # Around our ops inductor rounds to bfloat16 less often than eager.
    check(got, want, lambda a, b: _within(a, b, 3e-2))


def _within(actual, expected, bound):
    assert relative_error(actual, expected) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["w4a16 QAT", "LoRA", "packed"])
@pytest.mark.parametrize("name", ["dense", "titan"])
def test_graphed_blocks(name, kind):
    """The same kernels, recorded, so the same values but for what cuBLAS chooses for its workspace."""
    model = model_of(name, kind, device="cuda", dtype=torch.bfloat16)
    want = step(model, 64)
    for i, layer in enumerate(layers_of(model)):
        sample = torch.zeros(BATCH, 64, HIDDEN, device="cuda", dtype=torch.bfloat16)
        layers_of(model)[i] = torch.cuda.make_graphed_callables(layer, (sample.requires_grad_(),))
    check(step(model, 64), want, assert_close)


@pytest.mark.gpu
def test_graphed_experts_of_transformers():
    """Routing is an input here: another one than what was recorded has to be followed."""
    torch.manual_seed(0)
    model = with_adapters(nn.ModuleDict({"layers": GptOss()})).to("cuda", torch.bfloat16)
    experts = model["layers"]

    def results(module):
        args, wanting = inputs(GptOss, 64, torch.bfloat16, "cuda")
        experts.zero_grad(set_to_none=True)
        y = module(*args)
        y.backward(torch.ones_like(y))
        grads = [p.grad for p in experts.parameters() if p.requires_grad]
        return [t.detach().clone() for t in (y, *(w.grad for w in wanting), *grads)]

    # Behind it no graph of autograd's is left, whose nodes for the adapters would be of the eager stream.
    want = results(experts)
    sample = inputs(GptOss, 64, torch.bfloat16, "cuda", seed=1)[0]
    for got, wanted in zip(
        results(torch.cuda.make_graphed_callables(experts, sample)), want, strict=True
    ):
        assert_close(got, wanted)
