"""quantize_ converts a module in place: every reference to the module sees the converted one."""

import copy
import functools
import pickle
import types
import weakref

import pytest
import torch
from _experts import Concatenated, inputs
from _grids import BASES, randn
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXExperts,
    MXFakeQuantizeConfig,
    MXFakeQuantizedExperts,
    MXFakeQuantizedLinear,
    MXLoRAExperts,
    MXLoRALinear,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    NVFP4MXFP8Experts,
    NVFP4MXFP8Linear,
    check_model,
    is_experts,
    is_linear,
)

PTQ = MXWeightOnlyConfig()
PREPARE, CONVERT = QATConfig(PTQ, step="prepare"), QATConfig(PTQ, step="convert")
RECIPE = NVFP4ForwardMXFP8BackwardConfig()
# what a config makes of a linear layer and of experts
MADE = {
    "ptq": (PTQ, nn.Linear, MXExperts),
    "qat": (PREPARE, MXFakeQuantizedLinear, MXFakeQuantizedExperts),
    "lora": (MXWeightOnlyLoRAConfig(r=4), MXLoRALinear, MXLoRAExperts),
    "recipe": (RECIPE, NVFP4MXFP8Linear, NVFP4MXFP8Experts),
}
# and what gives the trained ones their packed weights
CONVERTS = {"qat": CONVERT, "recipe": NVFP4ForwardMXFP8BackwardConfig(step="convert")}
each_scheme = pytest.mark.parametrize("scheme", MADE)


def layer_of(kind):
    torch.manual_seed(0)
    return nn.Linear(64, 96) if kind == "linear" else Concatenated()


def arguments(kind):
    return (randn(5, 64),) if kind == "linear" else inputs(Concatenated, 5)[0]


def made_of(kind, scheme):
    config, linear, experts = MADE[scheme]
    return config, linear if kind == "linear" else experts


def quantized(model, config):
    quantize_(model, config, filter_fn=lambda m, n: is_linear(m) or is_experts(m))
    return model


def is_packed(module):
    return any(isinstance(p.data, MXTensor) for p in module.parameters())


each_kind = pytest.mark.parametrize("kind", ["linear", "experts"])


@each_kind
@each_scheme
def test_a_module_given_itself(kind, scheme):
    """torchao drops what a handler returns for the model itself."""
    config, made = made_of(kind, scheme)
    layer, inside, args = layer_of(kind), nn.Sequential(layer_of(kind)), arguments(kind)
    torch.manual_seed(1)  # adapters
    quantized(layer, config)
    torch.manual_seed(1)
    quantized(inside, config)
    assert type(layer) is type(inside[0]) is made
    assert is_packed(layer) == (scheme in ("ptq", "lora"))
    y = layer(*args)
    assert torch.equal(y, inside[0](*args))
    if scheme in CONVERTS:
        quantized(layer, CONVERTS[scheme])
        assert is_packed(layer) and type(layer) is (nn.Linear if kind == "linear" else MXExperts)
        assert torch.equal(layer(*args), y)


@each_kind
@each_scheme
def test_a_module_at_two_places_stays_one(kind, scheme):
    config, made = made_of(kind, scheme)
    layer = layer_of(kind)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer), "c": layer})
    with pytest.warns(UserWarning, match="left as it is"):  # the handler meets it again
        quantized(model, config)
    assert model["a"][0] is model["b"][0] is model["c"] is layer
    assert type(layer) is made
    if scheme in CONVERTS:
        quantized(model, CONVERTS[scheme])
        assert model["a"][0] is model["b"][0] is layer and is_packed(layer)


@each_kind
@pytest.mark.parametrize("scheme", ["qat", "lora", "recipe"])
def test_hooks_of_every_registry(kind, scheme):
    """Each is called with the module, once, and goes with its handle, before and after each step."""
    layer, args = layer_of(kind), arguments(kind)
    model, calls = nn.Sequential(layer), []

    def hook(name, returned=None):
        def note(module, *_):
            calls.append((name, module))
            return returned

        return note

    handles = [
        layer.register_forward_pre_hook(hook("forward_pre")),
        layer.register_forward_pre_hook(lambda m, a, kw: hook("with_kwargs")(m), with_kwargs=True),
        layer.register_forward_hook(hook("forward")),
        layer.register_forward_hook(hook("always"), always_call=True),
        layer.register_full_backward_pre_hook(hook("backward_pre")),
        layer.register_full_backward_hook(hook("backward")),
        layer._register_state_dict_hook(hook("state_dict")),
        layer.register_state_dict_pre_hook(hook("state_dict_pre")),
        layer.register_load_state_dict_pre_hook(hook("load")),
        layer.register_load_state_dict_post_hook(hook("loaded")),
    ]

    def names():
        calls.clear()
        model[0](*args).sum().backward()
        model.load_state_dict(model.state_dict())
        assert all(module is layer is model[0] for _, module in calls)
        return sorted(name for name, _ in calls)

    wanted = names()
    assert len(wanted) == len(handles)
    quantized(model, MADE[scheme][0])
    assert type(layer) is made_of(kind, scheme)[1] and names() == wanted
    if scheme in CONVERTS:
        quantized(model, CONVERTS[scheme])
        assert is_packed(layer) and names() == wanted
    for handle in handles:
        handle.remove()
    assert names() == []


