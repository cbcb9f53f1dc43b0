"""MXLoRAExperts against the source's own forward on ``W + s B A``: values, gradients, life of a module."""

import copy
import io
import pickle

import pytest
import torch
from _experts import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INNER,
    TOP_K,
    Concatenated,
    GptOss,
    GptOssV4,
    Titan,
    each_family,
    inputs,
)
from _grids import generator, relative_error
from torch import nn
from torchao.quantization import quantize_

from torchao_mx import (
    MXFP4,
    MXLoRAExperts,
    MXLoRALinear,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    check_model,
    is_experts,
    is_linear,
)

CONFIG = MXWeightOnlyLoRAConfig(r=4, lora_alpha=6)


def module_of(family, dtype=torch.float32, device="cpu", config=CONFIG, **sizes):
    """(source, ours with adapters that are not zero)."""
    torch.manual_seed(0)
    source = family(**sizes).to(device, dtype)
    ours = nn.ModuleDict({"experts": copy.deepcopy(source)})
    quantize_(ours, config, filter_fn=is_experts)
    ours = ours["experts"]
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
    return source, ours


def updated(source, ours):
    """The source in float64 with ``W + s B A`` in its weights' places, and the adapters that are in there."""
    wide = copy.deepcopy(source).double()
    adapters = {}
    for name in ours.layout.weights:
        weight = getattr(ours, name).dequantize(torch.float32).double()
        a, b = (getattr(ours, f"{name}_lora_{s}").detach().double().requires_grad_() for s in "AB")
        adapters |= {f"{name}_lora_A": a, f"{name}_lora_B": b}
        update = ours.lora_config.scaling * (b @ a)
        del wide._parameters[name]
        setattr(wide, name, weight + (update.mT if source.transposed else update))
    return wide, adapters


def check(source, ours, args, wanting, bound):
    for leaf in (*wanting, *ours.parameters()):
        leaf.grad = None
    out = ours(*args)
    dout = torch.randn(out.shape, generator=generator(9)).to(out.device, out.dtype)
    out.backward(dout)
    wide, adapters = updated(source, ours)
    wide_args = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    want = wide(*wide_args)
    want.backward(dout.double())
    assert relative_error(out.cpu(), want.cpu()) < bound
    for leaf, wide_leaf in zip(args, wide_args, strict=True):
        if any(leaf is w for w in wanting):
            assert relative_error(leaf.grad.cpu(), wide_leaf.grad.cpu()) < bound
    for name, adapter in adapters.items():
        assert relative_error(getattr(ours, name).grad.cpu(), adapter.grad.cpu()) < bound, name


@each_family
@pytest.mark.parametrize("sizes", [{}, {"inner": HIDDEN}], ids=["oblong", "square"])
def test_values_and_gradients(family, sizes):
    source, ours = module_of(family, **sizes)
    check(source, ours, *inputs(family, 23), 1e-5)


