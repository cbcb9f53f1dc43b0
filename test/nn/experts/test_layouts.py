"""Known classes of experts: which ones, what they compute once converted, and warnings about others."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _experts import EXPERTS, HIDDEN, INNER, Concatenated, Titan, clamped_gate
from _grids import BASES, generator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXExperts,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    check_model,
    is_experts,
    register_experts,
)
from torchao_mx.nn.experts.layouts import Layout, TitanLayout
from torchao_mx.nn.experts.module import layout_of, unclaimed_experts


def stack(*shape):
    return nn.Parameter(torch.randn(EXPERTS, *shape, generator=generator(0)) / shape[-1] ** 0.5)


def in_order(x, counts, expert):
    """``expert(rows, e)`` of each expert's rows; zeros after them."""
    sizes = [int(n) for n in counts]
    *parts, rest = x.split([*sizes, len(x) - sum(sizes)])
    out = [expert(part, e) for e, part in enumerate(parts)]
    return torch.cat([*out, out[0].new_zeros(len(rest), out[0].shape[1])])


def of_class(name, base, **members):
    """A class called ``name``, as a library has it."""
    return type(name, (base,), members)


class ByAxes(nn.Module):
    """torchtitan's GroupedExperts, as of the middle of 2026."""

    def __init__(self):
        super().__init__()
        self.w1_EFD, self.w3_EFD = stack(INNER, HIDDEN), stack(INNER, HIDDEN)
        self.w2_EDF = stack(HIDDEN, INNER)

    def forward(self, x_RD, num_tokens_per_expert_E):
        return in_order(x_RD, num_tokens_per_expert_E, self.expert)

    def expert(self, x, e):
        gate = self._grouped_mm(x, self.w1_EFD[e])
        return (F.silu(gate) * (x @ self.w3_EFD[e].T)) @ self.w2_EDF[e].T

    def _grouped_mm(self, x, w):
        return x @ w.T


