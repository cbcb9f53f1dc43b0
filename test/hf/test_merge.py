"""Adapters merged into packed weights: the bytes of a float64 oracle, and what cannot be merged untouched."""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import json

import pytest
import torch
from _grids import generator
from torch import nn
from torchao.quantization import quantize_

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from safetensors.torch import load_file, save_file
from test_load import (
    WEIGHTS,
    E,
    config_of,
    experts_of,
    stock,
    tensors_of,
    write,
    write_llama,
)
from test_save import assert_same, saved_tensors
from transformers import AutoModelForCausalLM

from torchao_mx import (
    MXFP4,
    NVFP4,
    MXDynamicActivationMXWeightConfig,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    ScaleCalculationMode,
    is_experts,
    ops,
)
from torchao_mx.hf import MergeError, from_pretrained, merge_adapter, save_adapter, save_pretrained

R, SCALING = 4, 2.0  # lora_alpha 8
EVEN, RCEIL = ScaleCalculationMode.EVEN, ScaleCalculationMode.RCEIL
EXPERTS = [f"model.layers.{i}.mlp.experts.{w}" for i in range(2) for w in WEIGHTS]
QUERIES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
TARGETS = [f"mlp.experts.{w}" for w in WEIGHTS]
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(params=[96, 64], ids=["I96", "square"])
def folder(request, tmp_path):
    config = config_of(request.param)
    return write(tmp_path / "model", config, tensors_of(config))


@pytest.fixture
def model96(tmp_path):
    config = config_of()
    return from_pretrained(write(tmp_path / "model", config, tensors_of(config)))


# --- adapters, and what they mean -------------------------------------------------------------------


