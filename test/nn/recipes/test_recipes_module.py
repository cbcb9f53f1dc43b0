"""NVFP4MXFP8Linear as a module, and through quantize_: prepare, convert, refusals."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from _grids import (
    BASES,
    E2M1,
    E4M3,
    E5M2,
    assert_close,
    assert_same_bytes,
    convert,
    linear,
    of_type,
    prepare,
    quantize,
    randn,
    refusals,
    refused,
)
from _recipes import (
    CONFIG,
    CONFIGS,
    CONVERT,
    STOCHASTIC,
    K,
    N,
    each_bias,
    each_dtype,
    recipe,
)
from expecttest import assert_expected_inline
from torch import nn
from torchao.quantization.quantize_.common import KernelPreference

from torchao_mx import (
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    MXDynamicActivationMXWeightConfig,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    NVFP4MXFP8Linear,
    ScaleCalculationMode,
    check_model,
)

# --- the module -----------------------------------------------------------------------------------


def test_repr():
    model = nn.Sequential(
        NVFP4MXFP8Linear(64, 32),
        NVFP4MXFP8Linear(48, 64, bias=False, config=NVFP4ForwardMXFP8BackwardConfig(
            E4M3, E5M2, ScaleCalculationMode.EVEN, stochastic_rounding=True)),
    )  # fmt: skip
    assert_expected_inline(
        str(model),
        """\