class TitanGptOss(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp1_weight_EGD, self.mlp2_weight_EDF = stack(2 * INNER, HIDDEN), stack(HIDDEN, INNER)
        self.mlp1_bias_EG, self.mlp2_bias_ED = stack(2 * INNER), stack(HIDDEN)
        self.swiglu_limit = 0.7

    def forward(self, x_RD, num_tokens_per_expert_E):
        return in_order(x_RD, num_tokens_per_expert_E, self.expert)

    def expert(self, x, e):
        gate_up = x @ self.mlp1_weight_EGD[e].T + self.mlp1_bias_EG[e]
        act = clamped_gate(gate_up, 1.702, self.swiglu_limit)
        return act @ self.mlp2_weight_EDF[e].T + self.mlp2_bias_ED[e]


class Llama4(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = stack(HIDDEN, 2 * INNER), stack(INNER, HIDDEN)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states):
        gate, up = (hidden_states.view(EXPERTS, -1, HIDDEN) @ self.gate_up_proj).chunk(2, -1)
        return ((up * self.act_fn(gate)) @ self.down_proj).view(-1, HIDDEN)


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = stack(INNER, HIDDEN)

    def forward(self, inputs, expert_size):
        return in_order(inputs, expert_size, lambda x, e: x @ self.weight[e].T)


class Gelu(Titan):
    """Three 3-D weights of the names that torchtitan has, and another activation."""

    def forward(self, x, counts):
        return in_order(x, counts, lambda x, e: F.gelu(x @ self.w1[e].T) @ self.w2[e].T)


COUNTS = torch.tensor([3, 0, 5, 2])
KNOWN = {
    "GroupedExperts": (ByAxes, (12, HIDDEN), COUNTS),
    "GptOssGroupedExperts": (TitanGptOss, (12, HIDDEN), COUNTS),
    "Llama4TextExperts": (Llama4, (12, HIDDEN), None),
    "JetMoeParallelExperts": (Parallel, (10, HIDDEN), COUNTS.tolist()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_classes_compute_what_they_did(name):
    """By name and the arguments of forward; plain weights, so that values and gradients are those in fp32."""
    base, shape, counts = KNOWN[name]
    source = of_class(name, base)()
    ours = MXExperts.stand_in(source)
    x = torch.randn(shape, generator=generator(1)).requires_grad_()
    args = (x,) if counts is None else (x, counts)
    results = []
    for module in (source, ours):
        y = module(*args)
        wanted = [x, *source.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KNOWN)
def test_known_classes_are_quantized(name):
    base, shape, counts = KNOWN[name]
    model = nn.ModuleDict({"experts": of_class(name, base)()})
    dense = nn.ModuleDict({"experts": of_class(name, base)()})
    quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
    with torch.no_grad():
        for p, q in zip(dense.parameters(), model.parameters(), strict=True):
            assert isinstance(q, MXTensor) == (q.dim() == 3)
            p.copy_(q.dequantize() if isinstance(q, MXTensor) else q)
    x = torch.randn(shape, generator=generator(1))
    args = (x,) if counts is None else (x, counts)
    torch.testing.assert_close(
        model["experts"](*args), dense["experts"](*args), rtol=1e-4, atol=1e-4
    )
    assert not unclaimed_experts(model)


@pytest.mark.parametrize("name", KNOWN)
def test_known_classes_are_trained(name):
    """LoRA begins as the packed layer and trains its adapters; QAT converts to what it trained."""
    base, shape, counts = KNOWN[name]
    cls = of_class(name, base)
    x = torch.randn(shape, generator=generator(1))
    args = (x,) if counts is None else (x, counts)

    def quantized(model, *configs):
        for config in configs:
            quantize_(model, config, filter_fn=is_experts)
        return model["experts"]

    packed = quantized(nn.ModuleDict({"experts": cls()}), MXWeightOnlyConfig())
    adapted = quantized(nn.ModuleDict({"experts": cls()}), MXWeightOnlyLoRAConfig(r=4))
    y = adapted(*args)
    torch.testing.assert_close(y, packed(*args))
    y.square().sum().backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(packed.layout.weights)
    assert all(p.grad.abs().max() > 0 for n, p in trained.items() if "lora_B" in n)
    base = MXWeightOnlyConfig()
    model = nn.ModuleDict({"experts": cls()})
    y = quantized(model, QATConfig(base, step="prepare"))(*args)
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    assert torch.equal(quantized(model, QATConfig(base, step="convert"))(*args), y)


# --- what is not known ----------------------------------------------------------------------------


class Fused(ByAxes):
    def __init__(self):
        super().__init__()
        del self.w1_EFD, self.w3_EFD
        self.w13 = stack(INNER, 2, HIDDEN)

    def forward(self, x_RD, num_tokens_per_expert_E): ...


class GluOfMatrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN))


class OtherGate(Concatenated):
    def forward(self, hidden_states, top_k_index, top_k_weights): ...


class OtherActivation(Concatenated):
    """Declares the interface, and says how it gates."""

    def _apply_gate(self, gate_up):
        return F.gelu(gate_up.chunk(2, -1)[0])


class Normed(Concatenated):
    has_post_expert_norm = True


UNKNOWN = {
    "gelu": (Gelu(), "Gelu holds w1 .*overrides forward of the known class Titan"),
    "other arguments": (
        of_class("GroupedExperts", ByAxes, forward=lambda self, rows, sizes: rows)(),
        r"GroupedExperts holds w1_EFD \[4, 96, 64\].* is not of a known class of experts",
    ),
    "other parameters": (
        of_class("GroupedExperts", Parallel, forward=lambda self, x, num_tokens_per_expert: x)(),
        "its class GroupedExperts is known, but it lacks 3-D parameters w1, w3, w2",
    ),
    "fused": (of_class("FusedGroupedExperts", Fused)(), r"holds w2_EDF .*w13 \[4, 96, 2, 64\]"),
    "matrices": (of_class("DbrxExpertGLU", GluOfMatrices)(), r"DbrxExpertGLU holds w1 \[384, 64\]"),
    "own forward": (OtherGate(), "overrides forward of the known class Concatenated"),
    "norm": (Normed(), "normalizes each expert's output"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_experts_are_named_and_left(case):
    module, message = UNKNOWN[case]
    model = nn.ModuleDict({"experts": module, "linear": nn.Linear(HIDDEN, HIDDEN)})
    assert layout_of(module) is None
    reasons = unclaimed_experts(model)
    assert reasons.keys() == {"experts"}
    assert re.search(message, reasons["experts"]), reasons
    assert f"register_experts({type(module).__name__}, layout)" in reasons["experts"]
    before = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_filter_warns_once_for_each_class():
    class Unheard(Gelu):
        pass

    with pytest.warns(UserWarning, match=r"block.experts: Unheard holds w1 \[4, 96, 64\]"):
        assert not is_experts(Unheard(), "block.experts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_experts(Unheard())


def test_what_is_no_stack_of_weights_is_not_reported():
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(32, 32, 32), "bilinear": nn.Bilinear(32, 32, 32), "titan": Titan()}
    )
    model.register_parameter("position_embeddings", nn.Parameter(torch.randn(4, 64, 64)))
    model.register_parameter("cls_token", nn.Parameter(torch.randn(1, 64, 64)))
    model.register_parameter("A_log", nn.Parameter(torch.randn(4, 64, 8)))
    assert unclaimed_experts(model) == {}


def test_subclasses():
    """Claimed by what they inherit: not with a forward, or what it calls, of their own, but for gates."""
    calling = lambda self, x_RD, num_tokens_per_expert_E: self._grouped_mm(x_RD, self.w1_EFD[0])  # noqa: E731
    known = of_class("GroupedExperts", ByAxes, forward=calling)
    assert layout_of(of_class("Sharded", known)()) == layout_of(known())
    eight_bit = of_class("MXFP8GroupedExperts", known, _grouped_mm=lambda self, x, w: x)
    assert layout_of(eight_bit()) is None
    assert (
        "overrides _grouped_mm of the known class GroupedExperts"
        in unclaimed_experts(eight_bit())[""]
    )
    assert layout_of(OtherActivation()) == layout_of(Concatenated())


# --- register_experts -----------------------------------------------------------------------------


class Mine(Titan):
    def forward(self, rows, sizes):
        return super().forward(rows, sizes)


def test_registering():
    assert layout_of(Mine()) is None
    for _ in range(2):
        register_experts(Mine, "torchtitan")
    assert is_experts(Mine()) and is_experts(of_class("More", Mine)())
    with pytest.raises(ValueError, match=r"Mine is already registered with .*TitanLayout"):
        register_experts(Mine, "transformers")

    class Another(Gelu):
        pass

    register_experts(Another, TitanLayout(("w1", "w3", "w2")))
    assert layout_of(Another()).weights == ("w1", "w3", "w2")


def test_a_layout_of_ones_own():
    class GeluLayout(TitanLayout):
        def products(self, module, x, offs, order):
            inner = F.gelu(self.linear(module, 0, x, offs, order))
            return self.linear(module, 1, inner, offs)

    class Registered(Gelu):
        pass

    register_experts(Registered, GeluLayout(("w1", "w2")))
    source = Registered()
    model = nn.ModuleDict({"experts": source})
    x = torch.randn(12, HIDDEN, generator=generator(1))
    want = source(x, COUNTS)
    torch.testing.assert_close(MXExperts.stand_in(source)(x, COUNTS), want, rtol=1e-4, atol=1e-4)
    quantize_(model, MXWeightOnlyConfig(torch.float8_e4m3fn), filter_fn=is_experts)
    error = (model["experts"](x, COUNTS) - want).norm() / want.norm()
    assert 0 < error < 0.06


@pytest.mark.parametrize(
    ("cls", "layout", "error", "match"),
    [
        (Titan(), "torchtitan", TypeError, "a subclass of nn.Module"),
        (dict, "torchtitan", TypeError, "a subclass of nn.Module"),
        (nn.Module, "torchtitan", TypeError, "does not define a forward of experts"),
        (Gelu, "torchtitans", ValueError, "'torchtitans' is unknown; use one of transformers, "),
        (
            Gelu,
            TitanLayout,
            TypeError,
            "must be a name .* or a torchao_mx.nn.experts.Layout",
        ),
        (Gelu, None, TypeError, "must be a name"),
    ],
)
def test_registering_what_cannot_be(cls, layout, error, match):
    with pytest.raises(error, match=match):
        register_experts(cls, layout)
    assert layout_of(Gelu()) is None


def test_layouts_are_abstract():
    with pytest.raises(NotImplementedError):
        Layout.of(Titan())


# --- experts split over ranks ---------------------------------------------------------------------

CONFIGS = {
    "ptq": MXWeightOnlyConfig(),
    "lora": MXWeightOnlyLoRAConfig(r=4),
    "qat": QATConfig(BASES["w4a8"], step="prepare"),
    "recipe": NVFP4ForwardMXFP8BackwardConfig(),
}


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


def split_model(mesh, *placements):
    model = nn.ModuleDict({"experts": Titan()})
    for name, p in model["experts"].named_parameters():
        split = DTensor.from_local(p.detach(), mesh, placements)
        setattr(model["experts"], name, nn.Parameter(split))
    return model


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_split_within_are_refused(kind, axis, mesh):
    model = split_model(mesh, Replicate(), Shard(axis))
    before = dict(model.named_parameters())
    message = r"Titan.w1 is a DTensor of shape \(4, 96, 64\) with placements .*split along axis 0.*Shard\(0\)"
    with pytest.raises(ValueError, match=message):
        check_model(model, CONFIGS[kind], is_experts)
    with pytest.raises(TypeError, match=message):
        quantize_(model, CONFIGS[kind], filter_fn=is_experts)
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_whole_experts_may_be_split(kind, placement, mesh):
    model = split_model(mesh, Replicate(), placement)
    quantize_(model, CONFIGS[kind], filter_fn=is_experts)
    w1 = model["experts"].w1
    assert w1.shape == (EXPERTS, INNER, HIDDEN) and w1.placements == (Replicate(), placement)


def test_experts_split_within_after_prepare_are_not_converted(mesh):
    model = nn.ModuleDict({"experts": Titan()})
    base = BASES["w4a16"]
    quantize_(model, QATConfig(base, step="prepare"), filter_fn=is_experts)
    experts = model["experts"]
    for name, p in list(experts.named_parameters()):
        split = DTensor.from_local(p.detach(), mesh, (Replicate(), Shard(2)))
        setattr(experts, name, nn.Parameter(split))
    with pytest.raises(TypeError, match="split along axis 0"):
        quantize_(model, QATConfig(base, step="convert"), filter_fn=is_experts)
    assert model["experts"] is experts