@each_kind
@each_scheme
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(kind, scheme, copy_of):
    layer, args = quantized(layer_of(kind), MADE[scheme][0]), arguments(kind)
    other = copy_of(layer)
    assert type(other) is type(layer) and str(other) == str(layer)
    assert torch.equal(other(*args), layer(*args))
    ours = {p.data_ptr() for p in layer.parameters() if not isinstance(p.data, MXTensor)}
    assert not ours & {p.data_ptr() for p in other.parameters() if not isinstance(p.data, MXTensor)}


def test_a_converted_layer_holds_no_other_module():
    """Nor does anything that is bound, as the representation of a packed weight is."""
    for base in (PTQ, BASES["w4a8"]):
        layer = nn.Linear(64, 96)
        quantize_(layer, QATConfig(base, step="prepare"))
        quantize_(layer, QATConfig(base, step="convert"))
        assert layer.extra_repr.args == (layer,) and "weight=mxfp4" in str(layer)


def test_attributes_bound_to_a_module_are_bound_to_what_it_becomes():
    class Own:
        def method(self):
            return self

    layer = nn.Linear(64, 96)
    layer.method = types.MethodType(Own.method, layer)
    layer.partial = functools.partial(Own.method, layer)
    layer.listed = [1]
    config = MXFakeQuantizeConfig()
    twin = MXFakeQuantizedLinear.from_linear(layer, config, config)
    assert twin.method() is twin.partial() is twin and layer.method() is layer.partial() is layer
    quantize_(layer, PREPARE)
    assert layer.method() is layer.partial() is layer and layer.listed == [1]


def test_twins_share_no_registry():
    layer = nn.Linear(64, 96)
    layer.register_buffer("statistics", torch.ones(3), persistent=False)
    config = MXFakeQuantizeConfig()
    twin = MXFakeQuantizedLinear.from_linear(layer, config, config)
    twin.register_buffer("statistics", torch.ones(3))
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(twin.state_dict()) == ["weight", "bias", "statistics"]


def test_the_twin_is_given_up():
    layer = nn.Linear(64, 96)
    seen, stand_in = [], MXFakeQuantizedLinear.from_linear

    class Noting(MXFakeQuantizedLinear):
        @classmethod
        def from_linear(cls, *args):
            twin = stand_in(*args)
            seen.append(weakref.ref(twin))
            return twin

    config = MXFakeQuantizeConfig()
    Noting.from_linear(layer, config, config)
    assert type(layer) is nn.Linear  # the source of a public constructor is left alone
    quantize_(layer, PREPARE)
    assert seen[0]() is None


@each_scheme
def test_compiled_parents_follow(scheme):
    layer, x = nn.Linear(64, 96), randn(5, 64)
    parent = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="eager")
    before = parent(x)
    quantize_(layer, MADE[scheme][0])
    assert torch.equal(parent(x), layer(x).relu())
    assert not torch.equal(parent(x), before)


def test_a_layer_that_compiled_itself_follows():
    layer, x = nn.Linear(64, 96), randn(5, 64)
    layer.compile(backend="eager")
    before = layer(x)
    quantize_(layer, PREPARE)
    assert torch.equal(layer(x), MXFakeQuantizedLinear.forward(layer, x))
    assert not torch.equal(layer(x), before)


class Slotted(nn.Linear):
    __slots__ = ("extra",)


class SlottedExperts(Concatenated):
    __slots__ = ("extra",)


@pytest.mark.parametrize("cls", [Slotted, SlottedExperts])
@each_scheme
def test_a_class_that_cannot_change_is_refused(cls, scheme):
    """Nothing is changed; linear layers under PTQ keep their class and pass."""
    layer = cls(64, 96)
    state, attributes = layer.state_dict(), dict(vars(layer))
    config = MADE[scheme][0]
    if cls is Slotted and scheme == "ptq":
        quantize_(layer, config)
        assert is_packed(layer) and type(layer) is Slotted
        return
    with pytest.raises(TypeError, match=r"must change the class .* leave this module out"):
        quantized(layer, config)
    assert type(layer) is cls and vars(layer) == attributes
    assert all(p is state[n] or torch.equal(p, state[n]) for n, p in layer.state_dict().items())
    with pytest.raises(ValueError, match=r"0: .*must change the class"):
        check_model(nn.Sequential(layer), config, lambda m, n: is_linear(m) or is_experts(m))


@pytest.mark.parametrize("scheme", ["qat", "lora", "recipe"])
def test_experts_with_a_forward_of_their_own_are_refused(scheme):
    """It would go on to compute what it did, without adapters or quantization."""
    layer = Concatenated()
    layer.forward = torch.compile(layer.forward, backend="eager")
    with pytest.raises(TypeError, match="has a forward set on the instance"):
        quantized(layer, MADE[scheme][0])
    assert type(layer) is Concatenated and not is_packed(layer)


@pytest.mark.parametrize("scheme", ["qat", "lora", "recipe"])
def test_a_hidden_forward_is_that_of_the_new_class(scheme):
    """As accelerate's hooks hide it: they call ``_old_forward``, a method bound to the module."""
    layer, args = Concatenated(), arguments("experts")
    layer._hf_hook, layer._old_forward = object(), layer.forward

    def new_forward(module, *args):
        return module._old_forward(*args)

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer.forward)
    torch.manual_seed(1)
    quantized(layer, MADE[scheme][0])
    assert layer.forward.__wrapped__ is not None
    assert torch.equal(layer(*args), type(layer).forward(layer, *args))
    layer(*args).sum().backward()
    trained = [n for n, p in layer.named_parameters() if p.grad is not None]
    assert trained and all(("lora" in n) == (scheme == "lora") for n in trained)
