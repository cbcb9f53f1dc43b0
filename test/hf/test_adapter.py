"""Adapters to and from PEFT, trained there or here, on the same model: equal outputs, equal bytes."""

import copy
import json

import pytest
import torch
from _experts import HIDDEN, Concatenated, GptOss, GptOssV4, Titan, inputs
from _grids import generator, relative_error
from torch import nn
from torchao.quantization import quantize_

from torchao_mx import MXLoRALinear, MXWeightOnlyLoRAConfig, is_experts, is_linear

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from torchao_mx.hf import load_adapter, save_adapter  # noqa: E402

CONFIG = MXWeightOnlyLoRAConfig(r=4, lora_alpha=6)
families = pytest.mark.parametrize("family", [Concatenated, GptOss], ids=lambda f: f.__name__)


class Layer(nn.Module):
    def __init__(self, family, **sizes):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.experts = family(**sizes)

    def forward(self, x, *routing):
        return self.experts(self.q_proj(x), *routing)


class Model(nn.Module):
    def __init__(self, family, **sizes):
        super().__init__()
        self.layers = nn.ModuleList(Layer(family, **sizes) for _ in range(2))

    def forward(self, x, *routing):
        for layer in self.layers:
            x = layer(x, *routing)
        return x


def randomize(model, seed=3):
    g = generator(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)


def pair(family, linear=True, **sizes):
    """(our model with adapters, the plain one on the values of its weights)."""
    torch.manual_seed(0)
    ours = Model(family, **sizes)
    plain = copy.deepcopy(ours)
    quantize_(ours, CONFIG, filter_fn=lambda m, n: is_experts(m) or (linear and is_linear(m)))
    for name, p in plain.named_parameters():
        packed = ours.get_parameter(name)
        p.data = packed.dequantize() if hasattr(packed, "qdata") else packed.detach().clone()
    randomize(ours)
    return ours, plain


def with_peft(plain, *, linear=True, parameters=("gate_up_proj", "down_proj"), seed=4):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"] if linear else [],
        target_parameters=[f"experts.{name}" for name in parameters],
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    randomize(model, seed)
    return model


@families
@pytest.mark.parametrize("linear", [True, False], ids=["with_linear", "experts_alone"])
def test_peft_loads_ours(family, linear, tmp_path):
    ours, plain = pair(family, linear)
    args, _ = inputs(family, 13)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert relative_error(theirs(*args).detach(), ours(*args).detach().double()) < 1e-5
    assert relative_error(plain(*args).detach(), ours(*args).detach().double()) > 0.1


@families
@pytest.mark.parametrize("linear", [True, False], ids=["with_linear", "experts_alone"])
def test_we_load_pefts(family, linear, tmp_path):
    ours, plain = pair(family, linear)
    args, _ = inputs(family, 13)
    theirs = with_peft(plain, linear=linear)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert relative_error(ours(*args).detach(), theirs(*args).detach().double()) < 1e-5


@families
def test_both_write_the_same_keys_and_shapes(family, tmp_path):
    ours, plain = pair(family)
    save_adapter(ours, tmp_path / "ours")
    with_peft(plain).save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}


@pytest.mark.parametrize(
    "family", [Concatenated, GptOss, GptOssV4, Titan], ids=lambda f: f.__name__
)
def test_round_trip_is_bit_equal(family, tmp_path):
    ours, _ = pair(family, inner=HIDDEN)  # square
    other, _ = pair(family, inner=HIDDEN)
    randomize(other, 9)
    save_adapter(ours, tmp_path)
    save_adapter(ours, tmp_path)  # in its own place
    load_adapter(other, tmp_path)
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        if "lora" in name:
            assert torch.equal(a, b), name
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("sizes", [{}, {"inner": HIDDEN}, {"inner": HIDDEN // 2}], ids=str)
def test_adapters_of_transformers_4_are_converted(sizes, tmp_path):
    """PEFT swaps in and out of a module without ``is_transposed``, as gpt-oss's was. One weight may be square."""
    ours, plain = pair(GptOss, **sizes)
    args, _ = inputs(GptOss, 13)
    for is_transposed in (False, True):
        source = copy.deepcopy(plain)
        for layer in source.layers:
            layer.experts.is_transposed = is_transposed
        theirs = with_peft(source)
        theirs.save_pretrained(tmp_path)
        load_adapter(ours, tmp_path)
        assert relative_error(ours(*args).detach(), theirs(*args).detach().double()) < 1e-5


def test_square_weights_of_torchtitan(tmp_path):
    torch.manual_seed(0)
    ours = nn.ModuleDict({"experts": Titan(inner=HIDDEN)})
    plain = copy.deepcopy(ours)
    quantize_(ours, CONFIG, filter_fn=is_experts)
    for name, p in plain.named_parameters():
        p.data = ours.get_parameter(name).dequantize()
    theirs = with_peft(plain, linear=False, parameters=("w1", "w2", "w3"))
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    args, _ = inputs(Titan, 13)
    want = theirs.base_model.model["experts"](*args)
    assert relative_error(ours["experts"](*args).detach(), want.detach().double()) < 1e-5


def test_refusals_leave_the_model_as_it_was(tmp_path):
    ours, plain = pair(GptOss)
    save_adapter(ours, tmp_path)
    randomize(ours, 5)
    before = {n: p.detach().clone() for n, p in ours.named_parameters() if "lora" in n}
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, text = load_file(weights), config.read_text()
    first = next(key for key in tensors if "experts" in key)

    def refused(match, tensors=tensors, error=ValueError, **changes):
        save_file(tensors, weights)
        config.write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(error, match=match):
            load_adapter(ours, tmp_path)
        assert all(torch.equal(before[n], p) for n, p in ours.named_parameters() if n in before)

    refused(f"{first} is missing", {k: t for k, t in tensors.items() if k != first})
    refused(
        "other.lora_A.weight: the model has no adapter there",
        tensors | {"other.lora_A.weight": torch.ones(1)},
    )
    refused(f"{first}.* have shapes", tensors | {first: torch.ones(3, 3)})
    refused(f"{first} has dtype torch.int32", tensors | {first: tensors[first].int()})
    swapped = {
        key: tensors[
            key.replace("lora_A", "lora_C").replace("lora_B", "lora_A").replace("lora_C", "lora_B")
        ].T
        for key in tensors
        if "layers.0.experts.base_layer" in key
    }
    refused(
        "some adapters have PEFT.s shapes",
        tensors | {k: t.contiguous() for k, t in swapped.items()},
    )
    refused("r=8, but the model's adapters have 4", r=8)  # without a mark, as of PEFT
    refused("lora_alpha=1, but", lora_alpha=1)
    refused("use_rslora=True, but", use_rslora=True)
    refused("peft_type='IA3'", peft_type="IA3")
    refused("use_dora=True is not supported", use_dora=True)
    config.write_text(text)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        load_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(plain, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    ours.extra = MXLoRALinear(64, 64, config=MXWeightOnlyLoRAConfig(r=2))
    with pytest.raises(ValueError, match="adapters of several kinds"):
        save_adapter(ours, tmp_path)
