"""QAT of linear layers: trained, converted and directly quantized layers agree; gradients are right."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from _grids import (
    BASES,
    DTYPES,
    E2M1,
    E4M3,
    E5M2,
    assert_close,
    convert,
    linear,
    name_of,
    of_type,
    prepare,
    quantize,
    quantized,
    randn,
    refusals,
    refused,
    relative_error,
)
from expecttest import assert_expected_inline
from torch import nn
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig as TorchaoConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor as TorchaoMXTensor
from torchao.prototype.qat import MXFakeQuantizeConfig as TorchaoFakeQuantizeConfig
from torchao.prototype.qat import MXFakeQuantizedLinear as TorchaoFakeQuantizedLinear
from torchao.quantization import Int4WeightOnlyConfig
from torchao.quantization.qat import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    IntxFakeQuantizeConfig,
    QATConfig,
)
from torchao.quantization.quantize_.common import KernelPreference

from torchao_mx import (
    MXFakeQuantizeConfig,
    MXFakeQuantizedLinear,
    MXTensor,
    ScaleCalculationMode,
    register_qat_handler,
)
from torchao_mx.nn.registry import handler_of

K, N = 64, 96
W4A16, W4A4, W8A8, W4A8 = (BASES[name] for name in ("w4a16", "w4a4", "w8a8", "w4a8"))
FP4, FP8 = MXFakeQuantizeConfig(), MXFakeQuantizeConfig(E4M3)
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


# --- one function ---------------------------------------------------------------------------------

# weight's, activations'
DTYPE_PAIRS = [
    *((d, d) for d in DTYPES),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
]


@each_base
@each_bias
@pytest.mark.parametrize(("w_dtype", "x_dtype"), DTYPE_PAIRS, ids=name_of)
def test_trained_is_converted_is_quantized(base, bias, w_dtype, x_dtype, device):
    model = prepare(linear(bias, w_dtype, device), base)
    xs = [randn(*shape, K, dtype=x_dtype).to(device) for shape in SHAPES]
    assert type(model[0]) is MXFakeQuantizedLinear
    trained = [model(x) for x in xs]
    convert(model, base)
    assert type(model[0]) is nn.Linear
    assert type(model[0].weight.data) is MXTensor
    direct = quantize(linear(bias, w_dtype, device), base)
    for x, y in zip(xs, trained, strict=True):
        assert (y.shape, y.dtype) == ((*x.shape[:-1], N), x_dtype)
        assert torch.equal(y, model(x))
        assert torch.equal(y, direct(x))
        assert y.isfinite().all()


SHAPES = [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)]


@each_base
def test_after_steps_of_an_optimizer(base, device):
    """Made before prepare: the parameters stay the same objects."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 32)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepare(model, base)
    x, target = torch.randn(64, K).to(device), torch.randn(64, 32).to(device)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model(x)
    assert torch.equal(convert(model, base)(x), trained)


# --- gradients ------------------------------------------------------------------------------------


def check_gradients(model, base, x, dy, dtype=None):
    """Of x, weight and bias against float64: the product's, at the quantized operands."""
    layer = model[0]
    x = x.detach().requires_grad_()
    wq = quantized(layer.weight, base.weight_spec).to(x.dtype).double()
    xq = quantized(x, base.activation_spec).double()
    model(x).backward(dy)
    dy = dy.double()
    expected = {"x": dy @ wq, "weight": dy.flatten(0, -2).mT @ xq.flatten(0, -2)}
    grads = {"x": x.grad, "weight": layer.weight.grad}
    if layer.bias is not None:
        expected["bias"] = dy.flatten(0, -2).sum(0)
        grads["bias"] = layer.bias.grad
    for name, grad in grads.items():
        assert_close(grad, expected[name], dtype or x.dtype)
        assert relative_error(2 * grad, expected[name]) > 0.9  # the comparison is no formality


@each_base
@each_bias
@each_dtype
def test_gradients(base, bias, dtype, device):
    model = prepare(linear(bias, dtype, device), base)
    x, dy = randn(2, 5, K, dtype=dtype), randn(2, 5, N, dtype=dtype, seed=3)
    check_gradients(model, base, x.to(device), dy.to(device))
    for param in model.parameters():
        assert param.grad.dtype == param.dtype


@each_base
def test_gradients_of_fp32_weights_from_bf16_activations(base, device):
    model = prepare(linear(device=device), base)
    x, dy = (randn(5, n, dtype=torch.bfloat16, seed=n).to(device) for n in (K, N))
    check_gradients(model, base, x, dy)
    assert model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("base", [W4A16, W4A4, W4A8], ids=["w4a16", "w4a4", "w4a8"])
