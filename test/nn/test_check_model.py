"""torchao_mx.quantize_ changes every selected layer or nothing, and reports what it leaves out."""

import re
import warnings
from collections import OrderedDict

import pytest
import torch
from _experts import Concatenated
from _grids import randn
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig

from torchao_mx import (
    MXDynamicActivationMXWeightConfig,
    MXExperts,
    MXFakeQuantizedLinear,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    NVFP4MXFP8Linear,
    check_model,
    is_experts,
    is_linear,
    quantize_,
)

PTQ, LORA, RECIPE = (
    MXWeightOnlyConfig(),
    MXWeightOnlyLoRAConfig(r=4),
    NVFP4ForwardMXFP8BackwardConfig(),
)
PREPARE, CONVERT = QATConfig(PTQ, step="prepare"), QATConfig(PTQ, step="convert")
BACK, RECIPE_CONVERT = QATConfig(step="convert"), NVFP4ForwardMXFP8BackwardConfig(step="convert")
CONFIGS = {"ptq": PTQ, "qat": PREPARE, "lora": LORA, "recipe": RECIPE}
STEPS = {"qat": (PREPARE, CONVERT), "recipe": (RECIPE, RECIPE_CONVERT)}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_step = pytest.mark.parametrize(("prepare", "convert"), STEPS.values(), ids=STEPS)
each_quantize = pytest.mark.parametrize(
    "quantize", [quantize_, torchao_quantize_], ids=["ours", "torchao's"]
)


def by_name(module, name):
    """As people leave out a head: the model itself has a name without it too."""
    return "head" not in name


class Model(nn.Module):
    def __init__(self, k=64):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)])
        self.experts = Concatenated()
        self.head = nn.Linear(k, 96)


def state_of(model):
    return [(n, type(m), [id(p) for p in m._parameters.values()]) for n, m in model.named_modules()]


def silent(quantize, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(*args, **kwargs)


# --- selection ------------------------------------------------------------------------------------


@each_config
def test_does_what_torchaos_does_in_silence(config):
    ours, theirs = Model(), Model()
    silent(quantize_, ours, config)
    torchao_quantize_(theirs, config)
    silent(quantize_, ours, config, filter_fn=is_experts)
    torchao_quantize_(theirs, config, filter_fn=is_experts)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert {type(m) for m in ours.modules()} != {type(m) for m in Model().modules()}


@each_config
def test_all_or_nothing(config):
    model = Model(k=100)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"(?s)1 of 3 layers cannot be quantized:\nhead: .*100"):
        quantize_(model, config)
    assert state_of(model) == before


@each_config
def test_a_filter_that_selects_nothing(config):
    model = Model()
    text = (
        r"filter_fn selects nothing in Model, which holds linear layers \(blocks.0.0, blocks.1.0, head\): "
        r"filter_fn=torchao_mx.is_linear; modules of experts \(experts\): filter_fn=torchao_mx.is_experts"
    )
    with pytest.raises(ValueError, match=text):
        check_model(model, config, lambda m, n: "attention" in n)
    before = state_of(model)
    with pytest.warns(UserWarning, match=text):
        quantize_(model, config, filter_fn=lambda m, n: "attention" in n)
    assert state_of(model) == before
    with pytest.warns(UserWarning, match="holds neither linear layers nor modules of experts"):
        quantize_(nn.Sequential(nn.ReLU()), config)


@each_config
@each_quantize
def test_a_filter_by_name_alone(config, quantize):
    """The model matches, and quantize_ looks no further."""
    model = Model()
    before = state_of(model)
    text = "Model is not an nn.Linear but holds 3 linear layers and 1 module of experts.*is_linear"
    with pytest.raises((TypeError, ValueError), match=text):
        quantize(model, config, filter_fn=by_name)
    assert state_of(model) == before
    with pytest.raises((TypeError, ValueError), match=r"1 module of experts.*is_experts\(module\)"):
        quantize(nn.Sequential(Concatenated()), config, filter_fn=by_name)