def randomize(model, seed=4):
    """Adapters whose updates are exact in fp32, so that every order of summation gives the same."""
    g = generator(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_((8 * torch.randn(p.shape, generator=g)).round() / 64)
    return model


def trained_by_peft(folder, path, transposed=True, targets=TARGETS, modules=("q_proj",)):
    """PEFT's own file; without ``is_transposed``, as stock transformers 4 has experts, in its swapped layout."""
    model = stock(folder)
    for module in experts_of(model):
        module.is_transposed = transposed
    config = peft.LoraConfig(
        r=R, lora_alpha=8, target_modules=list(modules), target_parameters=list(targets)
    )
    randomize(peft.get_peft_model(model, config)).save_pretrained(path)
    return path


def trained_by_us(folder, path, **fields):
    save_adapter(with_our_adapters(from_pretrained(folder), **fields), path)
    return path


def with_our_adapters(model, **fields):
    config = MXWeightOnlyLoRAConfig(**{"r": R, "lora_alpha": 8} | fields)
    quantize_(model, config, filter_fn=lambda m, n: is_experts(m) or n.endswith("q_proj"))
    return randomize(model)


SOURCES = {
    "ours": trained_by_us,
    "peft": trained_by_peft,
    "peft_v4": lambda folder, path: trained_by_peft(folder, path, transposed=False),
}
each_source = pytest.mark.parametrize("source", SOURCES)


def update_of(path, name, layout=5, key=None):
    """``[E, in, out]`` (of a linear layer ``[out, in]``) in float64, as PEFT's ``get_delta_weight`` reads it."""
    tensors = load_file(path / FILE)
    module, _, weight = name.rpartition(".")
    if key is None:
        key = f"{module}.base_layer" if weight == "gate_up_proj" else module
    a, b = (tensors[f"base_model.model.{key}.lora_{s}.weight"].double() for s in "AB")
    if weight == "weight":
        return SCALING * b @ a
    a, b = a.view(E, R, -1), b.view(len(b), R, E)
    return SCALING * torch.einsum("ore,eri->eio" if layout == 5 else "ore,eri->eoi", b, a)


def quantized(total, mode=EVEN):
    """Blocks and scales of ``[E, in, out]``, an expert at a time."""
    packed = [ops.quantize(w.mT.float(), MXFP4, mode) for w in total]
    qdata, scale = (torch.stack(part) for part in zip(*packed, strict=True))
    return qdata.unflatten(-1, (-1, 16)), scale.view(torch.uint8)


def decoded(blocks, scales):
    return MXTensor.from_blocks(blocks, scales).dequantize(torch.float32).double().mT


def assert_bytes(weight, want):
    assert isinstance(weight, MXTensor) and weight.packed_axis == -2
    assert all(map(torch.equal, weight.mT.to_blocks(), want))


def figures(stored, total, delta):
    lost = stored.double() - total
    change = lost + delta
    kept = (change * delta).sum() / max(change.norm(), delta.norm()) ** 2
    return (lost.norm() / total.norm()).item(), (lost.norm() / delta.norm()).item(), kept.item()


# --- merge_adapter ----------------------------------------------------------------------------------


@each_source
def test_bytes_and_errors_are_the_oracles(folder, source, tmp_path):
    path = SOURCES[source](folder, tmp_path / "adapter")
    layout = 4 if source == "peft_v4" else 5
    plain, model = stock(folder), from_pretrained(folder)
    if source == "ours":  # q_proj is quantized before it is adapted
        for name in QUERIES:
            packed = MXTensor.from_hp(model.get_parameter(name).detach(), MXFP4)
            model.get_parameter(name).data = packed.dequantize()
            plain.get_parameter(name).data = packed.dequantize(torch.float32)
    before = {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    errors = merge_adapter(model, path)
    assert errors.keys() == {*EXPERTS, *QUERIES}
    for name, parameter in model.named_parameters():
        same, grad, old = before[name]
        assert id(parameter) == same and parameter.requires_grad == grad
        assert (
            parameter.dtype == torch.bfloat16 and parameter.is_contiguous() == old.is_contiguous()
        )
        if name not in errors:
            assert torch.equal(parameter, old), name
            continue
        delta = update_of(path, name, layout)
        total = plain.get_parameter(name).double() + delta
        if name in EXPERTS:
            want = quantized(total)
            assert_bytes(parameter, want)
            stored = decoded(*want)
        else:
            stored = total.float().bfloat16()
            assert torch.equal(parameter, stored)
        assert isinstance(errors[name], MergeError)
        assert errors[name] == pytest.approx(figures(stored, total, delta), rel=1e-6)
    assert 0.05 < errors[EXPERTS[0]].weight_error < 0.2 < errors[EXPERTS[0]].delta_error


@pytest.mark.parametrize("mode", ScaleCalculationMode, ids=lambda m: m.value)
def test_scaling_modes(folder, mode, tmp_path):
    path = trained_by_us(folder, tmp_path / "adapter")
    plain, model = stock(folder), from_pretrained(folder)
    merge_adapter(model, path, scaling_mode=mode)
    total = plain.get_parameter(EXPERTS[0]).double() + update_of(path, EXPERTS[0])
    assert_bytes(model.get_parameter(EXPERTS[0]), quantized(total, mode))


def test_rslora_scales_by_the_root_of_the_rank(model96, tmp_path):
    path = trained_by_us(tmp_path / "model", tmp_path / "adapter", use_rslora=True, lora_alpha=4)
    total = stock(tmp_path / "model").get_parameter(EXPERTS[1]).double()
    total += update_of(path, EXPERTS[1])  # 4 / sqrt(4) = 8 / 4
    merge_adapter(model96, path)
    assert_bytes(model96.get_parameter(EXPERTS[1]), quantized(total))


def test_experts_without_an_update_keep_their_bytes(tmp_path):
    """Even where quantizing their values again would give others: small elements under a large scale."""
    config = config_of()
    tensors = tensors_of(config)
    for name in EXPERTS:
        tensors[f"{name}_blocks"][:, :8] = 0x11
    folder = write(tmp_path / "model", config, tensors)
    plain = stock(folder).get_parameter(EXPERTS[0]).double()
    assert not torch.equal(quantized(plain)[1], tensors[f"{EXPERTS[0]}_scales"])

    model = with_our_adapters(from_pretrained(folder))
    with torch.no_grad():
        for name in EXPERTS:
            model.get_parameter(f"{name}_lora_B")[1:] = 0
        for name in QUERIES:
            model.get_parameter(name.replace("weight", "lora_A")).zero_()
    save_adapter(model, tmp_path / "adapter")
    merged = from_pretrained(folder)
    queries = {name: merged.get_parameter(name).detach().clone() for name in QUERIES}
    errors = merge_adapter(merged, tmp_path / "adapter")
    for name in EXPERTS:
        for got, suffix in zip(
            merged.get_parameter(name).mT.to_blocks(), ("_blocks", "_scales"), strict=True
        ):
            assert torch.equal(got[1:], tensors[name + suffix][1:])
            assert not torch.equal(got[0], tensors[name + suffix][0])
        assert min(errors[name]) > 0
    for name in QUERIES:
        assert torch.equal(merged.get_parameter(name), queries[name])
        assert errors[name] == (0, 0, 1)

    with torch.no_grad():
        for name in EXPERTS:
            model.get_parameter(f"{name}_lora_B").zero_()
    save_adapter(model, tmp_path / "adapter")
    merged = from_pretrained(folder)
    errors = merge_adapter(merged, tmp_path / "adapter")
    assert set(errors.values()) == {(0, 0, 1)}
    save_pretrained(merged, tmp_path / "again")
    assert_same(saved_tensors(tmp_path / "again"), tensors)


def test_an_update_below_half_a_step(model96, tmp_path):
    """Lost whole by EVEN, and drowned by RCEIL, which doubles scales for it."""
    path = trained_by_us(tmp_path / "model", tmp_path / "adapter")
    tensors = load_file(path / FILE)
    save_file({k: t / 1024 if "lora_B" in k else t for k, t in tensors.items()}, path / FILE)
    before = {n: model96.get_parameter(n).dequantize() for n in EXPERTS}
    with pytest.warns(UserWarning, match="rounding undoes the update of") as caught:
        errors = merge_adapter(model96, path)
    assert all(f"{name}: 0.0 % is kept" in str(caught[0].message) for name in EXPERTS)
    for name in EXPERTS:
        assert errors[name].kept == 0
        assert torch.equal(model96.get_parameter(name).dequantize(), before[name])
        assert errors[name].delta_error == pytest.approx(1, rel=1e-3)
        assert 0 < errors[name].weight_error < 1e-3
    with pytest.warns(UserWarning, match="rounding undoes the update of"):
        errors = merge_adapter(from_pretrained(tmp_path / "model"), path, scaling_mode=RCEIL)
    for name in EXPERTS:
        assert abs(errors[name].kept) < 0.01
        assert errors[name].delta_error > 100 and errors[name].weight_error > 0.02


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("transposed", [True, False], ids=["v5", "v4"])
def test_one_of_two_weights(folder, weight, transposed, tmp_path):
    """Where the config tells which; and a square one's layout has to be told by the other's shape."""
    path = trained_by_peft(folder, tmp_path / "adapter", transposed, [f"experts.{weight}"])
    plain, model = stock(folder), from_pretrained(folder)
    names = [name for name in EXPERTS if name.endswith(weight)]
    key = names[0].rpartition(".")[0]
    if plain.get_parameter(names[0])[0].shape[0] == plain.get_parameter(names[0])[0].shape[1]:
        refused(model, path, rf"{names[0]} is square.*add adapters for the module's other weight")
        return
    errors = merge_adapter(model, path)
    assert errors.keys() == {*names, *QUERIES}
    total = plain.get_parameter(names[0]).double()
    total += update_of(path, names[0], 5 if transposed else 4, key)
    assert_bytes(model.get_parameter(names[0]), quantized(total))

    record = json.loads((path / CONFIG).read_text())
    for targets in (None, [], ["experts.up_proj"], ["proj"]):
        (path / CONFIG).write_text(json.dumps(record | {"target_parameters": targets}))
        refused(
            from_pretrained(folder),
            path,
            "adapters for 1 of gate_up_proj, down_proj, but target_parameters=",
        )


def test_both_weights_need_no_names(model96, tmp_path):
    path = trained_by_peft(tmp_path / "model", tmp_path / "adapter")
    named = from_pretrained(tmp_path / "model")
    merge_adapter(named, path)
    record = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(record | {"target_parameters": None}))
    merge_adapter(model96, path)
    assert_same(named.state_dict(), model96.state_dict())


# --- other models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MXWeightOnlyConfig(),
        MXWeightOnlyConfig(torch.float8_e4m3fn),
        MXWeightOnlyConfig(block_size=16),
        MXDynamicActivationMXWeightConfig(torch.float8_e4m3fn, torch.float4_e2m1fn_x2),
    ],
    ids=["mxfp4", "mxfp8", "nvfp4", "w4a8"],
)
def test_packed_linear_layers(config, tmp_path):
    llama = write_llama(tmp_path / "llama")
    adapters = peft.LoraConfig(r=R, lora_alpha=8, target_modules=["up_proj", "v_proj"])
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    randomize(peft.get_peft_model(theirs, adapters)).save_pretrained(tmp_path / "adapter")
    model = from_pretrained(llama, config=config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    errors = merge_adapter(model, tmp_path / "adapter")
    assert len(errors) == 4
    for name, old in before.items():
        got = model.get_parameter(name).detach()
        if name not in errors:
            assert torch.equal(got, old)
            continue
        total = old.dequantize(torch.float32).double()
        total += update_of(tmp_path / "adapter", name)
        want = MXTensor.from_hp(total.float(), config.weight_spec.format, EVEN)
        assert got.orig_dtype == torch.bfloat16 and got.activation == config.activation_spec
        assert torch.equal(got.qdata.view(torch.uint8), want.qdata.view(torch.uint8))
        assert torch.equal(got.scale.view(torch.uint8), want.scale.view(torch.uint8))
        if want.format == NVFP4:
            assert torch.equal(got.per_tensor_scale, want.per_tensor_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unpacked_experts_are_rounded_once(folder, dtype, tmp_path):
    """Of a model that transformers dequantized, in its own layout."""
    path = trained_by_peft(folder, tmp_path / "adapter")
    plain, model = stock(folder), stock(folder, dtype)
    errors = merge_adapter(model, path)
    for name in EXPERTS:
        total = plain.get_parameter(name).double() + update_of(path, name)
        assert model.get_parameter(name).dtype == dtype
        assert model.get_parameter(name).is_contiguous()
        assert torch.equal(model.get_parameter(name), total.float().to(dtype))
    assert errors[EXPERTS[0]].weight_error < (1e-2 if dtype == torch.bfloat16 else 1e-7)


def test_experts_that_are_not_transposed(tmp_path):
    """As most models have them; PEFT's file means the same for both."""
    from _experts import HIDDEN, INNER, Concatenated

    torch.manual_seed(0)
    plain = nn.ModuleDict({"experts": Concatenated()})
    model = nn.ModuleDict({"experts": Concatenated()})
    model.load_state_dict(plain.state_dict())
    quantize_(model, MXWeightOnlyConfig(block_size=16), filter_fn=is_experts)
    config = peft.LoraConfig(
        r=R, lora_alpha=8, target_modules=[], target_parameters=["experts.down_proj"]
    )
    randomize(peft.get_peft_model(plain, config)).save_pretrained(tmp_path)
    before = model["experts"].down_proj.dequantize(torch.float32).double()
    errors = merge_adapter(model, tmp_path)
    assert errors.keys() == {"experts.down_proj"}
    got = model["experts"].down_proj
    total = before + update_of(tmp_path, "experts.down_proj").mT
    assert got.shape == (E, HIDDEN, INNER) and got.packed_axis == -1
    for e in range(E):
        want = MXTensor.from_hp(total[e].float(), NVFP4)
        assert torch.equal(got[e].dequantize(), want.dequantize())


# --- what is refused --------------------------------------------------------------------------------


def refused(model, path, message, error=ValueError, **options):
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        merge_adapter(model, path, **options)
    for name, parameter in model.named_parameters():
        same, old = before[name]
        assert id(parameter) == same and torch.equal(parameter, old), name


LAYER = "base_model.model.model.layers.1."
OUTER, INNER_KEY = (f"{LAYER}mlp.experts.{base}lora_A.weight" for base in ("", "base_layer."))
QUERY = f"{LAYER}self_attn.q_proj.lora_B.weight"
BAD_FILES = {
    "a half missing": (QUERY, lambda t: None, "q_proj.lora_B.weight is missing"),
    "experts' half missing": (OUTER, lambda t: None, "experts.lora_A.weight is missing"),
    "a weight of two missing": ("mlp.experts.base_layer", lambda t: None, "experts.base_layer.lora_A.weight is missing"),
    "shape": (QUERY, lambda t: t[:-1], "q_proj.lora_A.weight and lora_B have shapes"),
    "transposed": (OUTER, lambda t: t.T, "experts.lora_A.weight and lora_B have shapes"),
    "half the experts": (INNER_KEY, lambda t: t[: len(t) // 2], "base_layer.lora_A.weight and lora_B have shapes"),
    "integers": (QUERY, torch.Tensor.int, "q_proj.lora_B.weight has dtype torch.int32"),
    "infinite": (OUTER, lambda t: t.fill_(torch.inf), "layers.1.mlp.experts.down_proj: lora_A of up to inf and lora_B of up to"),
    "not a number": (QUERY, lambda t: t * torch.nan, "q_proj.weight: lora_A of up to .* and lora_B of up to nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, model96, tmp_path):
    key, change, message = BAD_FILES[case]
    path = trained_by_us(tmp_path / "model", tmp_path / "adapter")
    tensors = load_file(path / FILE)
    changed = {k: change(t.clone()) if key in k else t for k, t in tensors.items()}
    assert sum(changed[k] is not tensors[k] for k in tensors) in (1, 4)
    save_file({k: t.contiguous() for k, t in changed.items() if t is not None}, path / FILE)
    refused(model96, path, message)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",  # no such layer
        f"{LAYER}mlp.router.lora_A.weight",  # no linear layer
        f"{LAYER}mlp.experts.base_layer.base_layer.lora_A.weight",  # no third weight
        f"{LAYER}self_attn.q_proj.base_layer.lora_A.weight",
        f"{LAYER}self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "model.layers.1.self_attn.q_proj.lora_A.weight",  # not of PEFT
    ],
)
def test_tensors_of_no_weight(key, model96, tmp_path):
    path = trained_by_us(tmp_path / "model", tmp_path / "adapter")
    save_file(load_file(path / FILE) | {key: torch.ones(R, 64)}, path / FILE)
    refused(model96, path, f"{key}: the model has no weight for it there".replace(".", r"\."))


def test_bad_configs(model96, tmp_path):
    path = trained_by_peft(tmp_path / "model", tmp_path / "adapter")
    text = (path / CONFIG).read_text()
    for changes, message in (
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "biases are frozen"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base weights"),
        ({"r": 8}, r"have shapes \[4, 64\].* not \[8, 64\]"),
        ({"r": None}, "r=None; it must be an int"),
        ({"r": 0}, "r=0; the rank of adapters must be 1 or more"),
        ({"lora_alpha": "8"}, "lora_alpha='8'; it must be a number"),
        ({"use_rslora": 1}, "use_rslora=1; it must be a bool"),
    ):  # fmt: skip
        (path / CONFIG).write_text(json.dumps(json.loads(text) | changes))
        refused(model96, path, message)
    (path / CONFIG).write_text("[]")
    refused(model96, path, "not a JSON object")
    (path / CONFIG).write_text(text[:40])
    refused(model96, path, "cannot be read .*save it again")
    (path / CONFIG).write_text(text)
    refused(model96, path, "'rceil' is not a ScaleCalculationMode", TypeError, scaling_mode="rceil")
    data = (path / FILE).read_bytes()
    (path / FILE).write_bytes(data[:-10])
    refused(model96, path, "cut short, download or save it again")
    save_file({}, path / FILE)
    refused(model96, path, "is empty")
    (path / FILE).unlink()
    refused(model96, path, r"adapter_model\.safetensors", FileNotFoundError)
    refused(model96, tmp_path / "nowhere", r"adapter_config\.json", FileNotFoundError)


def test_models_that_nothing_is_merged_into(folder, tmp_path):
    path = trained_by_us(folder, tmp_path / "adapter")
    refused(
        with_our_adapters(from_pretrained(folder)),
        path,
        "q_proj already has adapters, in a MXLoRALinear",
    )
    config = peft.LoraConfig(target_modules=["q_proj"])
    wrapped = peft.get_peft_model(from_pretrained(folder), config)
    refused(wrapped, path, "q_proj already has adapters.*unload")
    refused(wrapped.base_model.model, path, "q_proj already has adapters")

    model = from_pretrained(folder)
    layer = model.model.layers[0].self_attn
    layer.k_proj = layer.q_proj
    refused(
        model, path, r"layers\.0\.self_attn\.q_proj\.weight: other modules share this parameter"
    )
    model = from_pretrained(folder)
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight = nn.Parameter(layer.q_proj.weight.detach().double())
    refused(model, path, r"q_proj\.weight: a Tensor of torch.float64; adapters can be merged into")
    model = from_pretrained(folder)
    for name in ("gate_up_proj", "down_proj"):
        values = getattr(experts_of(model)[1], name).dequantize()
        packed = nn.Parameter(MXTensor.from_hp(values, MXFP4), requires_grad=False)
        setattr(experts_of(model)[1], name, packed)
    refused(model, path, r"layers\.1\.mlp\.experts\.down_proj: .* has blocks along its output axis")