def test_gradients_of_non_contiguous_operands(base, device):
    xs = {
        "transposed": randn(K, 6).t(),
        "sliced": randn(6, 2 * K + 1)[:, 1 : K + 1],
        "stepped": randn(12, K)[::2],
        "swapped": randn(3, 2, K).transpose(0, 1),
        "expanded": randn(1, K).expand(6, -1),
    }
    for name, x in xs.items():
        model = linear(device=device)
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
        prepare(model, base)
        dy = randn(N, *x.shape[:-1], seed=3).movedim(0, -1)
        assert not x.is_contiguous() and not dy.is_contiguous(), name
        check_gradients(model, base, x.to(device), dy.to(device))


def test_gradients_of_a_sum_and_of_no_rows(device):
    for base in (W4A16, W4A4):
        model = prepare(linear(device=device), base)
        x = torch.empty(2, 0, K, device=device, requires_grad=True)
        model(x).sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad.eq(0).all() for p in model.parameters())
        model.zero_grad()
        check_gradients(
            model, base, randn(5, K).to(device), torch.ones((), device=device).expand(5, N)
        )


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    model, x = prepare(linear(), W4A4), randn(5, K).requires_grad_()
    tensors = {"x": x, **dict(model[0].named_parameters())}
    tensors[frozen].requires_grad_(False)
    model(x).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is None} == {frozen}


def test_gradients_accumulate_in_tied_weights():
    """Both layers use one Parameter, and do after prepare and after going back to nn.Linear."""
    model = nn.Sequential(*linear(n=K), *linear(n=K))
    model[1].weight = model[0].weight
    prepare(model, W4A4)
    assert model[1].weight is model[0].weight
    x = randn(5, K)
    model(x).sum().backward()
    untied = prepare(nn.Sequential(*linear(n=K), *linear(n=K)), W4A4)
    untied.load_state_dict(model.state_dict())
    untied(x).sum().backward()
    assert_close(model[0].weight.grad, untied[0].weight.grad + untied[1].weight.grad)
    convert(model)
    assert model[1].weight is model[0].weight


# --- the module -----------------------------------------------------------------------------------


def test_repr():
    model = nn.Sequential(
        MXFakeQuantizedLinear(64, 32, activation_config=FP8, weight_config=FP4),
        MXFakeQuantizedLinear(64, 32, bias=False, weight_config=MXFakeQuantizeConfig(E2M1, 16)),
    )
    assert_expected_inline(
        str(model),
        """\
Sequential(
  (0): MXFakeQuantizedLinear(in_features=64, out_features=32, bias=True, weight=mxfp4 (rceil), activation=mxfp8_e4m3 (rceil))
  (1): MXFakeQuantizedLinear(in_features=64, out_features=32, bias=False, weight=nvfp4)
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
    for step in (lambda: prepare(model, W4A4), lambda: convert(model)):
        step()
        now = model[0]
        assert now is layer
        assert all(
            a is b for a, b in zip((now.weight, now.bias, now.statistics), kept, strict=True)
        )
        assert (now.training, now.note, now.bias.requires_grad) == (False, "kept", False)
        assert list(now.state_dict()) == ["weight", "bias", "statistics"]
        now(randn(2, K).requires_grad_()).sum().backward()
        assert calls == ["forward", "backward"]
        calls.clear()
    assert sorted(model[0].__dict__) == attributes


def test_a_twin_shares_parameters_and_no_registries():
    """What is later added to one module is not added to the other."""
    layer = linear()[0]
    twin = MXFakeQuantizedLinear.from_linear(layer, FP8, FP4)
    back = twin.to_linear()
    assert twin.weight is layer.weight is back.weight
    twin.register_buffer("statistics", torch.ones(3))
    twin.register_forward_hook(lambda *_: None)
    twin.bias = None
    for other in (layer, back):
        assert list(other.state_dict()) == ["weight", "bias"]
        assert not other._forward_hooks


@pytest.mark.parametrize("copy_of", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_and_train_alone(copy_of):
    model, x = prepare(linear(), W4A8), randn(3, K)
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
    assert torch.equal(convert(other, W4A8)(x), model(x))


def test_state_dict_is_that_of_a_linear_layer():
    model, x = prepare(linear(), W4A4), randn(3, K)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = linear(seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(prepare(other, W4A4)(x), model(x))


@each_base
def test_on_meta(base):
    model = prepare(linear(device="meta"), base)
    assert model(torch.empty(3, K, device="meta")).shape == (3, N)
    model.to_empty(device="cpu").load_state_dict(linear().state_dict())
    x = randn(3, K)
    assert torch.equal(model(x), prepare(linear(), base)(x))
    assert convert(prepare(linear(device="meta"), base), base)[0].weight.device.type == "meta"


# --- through torchao's QATConfig ------------------------------------------------------------------


def torchao_base(dtype=E2M1, mode=ScaleCalculationMode.RCEIL):
    return TorchaoConfig(
        activation_dtype=dtype,
        weight_dtype=dtype,
        scaling_mode=mode,
        kernel_preference=KernelPreference.EMULATED,
    )


@pytest.mark.parametrize("mode", list(ScaleCalculationMode), ids=name_of)
@pytest.mark.parametrize("dtype", [E2M1, E4M3, E5M2], ids=name_of)
def test_forward_is_torchaos(dtype, mode):
    """What torchao's own QAT can do: equal bf16 operands, two axes, no bias."""
    config = TorchaoFakeQuantizeConfig(
        dtype, scaling_mode=mode, kernel_preference=KernelPreference.EMULATED
    )
    layer = linear(False, torch.bfloat16)[0]
    theirs = TorchaoFakeQuantizedLinear.from_linear(layer, config, config)
    ours = prepare(nn.Sequential(layer), torchao_base(dtype, mode))[0]
    x, dy = (randn(8, n, dtype=torch.bfloat16, seed=n) for n in (K, N))
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        results.append((y, leaf.grad, layer.weight.grad))
        layer.weight.grad = None
    assert torch.equal(results[0][0], results[1][0])
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs)