Sequential(
  (0): NVFP4MXFP8Linear(in_features=64, out_features=32, bias=True, forward=nvfp4, backward=mxfp8_e4m3 (rceil), grad=mxfp8_e4m3 (rceil))
  (1): NVFP4MXFP8Linear(in_features=48, out_features=64, bias=False, forward=nvfp4, backward=mxfp8_e4m3 (even), grad=mxfp8_e5m2 (even), stochastic)
)""",
    )


def test_prepare_and_convert_keep_what_the_module_holds():
    model = linear()
    layer, calls = model[0], []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_buffer("statistics", torch.ones(3))
    layer.note = "kept"
    layer.bias.requires_grad_(False)
    model.eval()
    kept = [layer.weight, layer.bias, layer.statistics]
    attributes = sorted(layer.__dict__)
    quantize(model, CONFIG)
    now = model[0]
    assert now is layer
    assert all(a is b for a, b in zip((now.weight, now.bias, now.statistics), kept, strict=True))
    assert (now.training, now.note, now.bias.requires_grad) == (False, "kept", False)
    now(randn(2, K).requires_grad_()).sum().backward()
    assert calls == ["forward", "backward"]
    assert list(now.state_dict()) == ["weight", "bias", "statistics"]
    back = now.to_linear()
    assert type(back) is nn.Linear and sorted(back.__dict__) == attributes
    quantize(model, CONVERT)
    assert (model[0].note, model[0].bias) == ("kept", kept[1])


@pytest.mark.parametrize("copy_of", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_and_train_alone(copy_of):
    model, x = recipe(), randn(3, K)
    if copy_of == "deepcopy":
        other = copy.deepcopy(model)
    elif copy_of == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(x), model(x))
    other(x).sum().backward()
    assert model[0].weight.grad is None
    assert torch.equal(quantize(other, CONVERT)(x), model(x))


def test_state_dict_is_that_of_a_linear_layer():
    model, x = recipe(), randn(3, K)
    other = linear(seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(quantize(other, CONFIG)(x), model(x))


def test_tied_weights_stay_tied():
    model = nn.Sequential(*linear(n=K), *linear(n=K))
    model[1].weight = model[0].weight
    quantize(model, CONFIG)
    assert model[1].weight is model[0].weight
    x = randn(33, K)
    model(x).sum().backward()
    untied = quantize(nn.Sequential(*linear(n=K), *linear(n=K)), CONFIG)
    untied.load_state_dict(model.state_dict())
    untied(x).sum().backward()
    assert_close(model[0].weight.grad, untied[0].weight.grad + untied[1].weight.grad)


def test_on_meta():
    model = recipe(device="meta")
    assert model(torch.empty(33, K, device="meta")).shape == (33, N)
    model.to_empty(device="cpu").load_state_dict(linear().state_dict())
    x = randn(3, K)
    assert torch.equal(model(x), recipe()(x))


# --- through quantize_ ----------------------------------------------------------------------------


@each_bias
@each_dtype
def test_converted_is_trained_is_quantized(bias, dtype, device):
    model, base = recipe(bias=bias, dtype=dtype, device=device), BASES["nvfp4"]
    xs = [randn(*shape, K, dtype=dtype).to(device) for shape in ((), (1,), (33,), (2, 3), (0,))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(xs[2]).float().mean().backward()
    optimizer.step()
    trained = [model(x) for x in xs]
    direct = quantize(nn.Sequential(copy.deepcopy(model[0]).to_linear()), base)
    by_qat_config = convert(copy.deepcopy(model), base)
    quantize(model, CONVERT)
    assert type(model[0]) is nn.Linear and type(model[0].weight.data) is MXTensor
    assert not model[0].weight.requires_grad
    for other in (direct, by_qat_config):
        assert_same_bytes(model[0].weight.qdata, other[0].weight.qdata)
    for x, y in zip(xs, trained, strict=True):
        assert y.dtype == dtype and y.isfinite().all()
        assert all(torch.equal(y, m(x)) for m in (model, direct, by_qat_config))
    layer = model[0]
    assert quantize(model, CONVERT)[0] is layer  # again, and of a plain layer: nothing
    plain = linear()
    layer = plain[0]
    with pytest.warns(UserWarning, match="was never prepared, so convert leaves it"):
        quantize(plain, CONVERT)
    assert plain[0] is layer and type(layer.weight.data) is torch.Tensor


def test_preparing_twice_is_once_with_a_warning():
    model = recipe()
    layer = model[0]
    for again in (CONFIG, CONFIGS["e5m2"]):
        with pytest.warns(UserWarning, match="is already prepared and is left as it is"):
            quantize(model, again)
        assert model[0] is layer and layer.recipe == CONFIG
    with pytest.warns(UserWarning, match="is already prepared and is left as it is"):
        prepare(model, BASES["nvfp4"])
    assert model[0] is layer


def test_check_model_names_the_layers():
    model = nn.ModuleDict(
        {"up": nn.Linear(64, 40), "down": nn.Linear(40, 64), "ok": nn.Linear(48, 64)}
    )
    with pytest.raises(ValueError, match="2 of 3 layers") as info:
        check_model(model, CONFIG)
    assert [line.split(":")[0] for line in str(info.value).splitlines()[1:]] == ["up", "down"]
    mixed = nn.Sequential(*recipe(), nn.Linear(48, 64))
    check_model(mixed, CONFIG)
    with pytest.warns(
        UserWarning, match="1 layer was never prepared and stays in high precision: 1$"
    ):
        check_model(mixed, CONVERT)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_refusals():
    trained, embedding = recipe(), nn.Sequential(nn.Embedding(32, 32))
    config = NVFP4ForwardMXFP8BackwardConfig
    assert_expected_inline(
        refusals(
            [
                lambda: config(backward_dtype=E2M1),
                lambda: config(grad_dtype=torch.bfloat16),
                lambda: config(grad_dtype="float8_e4m3fn"),
                lambda: config(scaling_mode="rceil"),
                lambda: config(stochastic_rounding=1),
                lambda: config(kernel_preference=KernelPreference.TORCH),
                lambda: config(step="train"),
                refused(linear(dtype=torch.float64), CONFIG),
                refused(linear(k=40), CONFIG),
                refused(linear(n=48), CONFIG),
                refused(quantize(linear(), BASES["nvfp4"]), CONFIG),
                refused(prepare(linear(), BASES["nvfp4"]), CONFIG),
                refused(nn.Sequential(Doubling(K, N)), CONFIG),
                refused(embedding, CONFIG, filter_fn=of_type(nn.Embedding)),
                refused(recipe(), BASES["nvfp4"]),
                refused(recipe(), MXWeightOnlyLoRAConfig(r=4)),
                lambda: convert(recipe(), MXWeightOnlyConfig()),
                lambda: NVFP4MXFP8Linear(K, N, config=MXDynamicActivationMXWeightConfig()),
                lambda: NVFP4MXFP8Linear(K, 100),
                lambda: NVFP4MXFP8Linear.from_linear(nn.Conv1d(1, 1, 1)),
                lambda: trained(randn(3, K).double()),
                lambda: trained(randn(3, N)),
            ]
        ),
        """\