class Fancy(nn.Module):
    """Experts of no layout."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 64, 64))


def test_experts_that_are_not_known():
    for call in (quantize_, check_model):
        model = nn.ModuleDict({"up": nn.Linear(64, 64), "mlp": Fancy()})
        with pytest.warns(UserWarning, match=r"mlp: Fancy holds w \[4, 64, 64\]"):
            call(model, PTQ)


def test_a_module_at_two_places_is_one_and_nothing_is_warned_of():
    for prepare, convert in STEPS.values():
        layer = nn.Linear(64, 96)
        model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
        silent(quantize_, model, prepare)
        silent(quantize_, model, convert)
        assert model["a"][0] is model["b"][0] is layer
        assert isinstance(layer.weight, MXTensor)


# --- other configs --------------------------------------------------------------------------------


def test_other_configs_are_torchaos():
    model = Model()
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.head.weight).__module__.startswith("torchao.")
    with pytest.warns(UserWarning, match="filter_fn selects nothing in Model"):
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, n: False)
    int4 = QATConfig(
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare"
    )
    model = Model()
    quantize_(model, int4)
    quantize_(model.experts, PREPARE, filter_fn=is_experts)
    assert type(model.head) is FakeQuantizedLinear
    with pytest.raises(TypeError, match="QATConfig contains no scheme of torchao_mx"):
        check_model(model, int4)
    quantize_(model, BACK, filter_fn=by_name)  # theirs and ours
    assert type(model.blocks[0][0]) is nn.Linear and type(model.experts) is Concatenated


@each_quantize
def test_fqn_to_config(quantize):
    model = Model()
    w4a8 = MXDynamicActivationMXWeightConfig(torch.float8_e4m3fn, torch.float4_e2m1fn_x2)
    configs = {"head": w4a8, "experts": PTQ, r"re:blocks\.\d+\.0": LORA}
    quantize(model, FqnToConfig(OrderedDict(configs)), filter_fn=None)
    assert model.head.weight.activation == w4a8.activation_spec
    assert type(model.experts) is MXExperts
    assert type(model.blocks[1][0]).__name__ == "MXLoRALinear"
    model = Model()
    quantize(model, FqnToConfig(OrderedDict({"head": PREPARE})), filter_fn=None)
    assert type(model.head) is MXFakeQuantizedLinear
    quantize(model, FqnToConfig(OrderedDict({"head": CONVERT})), filter_fn=None)
    assert isinstance(model.head.weight, MXTensor)


def test_torchaos_base_config_is_checked():
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig as Torchaos

    fp4 = torch.float4_e2m1fn_x2
    config = QATConfig(Torchaos(activation_dtype=fp4, weight_dtype=fp4), step="prepare")
    check_model(Model().bfloat16(), config)
    with pytest.raises(ValueError, match=r"head: .*100"):
        check_model(Model(k=100).bfloat16(), config)
    with pytest.raises(
        ValueError, match=r"(?s)3 of 3 layers.*head: .*torch.float32 weight.*bfloat16"
    ):
        quantize_(Model(), config)


# --- convert --------------------------------------------------------------------------------------


@each_step
def test_convert_without_prepare(prepare, convert):
    text = "nothing to convert: no layer of Model is in training .* with step='prepare'"
    with pytest.raises(ValueError, match=text):
        check_model(Model(), convert)
    with pytest.warns(UserWarning, match=text):
        quantize_(Model(), convert)
    with pytest.warns(
        UserWarning, match="was never prepared, so convert leaves it in high precision"
    ) as r:
        torchao_quantize_(Model(), convert)
    assert len(r) == 3  # a layer each
    with pytest.warns(UserWarning, match="nothing in Model was prepared, so convert leaves it"):
        torchao_quantize_(Model(), convert, filter_fn=by_name)
    with pytest.warns(UserWarning, match="was never prepared"):
        torchao_quantize_(Model(), convert, filter_fn=is_experts)


@each_step
def test_convert_with_another_filter(prepare, convert):
    model = Model()
    quantize_(model, prepare)
    text = r"filter_fn selects none of the 3 layers in training \(blocks.0.0, blocks.1.0, head\)"
    with pytest.raises(ValueError, match=text):
        check_model(model, convert, is_experts)
    with pytest.warns(UserWarning, match=text):
        quantize_(model, convert, filter_fn=is_experts)
    with pytest.warns(UserWarning, match="^1 layer stays in training: head; pass the filter_fn"):
        quantize_(model, convert, filter_fn=lambda m, n: is_linear(m) and n != "head")
    assert isinstance(model.head, (MXFakeQuantizedLinear, NVFP4MXFP8Linear))
    assert isinstance(model.blocks[0][0].weight, MXTensor)


@each_step
def test_convert_of_what_is_packed_already_is_silent(prepare, convert):
    model = Model()
    silent(quantize_, model, prepare)
    silent(quantize_, model, convert)
    silent(torchao_quantize_, model, convert)


@each_step
def test_convert_names_what_was_never_prepared(prepare, convert):
    model = Model()
    quantize_(model, prepare, filter_fn=lambda m, n: is_linear(m) and n != "head")
    with pytest.warns(
        UserWarning, match="^1 layer was never prepared and stays in high precision: head$"
    ):
        quantize_(model, convert)
    assert isinstance(model.blocks[0][0].weight, MXTensor) and type(model.head) is nn.Linear


@each_step
@each_quantize
def test_convert_with_a_filter_by_name_alone(prepare, convert, quantize):
    """All that is in training in what the filter selects, here the model itself."""
    model, x = Model(), randn(5, 64)
    quantize_(model, prepare)
    quantize_(model, prepare, filter_fn=is_experts)
    wanted = [model.blocks[0](x), model.head(x)]
    silent(quantize, model, convert, filter_fn=by_name)
    assert type(model.experts) is MXExperts and isinstance(model.blocks[1][0].weight, MXTensor)
    assert all(map(torch.equal, wanted, [model.blocks[0](x), model.head(x)]))


def test_each_way_of_training_is_converted_by_its_own_config():
    model = Model()
    quantize_(model, PREPARE, filter_fn=lambda m, n: n == "head")
    quantize_(model, RECIPE, filter_fn=lambda m, n: is_linear(m) and n != "head")
    with pytest.warns(UserWarning, match="was prepared with another config and stays in training"):
        torchao_quantize_(model, RECIPE_CONVERT)
    assert type(model.head) is MXFakeQuantizedLinear
    assert isinstance(model.blocks[0][0].weight, MXTensor)
    with pytest.raises(ValueError, match=re.escape("head: MXFakeQuantizedLinear(")):
        check_model(model, QATConfig(MXWeightOnlyConfig(torch.float8_e4m3fn), step="convert"))
    silent(quantize_, model, CONVERT)