@each_dtype
def test_torchaos_base_config_prepares_our_module_and_converts_to_its_tensor(dtype):
    base, model = torchao_base(), linear(False, dtype)
    if dtype != torch.bfloat16:  # torchao's tensors are of bf16 weights only
        with pytest.raises(TypeError, match=r"cannot convert after training; use \.bfloat16"):
            prepare(model, base)
        return
    prepare(model, base)
    assert type(model[0]) is MXFakeQuantizedLinear
    x = randn(8, K, dtype=dtype)
    trained = model(x)
    convert(model, base)
    assert type(model[0].weight.data) is TorchaoMXTensor
    assert torch.equal(model(x), trained)


def test_explicit_configs():
    for activation, weight, base in ((None, FP4, W4A16), (FP4, FP4, W4A4), (FP8, FP4, W4A8)):
        explicit = QATConfig(activation_config=activation, weight_config=weight, step="prepare")
        model, x = quantize(linear(), explicit), randn(3, K)
        trained = model(x)
        assert torch.equal(trained, prepare(linear(), base)(x))
        assert torch.equal(quantize(convert(model), base)(x), trained)


def test_convert_without_a_base_gives_the_trained_linear_back():
    model = linear()
    weight = model[0].weight
    convert(prepare(model, W4A4))
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight


def test_other_cases_are_torchaos():
    """Its integer configs, its MX config given explicitly, embeddings, and converting what is none of ours."""
    model = prepare(linear(), Int4WeightOnlyConfig(group_size=32))
    assert type(model[0]) is FakeQuantizedLinear
    assert type(convert(model)[0]) is nn.Linear

    int8 = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    int4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    config = QATConfig(activation_config=int8, weight_config=int4, step="prepare")
    assert type(quantize(linear(), config)[0]) is FakeQuantizedLinear

    mx = TorchaoFakeQuantizeConfig()
    config = QATConfig(activation_config=mx, weight_config=mx, step="prepare")
    assert type(quantize(linear(), config)[0]) is TorchaoFakeQuantizedLinear

    model = nn.Sequential(nn.Embedding(32, 32))
    config = QATConfig(weight_config=int4, step="prepare")
    quantize(model, config, filter_fn=of_type(nn.Embedding))
    assert type(model[0]) is FakeQuantizedEmbedding

    plain = linear()
    layer = plain[0]
    with pytest.warns(
        UserWarning, match="was never prepared, so convert leaves it in high precision"
    ):
        assert convert(plain, W4A4)[0] is layer
    assert type(layer.weight.data) is torch.Tensor


def test_preparing_twice_is_once_with_a_warning():
    model = prepare(linear(), W4A4)
    layer = model[0]
    for again in (W4A4, W4A16):
        with pytest.warns(UserWarning, match="is already prepared and is left as it is"):
            prepare(model, again)
        assert model[0] is layer
        assert layer.activation_config == FP4