ValueError: backward_dtype=torch.float4_e2m1fn_x2; the backward pass is in MXFP8: use torch.float8_e4m3fn or torch.float8_e5m2
ValueError: grad_dtype=torch.bfloat16; the backward pass is in MXFP8: use torch.float8_e4m3fn or torch.float8_e5m2
TypeError: grad_dtype='float8_e4m3fn'; the backward pass is in MXFP8: use torch.float8_e4m3fn or torch.float8_e5m2
TypeError: scaling_mode='rceil' is not a ScaleCalculationMode; use one of ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL, ScaleCalculationMode.CEIL, ScaleCalculationMode.EVEN
TypeError: stochastic_rounding=1; it must be a bool
ValueError: kernel_preference=<KernelPreference.TORCH: 'torch'> is not supported; use KernelPreference.AUTO or KernelPreference.EMULATED
ValueError: step='train'; it must be one of prepare, convert
TypeError: Linear(in_features=64, out_features=96): its weight has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: Linear(in_features=40, out_features=96): its weight has shape (96, 40); its axis -1 (40) is not a multiple of 16, the block size of nvfp4: pad it, or leave this layer out with filter_fn
ValueError: Linear(in_features=64, out_features=48): its output has shape (48,); its axis -1 (48) is not a multiple of 32, the block size of mxfp8_e4m3: pad it, or leave this layer out with filter_fn
TypeError: Linear(in_features=64, out_features=96): its weight is already a MXTensor; quantize from a high-precision weight, or leave this layer out with filter_fn
TypeError: MXFakeQuantizedLinear(in_features=64, out_features=96, bias=True, weight=nvfp4, activation=nvfp4) is in training; convert it first, with step='convert' and the config that prepared it, or leave it out with filter_fn
TypeError: Doubling(in_features=64, out_features=96, bias=True) has its own forward, from its class or set on the instance, which fake quantization would drop; remove it, or leave this layer out with filter_fn
TypeError: Embedding is not an nn.Linear; select linear layers with quantize_(..., filter_fn=torchao_mx.is_linear)
TypeError: NVFP4MXFP8Linear(in_features=64, out_features=96, bias=True, forward=nvfp4, backward=mxfp8_e4m3 (rceil), grad=mxfp8_e4m3 (rceil)) is in training; convert it first, with step='convert' and the config that prepared it, or leave it out with filter_fn
TypeError: NVFP4MXFP8Linear(in_features=64, out_features=96, bias=True, forward=nvfp4, backward=mxfp8_e4m3 (rceil), grad=mxfp8_e4m3 (rceil)) is in training; convert it first, with step='convert' and the config that prepared it, or leave it out with filter_fn
ValueError: NVFP4MXFP8Linear(in_features=64, out_features=96, bias=True, forward=nvfp4, backward=mxfp8_e4m3 (rceil), grad=mxfp8_e4m3 (rceil)) cannot be converted with MXWeightOnlyConfig(dtype=torch.float4_e2m1fn_x2, block_size=32, scaling_mode=<ScaleCalculationMode.RCEIL: 'rceil'>), for which it was not trained. Convert with the base config of its prepare step, or convert without one and quantize the result
TypeError: config=MXDynamicActivationMXWeightConfig(activation_dtype=torch.float8_e4m3fn, weight_dtype=torch.float8_e4m3fn, block_size=32, scaling_mode=<ScaleCalculationMode.RCEIL: 'rceil'>); it must be a torchao_mx.NVFP4ForwardMXFP8BackwardConfig
ValueError: Linear(in_features=64, out_features=100): its output has shape (100,); its axis -1 (100) is not a multiple of 32, the block size of mxfp8_e4m3: pad it, or leave this layer out with filter_fn
TypeError: Conv1d is not an nn.Linear; select linear layers with quantize_(..., filter_fn=torchao_mx.is_linear)
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (3, 96); the weight reduces over 64 elements, which x's last axis must have""",
    )  # fmt: skip


def test_config_is_a_value():
    assert CONFIG == NVFP4ForwardMXFP8BackwardConfig() != STOCHASTIC
    assert len({CONFIG, NVFP4ForwardMXFP8BackwardConfig(), STOCHASTIC}) == 2
    assert pickle.loads(pickle.dumps(STOCHASTIC)) == STOCHASTIC
    specs = CONFIGS["grad_e5m2_floor"]
    formats = (specs.forward_spec.format, specs.backward_spec.format, specs.grad_spec.format)
    assert formats == (NVFP4, MXFP8_E4M3, MXFP8_E5M2)
