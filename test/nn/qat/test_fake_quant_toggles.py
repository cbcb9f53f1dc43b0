"""Fake quantization can be switched off, to compute in high precision, and on again."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from _experts import each_family, inputs
from _grids import BASES, assert_close, linear, prepare, quantized, randn, relative_error
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.linear import disable_linear_fake_quant, enable_linear_fake_quant

from torchao_mx import MXTensor, NVFP4ForwardMXFP8BackwardConfig, is_experts
from torchao_mx.distributed import gather_packed
from torchao_mx.nn.qat import MXFakeQuantizedLinear, disable_fake_quant, enable_fake_quant

K, N = 64, 96
RECIPE = NVFP4ForwardMXFP8BackwardConfig()
PREPARES = {name: QATConfig(base, step="prepare") for name, base in BASES.items()}
PREPARES["recipe"] = RECIPE
each_scheme = pytest.mark.parametrize("scheme", PREPARES)
each_toggle = pytest.mark.parametrize(
    ("disable", "enable"),
    [
        (disable_linear_fake_quant, enable_linear_fake_quant),
        (disable_fake_quant, enable_fake_quant),
    ],
    ids=["torchao's", "ours"],
)


def result(model, *args):
    """The output and all gradients."""
    model.zero_grad()
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    y = model(*leaves)
    y.float().square().sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf.is_floating_point()]
    return [t.detach().clone() for t in (y, *grads, *(p.grad for p in model.parameters()))]


def same(a, b):
    return all(map(torch.equal, a, b))


@each_scheme
@each_toggle
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_linear_layer(scheme, disable, enable, autocast):
    plain, model, x = linear(), linear(), randn(2, 5, K)
    quantize_(model, PREPARES[scheme])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained, wanted = result(model, x), result(plain, x)
        assert not same(trained, wanted)
        model.apply(disable)
        assert same(result(model, x), wanted)
        assert "fake quantization off" in str(model)
        model.apply(enable)
        assert same(result(model, x), trained)
    assert "fake quantization off" not in str(model)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "nvfp4"])
def test_one_operand_of_a_linear_layer(scheme):
    """Each has a switch, as in torchao: activations are often quantized later than weights."""
    model, plain, x, dy = (
        prepare(linear(), BASES[scheme]),
        linear(),
        randn(5, K),
        randn(5, N, seed=3),
    )
    layer, base = model[0], BASES[scheme]
    for weight_on, activation_on in ((True, False), (False, True), (True, True)):
        layer.weight_fake_quantizer.enabled = weight_on
        layer.activation_fake_quantizer.enabled = activation_on
        wq = quantized(layer.weight, base.weight_spec) if weight_on else layer.weight.detach()
        xq = quantized(x, base.activation_spec) if activation_on else x
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(dy)
        assert torch.equal(y, F.linear(xq, wq, plain[0].bias))
        assert_close(leaf.grad, dy.double() @ wq.double())
        assert_close(layer.weight.grad, dy.double().mT @ xq.double())
        assert_close(layer.bias.grad, dy.double().sum(0))


@each_family
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "recipe"])
def test_experts(family, scheme):
    """Off, they compute what their source does, rounding errors aside."""
    torch.manual_seed(0)
    source = family().bfloat16().float()
    model = nn.Sequential(copy.deepcopy(source))
    quantize_(model, PREPARES[scheme], filter_fn=is_experts)
    args, _ = inputs(family, 11)
    model = model[0]
    trained = result(model, *args)
    model.apply(disable_fake_quant)
    assert "fake quantization off" in str(model)
    for got, want in zip(result(model, *args), result(source, *args), strict=True):
        assert relative_error(got, want) < 1e-5
    model.apply(enable_fake_quant)
    assert same(result(model, *args), trained)
    assert relative_error(trained[0], source(*args)) > 1e-2


def test_what_a_module_does_not_compute_is_refused():
    """Rather than computed as if all were on, or all off."""
    model = linear()
    quantize_(model, RECIPE)
    model[0].activation_fake_quantizer.enabled = False
    with pytest.raises(ValueError, match=r"on only for the weight.* disable_fake_quant do"):
        model(randn(2, K))
    model[0].weight_fake_quantizer.enabled = False
    assert torch.equal(model(randn(2, K)), linear()(randn(2, K)))

    packed = gather_packed(prepare(linear(), BASES["w4a16"]))
    gathered = MXTensor.from_hp(packed[0].weight.detach().data_, BASES["w4a16"].weight_spec.format)
    packed[0]._parameters["weight"] = nn.Parameter(gathered, requires_grad=False)  # as FSDP2 does
    packed(randn(2, K))
    packed.apply(disable_linear_fake_quant)
    with pytest.raises(ValueError, match="FSDP2 gathered it packed; leave gather_packed out"):
        packed(randn(2, K))


def test_the_switch_goes_with_copies_and_not_with_the_converted():
    model, x = prepare(linear(), BASES["w4a4"]), randn(5, K)
    model.apply(disable_linear_fake_quant)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), linear()(x))
        other.apply(enable_linear_fake_quant)
        assert not torch.equal(other(x), model(x))
    with pytest.warns(UserWarning, match="converted while its fake quantization is off"):
        quantize_(model, QATConfig(BASES["w4a4"], step="convert"))
    direct = linear()
    quantize_(direct, BASES["w4a4"])
    assert torch.equal(model(x), direct(x))
    assert sorted(vars(model[0])) == sorted(vars(direct[0]))


def test_compiled_layers_follow_their_switch():
    model, x = prepare(linear(), BASES["w4a8"]), randn(5, K)
    compiled, trained = torch.compile(model, backend="eager"), model(x)
    for toggle, want in (
        (enable_linear_fake_quant, trained),
        (disable_linear_fake_quant, linear()(x)),
        (enable_linear_fake_quant, trained),
    ):
        model.apply(toggle)
        assert torch.equal(compiled(x), want)


def test_other_modules():
    """Ours switches torchao's layers as well, and leaves all else alone."""
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU())
    int4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(weight_config=int4, step="prepare"))
    assert not isinstance(model[0], MXFakeQuantizedLinear)
    model.apply(disable_fake_quant)
    assert not model[0].weight_fake_quantizer.enabled
    model.apply(enable_fake_quant)
    assert model[0].weight_fake_quantizer.enabled
