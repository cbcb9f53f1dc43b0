"""MXFakeQuantizedExperts and MXExperts match the source on fake-quantized operands, and each other bit for bit."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from _experts import (
    EXPERTS,
    HIDDEN,
    Concatenated,
    GptOss,
    GptOssV4,
    Titan,
    clamped_gate,
    each_family,
    inputs,
)
from _grids import BASES, generator, relative_error
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXExperts,
    MXFakeQuantizeConfig,
    MXFakeQuantizedExperts,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    check_model,
    is_experts,
    ops,
)

SCHEMES = ("w4a16", "w8a16", "nvfp4_weight_only", "w4a8", "w4a4", "nvfp4")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def quantized(module, config):
    """``quantize_`` of a module that is a model's."""
    model = nn.ModuleDict({"experts": module})
    quantize_(model, config, filter_fn=is_experts)
    return model["experts"]


def prepared(family, scheme, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    source = family().to(device, dtype)
    return source, quantized(copy.deepcopy(source), QATConfig(BASES[scheme], step="prepare"))


def faked(x, spec, per_expert=False):
    if spec is None:
        return x
    pts = None
    if spec.format.has_per_tensor_scale:
        pts = ops.per_tensor_scale(x.detach(), spec.format, per_expert)
    return ops.fake_quantize(x, spec.format, spec.scaling_mode, per_tensor_scale=pts)


def reference(source, base, args):
    """The source's algebra in plain torch, every operand of a product fake-quantized; slow."""
    w = {n: p.mT if source.transposed else p for n, p in source.named_parameters() if p.dim() == 3}
    w = {n: faked(p.contiguous(), base.weight_spec, True) for n, p in w.items()}
    activation = base.activation_spec
    if isinstance(source, Titan):
        x, sizes = args
        owned = sum(sizes.tolist())
        expert = torch.arange(EXPERTS).repeat_interleave(sizes.cpu().int())

        def product(x, name):
            x = faked(x, activation)[:owned]
            y = torch.stack([x[i] @ w[name][e].T for i, e in enumerate(expert)])
            return torch.cat([y, y.new_zeros(len(args[0]) - owned, y.shape[1])])

        return product(F.silu(product(x, "w1")) * product(x, "w3"), "w2")
    hidden, ids, weights = args
    if isinstance(source, GptOssV4):
        weights, hidden = weights.gather(1, ids), hidden.flatten(0, 1)
    bias = {n: getattr(source, f"{n}_bias", None) for n in w}
    x = faked(hidden, activation)
    slots = ids.flatten()

    def product(rows, name):
        y = torch.stack([rows[i] @ w[name][e].T for i, e in enumerate(slots)])
        return y if bias[name] is None else y + bias[name][slots]

    rows = product(x.repeat_interleave(ids.shape[1], 0), "gate_up_proj")
    if isinstance(source, GptOss):
        rows = clamped_gate(rows, source.alpha, source.limit)
    else:
        rows = source._apply_gate(rows)
    rows = product(faked(rows, activation), "down_proj")
    out = (rows * weights.reshape(-1, 1)).unflatten(0, ids.shape).sum(1)
    return out.view_as(args[0])


@each_family
@each_scheme
def test_values_and_gradients(family, scheme):
    source, ours = prepared(family, scheme)
    assert type(ours) is MXFakeQuantizedExperts
    args, wanting = inputs(family, 11)
    results = []
    for run in (ours, lambda *args: reference(source, BASES[scheme], args)):
        for leaf in (*wanting, *source.parameters(), *ours.parameters()):
            leaf.grad = None
        out = run(*args)
        out.backward(torch.randn(out.shape, generator=generator(5)))
        module = ours if run is ours else source
        results.append([out, *(t.grad for t in wanting), *(p.grad for p in module.parameters())])
    names = ["out", *("input" for _ in wanting), *(n for n, _ in source.named_parameters())]
    for name, got, want in zip(names, *results, strict=True):
        assert relative_error(got.detach(), want.detach()) < 2e-5, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_family
@each_scheme
def test_converted_and_quantized_compute_what_was_trained(family, scheme, device):
    source, ours = prepared(family, scheme, torch.bfloat16, device)
    args, _ = inputs(family, 23, torch.bfloat16, device)
    want = ours(*args)
    packed = quantized(copy.deepcopy(source), BASES[scheme])
    converted = quantized(copy.deepcopy(ours), QATConfig(BASES[scheme], step="convert"))
    assert type(converted) is type(packed) is MXExperts
    assert torch.equal(converted(*args), want) and torch.equal(packed(*args), want)
    for name in converted.layout.weights:
        assert torch.equal(getattr(converted, name).qdata, getattr(packed, name).qdata)
        assert not getattr(converted, name).requires_grad


@each_family
def test_parameters_are_the_sources(family):
    source = family()
    ours = MXFakeQuantizedExperts.from_experts(source, None, MXFakeQuantizeConfig())
    assert dict(ours.named_parameters()).keys() == dict(source.named_parameters()).keys()
    assert all(p is source._parameters[n] for n, p in ours.named_parameters())
    packed = ours.to_packed()
    assert all(p is source._parameters[n] for n, p in ours.named_parameters())
    for name in ours.layout.weights:
        weight = getattr(packed, name)
        assert isinstance(weight, MXTensor) and weight.shape == getattr(source, name).shape


def test_training_lowers_the_loss():
    _, ours = prepared(Concatenated, "w4a4")
    args, _ = inputs(Concatenated, 32)
    target = torch.randn(32, HIDDEN, generator=generator(3))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(ours(*args), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("family", [Concatenated, GptOss, Titan], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_compiles_whole(family, scheme):
    torch._dynamo.reset()
    _, ours = prepared(family, scheme, torch.bfloat16)
    packed = ours.to_packed()
    for module in (ours, packed):
        results = []
        for run in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
            args, wanting = inputs(family, 9, torch.bfloat16)
            for p in module.parameters():
                p.grad = None
            out = run(*args)
            out.sum().backward()
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            results.append([out, *(w.grad for w in wanting), *grads])
        assert len(results[0]) == len(results[1])
        assert all(map(torch.equal, *results))


@each_family
def test_state_of_packed_experts(family):
    torch.manual_seed(0)
    packed, other = (quantized(family(), MXWeightOnlyConfig()) for _ in range(2))
    args, _ = inputs(family, 7)
    buffer = io.BytesIO()
    torch.save(packed.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(*args), packed(*args))
    assert f"{family.__name__}: {packed.layout.weights[0]}=(4, " in repr(packed)


@pytest.mark.parametrize("dim", [0, 3])
def test_no_rows_and_one_expert(dim):
    _, ours = prepared(Titan, "w4a16")
    x = torch.randn(dim, HIDDEN, requires_grad=True)
    out = ours(x, torch.tensor([0, dim, 0, 0]))
    out.sum().backward()
    assert out.shape == (dim, HIDDEN)
    for p in ours.parameters():
        assert p.grad.shape == p.shape and p.grad[[0, 2, 3]].eq(0).all()


def test_twice_is_once():
    _, ours = prepared(Concatenated, "w4a16")
    with pytest.warns(UserWarning, match="is already prepared"):
        assert quantized(ours, QATConfig(BASES["w4a16"], step="prepare")) is ours
    packed = ours.to_packed()
    with pytest.warns(UserWarning, match="already holds MXTensors"):
        assert quantized(packed, BASES["w4a16"]) is packed
    check_model(nn.ModuleDict({"experts": packed}), BASES["w4a16"], is_experts)


def test_refusals():
    for family, sizes, name in (
        (Titan, {"hidden": 40}, "w1"),
        (GptOss, {"inner": 40}, "down_proj"),
    ):
        module = family(**sizes)
        for config in (BASES["w4a16"], QATConfig(BASES["w4a16"], step="prepare")):
            with pytest.raises(
                ValueError, match=rf"{family.__name__}.{name}.*not a multiple of 32"
            ):
                quantized(module, config)
            with pytest.raises(ValueError, match=rf"experts: {family.__name__}.{name}"):
                check_model(nn.ModuleDict({"experts": module}), config, is_experts)
    _, ours = prepared(Titan, "w4a4")
    with pytest.raises(ValueError, match="for which it was not trained"):
        quantized(ours, QATConfig(BASES["w4a16"], step="convert"))
    with pytest.raises(TypeError, match="is in training"):
        quantized(ours, BASES["w4a4"])
    with pytest.raises(TypeError, match="is in training; convert it first"):
        quantized(ours, MXWeightOnlyLoRAConfig(r=4))
    with pytest.raises(ValueError, match="weight_config is missing"):
        MXFakeQuantizedExperts.from_experts(Titan())
    with pytest.raises(TypeError, match="not a known module of experts"):
        MXFakeQuantizedExperts.from_experts(nn.Linear(32, 32), None, MXFakeQuantizeConfig())
    packed = ours.to_packed()
    with pytest.raises(TypeError, match="is already an MXTensor"):
        MXFakeQuantizedExperts.from_experts(packed, None, MXFakeQuantizeConfig())