def test_registering_again_changes_nothing():
    handler = handler_of(QATConfig)
    register_qat_handler()
    assert handler_of(QATConfig) is handler


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_refusals():
    int4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    embedding = nn.Sequential(nn.Embedding(32, 32))
    trained = prepare(linear(), W4A4)
    assert_expected_inline(
        refusals(
            [
                lambda: QATConfig(W4A4, step="train"),
                lambda: QATConfig(W4A4, weight_config=FP4),
                lambda: QATConfig(FP4),
                refused(linear(dtype=torch.float64), QATConfig(W4A4)),
                refused(linear(k=100), QATConfig(W4A16)),
                refused(linear(k=80), QATConfig(weight_config=MXFakeQuantizeConfig(E2M1, 16),
                                                activation_config=FP4)),
                refused(linear(), QATConfig(activation_config=FP4)),
                refused(linear(), QATConfig(activation_config=FP4, weight_config=int4)),
                refused(quantize(linear(), W4A4), QATConfig(W4A4)),
                refused(nn.Sequential(Doubling(K, N)), QATConfig(W4A4)),
                refused(embedding, QATConfig(W4A4), filter_fn=of_type(nn.Embedding)),
                refused(trained, QATConfig(W4A16, step="convert")),
                lambda: MXFakeQuantizeConfig(torch.int8),
                lambda: MXFakeQuantizeConfig(E4M3, 16),
                lambda: MXFakeQuantizeConfig(kernel_preference=KernelPreference.TORCH),
                lambda: MXFakeQuantizedLinear(K, N, weight_config=W4A4),
                lambda: MXFakeQuantizedLinear(100, N, weight_config=FP4),
                lambda: trained(randn(3, K).double()),
                lambda: trained(randn(3, N)),
            ]
        ),
        """\
ValueError: `step` must be one of ['prepare', 'convert']
ValueError: Cannot specify both `base_config` and `weight_config`
ValueError: MXFakeQuantizeConfig was passed as `base_config`. Did you mean to do the following instead?
    qat_config = QATConfig(
        activation_config=MXFakeQuantizeConfig(...),
        weight_config=MXFakeQuantizeConfig(...),
        step="prepare",
    )
TypeError: Linear(in_features=64, out_features=96): its weight has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: Linear(in_features=100, out_features=96): its weight has shape (96, 100); its axis -1 (100) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
ValueError: Linear(in_features=80, out_features=96): its input has shape (80,); its axis -1 (80) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
ValueError: weight_config is missing; pass an MXFakeQuantizeConfig (activation_config may be None, for weight-only)
TypeError: weight_config is a IntxFakeQuantizeConfig; it must be a torchao_mx.MXFakeQuantizeConfig
TypeError: Linear(in_features=64, out_features=96): its weight is already a MXTensor; quantize from a high-precision weight, or leave this layer out with filter_fn
TypeError: Doubling(in_features=64, out_features=96, bias=True) has its own forward, from its class or set on the instance, which fake quantization would drop; remove it, or leave this layer out with filter_fn
TypeError: Embedding is not an nn.Linear; select linear layers with quantize_(..., filter_fn=torchao_mx.is_linear)
ValueError: MXFakeQuantizedLinear(in_features=64, out_features=96, bias=True, weight=mxfp4 (rceil), activation=mxfp4 (rceil)) cannot be converted with MXWeightOnlyConfig(dtype=torch.float4_e2m1fn_x2, block_size=32, scaling_mode=<ScaleCalculationMode.RCEIL: 'rceil'>), for which it was not trained. Convert with the base config of its prepare step, or convert without one and quantize the result
ValueError: no block format has dtype=torch.int8 with block_size=32; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
ValueError: no block format has dtype=torch.float8_e4m3fn with block_size=16; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
ValueError: kernel_preference=<KernelPreference.TORCH: 'torch'> is not supported; use KernelPreference.AUTO or KernelPreference.EMULATED
TypeError: weight_config is a MXDynamicActivationMXWeightConfig; it must be a torchao_mx.MXFakeQuantizeConfig
ValueError: Linear(in_features=100, out_features=96): its weight has shape (96, 100); its axis -1 (100) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (3, 96); the weight reduces over 64 elements, which x's last axis must have""",
    )  # fmt: skip


def accelerate_hook(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    return layer


@pytest.mark.parametrize(
    "change", [accelerate_hook, nn.utils.parametrizations.weight_norm], ids=["forward", "weight"]
)
def test_what_an_instance_overrides_is_refused_or_quantized(change):
    """accelerate sets an instance's forward; parametrizations compute its weight."""
    model = nn.Sequential(change(linear()[0]))
    try:
        prepare(model, W4A4)
    except (TypeError, ValueError):
        return
    x, layer = randn(3, K), model[0]
    xq, wq = (quantized(t, W4A4.weight_spec) for t in (x, layer.weight))
    assert torch.equal(layer(x), F.linear(xq, wq, layer.bias))