@pytest.mark.gpu
@each_family
@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("compute", [None, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_values_and_gradients_on_the_gpu(family, tokens, compute):
    config = MXWeightOnlyLoRAConfig(r=4, lora_alpha=6, compute_dtype=compute)
    source, ours = module_of(family, torch.bfloat16, "cuda", config)
    source.limit = ours.limit = 100.0  # rounding would decide on which side of it a value is
    bound = 3e-2 if compute is None else 0.12
    check(source, ours, *inputs(family, tokens, torch.bfloat16, "cuda"), bound)


@each_family
def test_begins_as_the_quantized_source_and_trains_adapters_alone(family):
    torch.manual_seed(0)
    source = family()
    ours = MXLoRAExperts.from_experts(source, CONFIG)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {f"{n}_lora_{s}" for n in ours.layout.weights for s in "AB"}
    args, _ = inputs(family, 11)
    wide, _ = updated(source, ours)
    wide_args = [a.detach().double() if a.is_floating_point() else a for a in args]
    assert relative_error(ours(*args).detach(), wide(*wide_args).detach()) < 1e-5
    assert {n for n, _ in source.named_parameters()} <= {n for n, _ in ours.named_parameters()}
    for name in ours.layout.weights:
        weight, original = getattr(ours, name), getattr(source, name)
        assert weight.shape == original.shape and isinstance(weight, MXTensor)
        assert type(original.data) is torch.Tensor and original.requires_grad  # as it was
        assert weight.dequantize().sub(original).norm() < 0.2 * original.norm()
    for a in (getattr(ours, f"{n}_lora_A") for n in ours.layout.weights):
        assert (
            a.abs().amax() <= a.shape[-1] ** -0.5
        )  # Kaiming-uniform of a linear layer, whatever E
        assert a.std() > 0.4 * a.shape[-1] ** -0.5


@each_family
def test_packed_weights_are_kept(family):
    source = family()
    packed = {}
    for name, p in list(source.named_parameters()):
        if p.dim() == 3:
            w = MXTensor.from_hp(
                p.detach().mT.contiguous() if source.transposed else p.detach(), MXFP4
            )
            packed[name] = w.mT if source.transposed else w
            setattr(source, name, nn.Parameter(packed[name], requires_grad=False))
    ours = MXLoRAExperts.from_experts(source, CONFIG)
    for name, w in packed.items():
        assert getattr(ours, name).qdata.data_ptr() == w.qdata.data_ptr()
        assert not getattr(ours, name).requires_grad


@each_family
def test_merged_weight(family):
    source, ours = module_of(family)
    wide, _ = updated(source, ours)
    for name in ours.layout.weights:
        merged = ours.merged_weight(name)
        assert merged.shape == getattr(source, name).shape
        assert relative_error(merged, getattr(wide, name).detach()) < 1e-6


@each_family
def test_state_copies_and_pickles(family):
    _, ours = module_of(family)
    args, _ = inputs(family, 7)
    want = ours(*args)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(1)
    other = MXLoRAExperts.from_experts(family(), CONFIG)
    assert not torch.equal(other(*args), want)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (other, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(*args), want)


def test_hooks_mode_and_attributes_stay():
    source = Concatenated().eval()
    seen = []
    source.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    ours = MXLoRAExperts.from_experts(source, CONFIG)
    ours(*inputs(Concatenated, 3)[0])
    assert seen == [MXLoRAExperts] and not ours.training
    assert ours.config == "the model's" and ours.lora_config == CONFIG


@each_family
@pytest.mark.parametrize("config", [CONFIG, MXWeightOnlyConfig()], ids=["lora", "packed"])
def test_a_weight_whose_gradient_is_asked_for_is_refused(family, config):
    _, ours = module_of(family, config=config)
    ours.requires_grad_(True)
    with pytest.raises(
        NotImplementedError, match=r"has requires_grad=True but cannot be trained; call .requires"
    ):
        ours(*inputs(family, 9)[0])


def test_adapters_keep_their_dtype():
    config = MXWeightOnlyLoRAConfig(r=4, adapter_dtype=torch.float32)
    source, ours = module_of(Concatenated, torch.bfloat16, config=config)
    assert ours.gate_up_proj_lora_A.dtype == torch.float32
    check(source, ours, *inputs(Concatenated, 9, torch.bfloat16), 3e-2)
    assert ours.down_proj_lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("family", [Concatenated, GptOss, Titan], ids=lambda f: f.__name__)
def test_compiles_whole(family):
    _, ours = module_of(family)
    results = []
    for run in (torch.compile(ours, fullgraph=True, backend="aot_eager"), ours):
        args, wanting = inputs(family, 9)
        for p in ours.parameters():
            p.grad = None
        out = run(*args)
        out.sum().backward()
        adapters = [p.grad for n, p in ours.named_parameters() if "lora" in n]
        results.append([out, *(w.grad for w in wanting), *adapters])
    for compiled, eager in zip(*results, strict=True):
        assert relative_error(compiled, eager) < 1e-6


def test_repr_names_what_is_there():
    _, ours = module_of(GptOss)
    assert repr(ours).startswith(
        "MXLoRAExperts(GptOss: gate_up_proj=(4, 64, 192), down_proj=(4, 96, 64), r=4, alpha=6, scaling=1.5, "
        "weight=mxfp4"
    )


def test_twice_is_once_and_linear_layers_are_as_before():
    model = nn.ModuleDict({"experts": Concatenated(), "linear": nn.Linear(64, 32)})
    quantize_(model, CONFIG, filter_fn=lambda m, fqn: is_experts(m) or is_linear(m))
    assert isinstance(model["experts"], MXLoRAExperts)
    assert isinstance(model["linear"], MXLoRALinear)
    before = model["experts"]
    with pytest.warns(UserWarning, match="already has adapters"):
        quantize_(model, CONFIG, filter_fn=lambda m, fqn: isinstance(m, MXLoRAExperts))
    assert model["experts"] is before


class Gateless(Concatenated):
    has_gate = False


def test_which_modules_are_experts():
    assert all(is_experts(family()) for family in FAMILIES)
    others = [nn.Linear(32, 32), Gateless(), module_of(Titan)[1], nn.ModuleDict()]
    assert not any(is_experts(module) for module in others[:2] + others[3:])


def test_refusals():
    def refused(match, module, error=ValueError, **config):
        config = MXWeightOnlyLoRAConfig(**{"r": 4} | config)
        before = dict(module.named_parameters())
        with pytest.raises(error, match=match):
            MXLoRAExperts.from_experts(module, config)
        with pytest.raises(ValueError, match=match):
            check_model(module, config, filter_fn=lambda m, fqn: m is module)
        assert all(p is before[n] for n, p in module.named_parameters())

    refused("lora_dropout=0.5; experts do not support dropout", Concatenated(), lora_dropout=0.5)
    refused(r"Concatenated.gate_up_proj: r=65 exceeds a side of \(192, 64\)", Concatenated(), r=65)
    refused(r"Titan.w1.*not a multiple of 32", Titan(hidden=40))
    refused(r"GptOss.down_proj.*not a multiple of 32", GptOss(inner=40))
    refused(
        "e5m2", Titan(), compute_dtype=torch.float8_e4m3fn, grad_compute_dtype=torch.float8_e5m2
    )
    refused("float64", Titan().double(), TypeError)
    without = GptOss()
    without.down_proj_bias = None
    refused("no down_proj_bias, which its flags promise", without)
    with pytest.raises(TypeError, match="not a known module of experts"):
        MXLoRAExperts.from_experts(nn.Linear(64, 64), CONFIG)
    with pytest.raises(TypeError, match="MXWeightOnlyLoRAConfig"):
        MXLoRAExperts.from_experts(Titan(), None)
    with pytest.raises(TypeError, match="already has adapters"):
        MXLoRAExperts.from_experts(module_of(Titan)[1], CONFIG)


# --- the real classes -----------------------------------------------------------------------------

V5 = {"qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral", "deepseek_v3": "DeepseekV3", "olmoe": "Olmoe",
      "glm4_moe": "Glm4Moe", "gpt_oss": "GptOss"}  # fmt: skip


def transformers_experts(kind):
    """The experts of a tiny random model, or skip."""
    transformers = pytest.importorskip("transformers")
    if kind != "gpt_oss" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("3-D experts came with transformers 5")
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=HIDDEN, intermediate_size=INNER, moe_intermediate_size=INNER,
        num_hidden_layers=1, num_local_experts=EXPERTS, num_experts=EXPERTS, n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K, n_group=1, topk_group=1, vocab_size=32, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, first_k_dense_replace=0, experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    found = [m for m in model.modules() if is_experts(m)]
    assert len(found) == 1, model
    for p in found[0].parameters():
        nn.init.normal_(p, std=0.2)
    return found[0]


@pytest.mark.parametrize("kind", V5)
def test_experts_of_transformers(kind):
    source = transformers_experts(kind)
    ours = MXLoRAExperts.from_experts(copy.deepcopy(source), CONFIG)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
    source.transposed = ours.layout.transposed
    family = GptOssV4 if type(ours.layout).__name__ == "GptOssV4Layout" else Concatenated
    check(source, ours, *inputs(family, 13), 1e-5)
