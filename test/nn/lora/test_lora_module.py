"""MXLoRALinear as a module: how it is made, merging, moving, saving and refusals."""

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from _grids import (
    BASES,
    E2M1,
    E4M3,
    E5M2,
    as_bytes,
    assert_same_bytes,
    linear,
    name_of,
    of_type,
    quantize,
    randn,
    refusals,
    refused,
    relative_error,
)
from expecttest import assert_expected_inline
from test_lora import BOUND, FP8, K, N, R, each_format, lora, merged64
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import MXFP4, NVFP4, MXLoRALinear, MXTensor, ScaleCalculationMode, check_model
from torchao_mx import MXWeightOnlyLoRAConfig as Config

# --- what it is made of ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=name_of)
def test_an_mxtensor_is_kept(fmt):
    """Whatever its format: as loaded from a checkpoint, or quantized before."""
    by_hand, by_ptq = linear(), linear()
    by_hand[0].weight = nn.Parameter(MXTensor.from_hp(by_hand[0].weight, fmt), requires_grad=False)
    quantize(by_ptq, BASES["w4a16" if fmt == MXFP4 else "nvfp4_weight_only"])
    for model in (by_hand, by_ptq):
        qdata = model[0].weight.qdata
        check_model(model, Config(r=R, dtype=E4M3))
        quantize(model, Config(r=R, dtype=E4M3))
        assert type(model[0]) is MXLoRALinear and f"weight={fmt.name}" in str(model)
        assert model[0].weight.qdata.data_ptr() == qdata.data_ptr()


def test_the_layer_it_was_made_of():
    """Is unchanged; its hooks and mode live on."""
    calls, layer = [], linear()[0].eval()
    layer.register_forward_hook(lambda *args: calls.append(args))
    before = copy.deepcopy(layer.state_dict())
    twin = MXLoRALinear.from_linear(layer, Config(r=R))
    twin(randn(3, K))
    assert len(calls) == 1 and not twin.training
    assert type(layer.weight.data) is torch.Tensor and layer.weight.requires_grad
    assert layer.bias.requires_grad and not twin.bias.requires_grad
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name])


def test_the_constructor():
    layer = MXLoRALinear(K, N, bias=False, dtype=torch.bfloat16)
    assert layer.config == Config() and layer.bias is None
    assert layer.lora_A.shape == (16, K) and layer.lora_A.dtype == torch.bfloat16
    other = MXLoRALinear(K, N, bias=False, dtype=torch.bfloat16, device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    x = randn(3, K, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))


def test_repr():
    model = nn.Sequential(
        *(lora(c, n=32, dtype=torch.bfloat16)[0] for c in (
            Config(r=R), FP8, Config(r=R, block_size=16, lora_dropout=0.1, use_rslora=True, strategy="fused"),
        ))
    )  # fmt: skip
    model[2].merge()
    assert_expected_inline(
        str(model),
        """\
Sequential(
  (0): MXLoRALinear(in_features=64, out_features=32, bias=True, r=4, alpha=32, scaling=8, weight=mxfp4, orig_dtype=bfloat16, strategy=auto)
  (1): MXLoRALinear(in_features=64, out_features=32, bias=True, r=4, alpha=32, scaling=8, weight=mxfp4, orig_dtype=bfloat16, strategy=auto, compute_dtype=torch.float8_e4m3fn, grad_compute_dtype=torch.float8_e5m2)
  (2): MXLoRALinear(in_features=64, out_features=32, bias=True, r=4, alpha=32, scaling=16, weight=nvfp4, orig_dtype=bfloat16, strategy=fused, dropout=0.1, merged)
)""",
    )


# --- merging --------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_merge_and_unmerge(config, dtype):
    config = Config(
        r=R, dtype=config.dtype, block_size=config.block_size, adapter_dtype=torch.float32
    )
    model, x = lora(config, dtype=dtype), randn(5, K, dtype=dtype)
    layer, y, state = model[0], model(x), copy.deepcopy(model.state_dict())
    expected, _, _ = merged64(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    assert layer.merged and type(layer.weight.data) is torch.Tensor
    assert layer.weight.dtype == dtype and not layer.weight.requires_grad
    summands = state["0.weight"].dequantize(torch.float32).abs()
    summands += config.scaling * layer.lora_B.abs() @ layer.lora_A.abs()
    rounding = expected.abs() * torch.finfo(dtype).eps / 2  # the only one in `dtype`
    assert (layer.weight - expected).abs().le(rounding + 1e-6 * summands).all()
    assert torch.equal(model(x), F.linear(x, layer.weight, layer.bias))
    assert relative_error(model(x), y) < BOUND[dtype]
    before = model(x)
    with torch.no_grad():
        layer.lora_B.add_(1)
    assert torch.equal(model(x), before)  # the adapters are not used
    with torch.no_grad():
        layer.lora_B.copy_(state["0.lora_B"])
    assert sorted(model.state_dict()) == sorted(state)
    with pytest.warns(UserWarning, match="is already merged and is left as it is"):
        layer.merge()
    layer.unmerge()
    for name, t in model.state_dict().items():
        for field in ("qdata", "scale") if isinstance(t, MXTensor) else ():
            assert_same_bytes(getattr(t, field), getattr(state[name], field))
        assert torch.equal(t, state[name])
    assert torch.equal(model(x), y) and not layer.weight.requires_grad
    with pytest.warns(UserWarning, match="is not merged and is left as it is"):
        layer.unmerge()


def test_the_packed_weight_follows_a_merged_module():
    model = lora(Config(r=R))
    expected = model[0].weight.detach().clone()
    model[0].merge()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied[0].unmerge()
        assert torch.equal(copied[0].weight, expected)
    model.to(torch.bfloat16)
    assert model[0].packed_weight.dtype == torch.bfloat16
    model.to("meta")[0].unmerge()
    assert model[0].weight.device.type == "meta"


# --- moving, saving, loading ----------------------------------------------------------------------


@each_format
def test_state_dict_round_trip(config):
    """Through a file that executes no code, into a model of other weights, or an empty one."""
    model, x, file = lora(config), randn(3, K), io.BytesIO()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.lora_A", "0.lora_B"]
    torch.save(model.state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        other = lora(config, device="meta" if assign else "cpu", seed=9)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), model(x))
        assert str(other) == str(model)


def test_weights_of_the_other_kind_are_not_loaded():
    model, plain = lora(Config(r=R)), linear()
    state = model.state_dict()
    calls = [
        lambda: model.load_state_dict(plain.state_dict(), strict=False),
        lambda: model.load_state_dict(plain.state_dict(), strict=False, assign=True),
    ]
    texts = refusals(calls)
    model[0].merge()
    merged = model.state_dict()
    texts += "\n" + refusals([lambda: model.load_state_dict(state)])
    assert_expected_inline(
        texts,
        """\
TypeError: 0.weight in the state is not an MXTensor, but the layer is MXLoRALinear(in_features=64, out_features=96, bias=True, r=4, alpha=32, scaling=8, weight=mxfp4, orig_dtype=float32, strategy=auto): load high-precision weights before quantize_, and save this layer unmerged
TypeError: 0.weight in the state is not an MXTensor, but the layer is MXLoRALinear(in_features=64, out_features=96, bias=True, r=4, alpha=32, scaling=8, weight=mxfp4, orig_dtype=float32, strategy=auto): load high-precision weights before quantize_, and save this layer unmerged
TypeError: 0.weight in the state is MXTensor(shape=(96, 64), mxfp4, orig_dtype=float32, device=cpu), but the layer is MXLoRALinear(in_features=64, out_features=96, bias=True, r=4, alpha=32, scaling=8, weight=mxfp4, orig_dtype=float32, strategy=auto, merged): call unmerge() on this layer first""",
    )
    model.load_state_dict(merged)
    model[0].unmerge()
    assert isinstance(model[0].weight, MXTensor)


@pytest.mark.parametrize("copy_of", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(copy_of):
    model, x = lora(Config(r=R)), randn(3, K)
    if copy_of == "deepcopy":
        other = copy.deepcopy(model)
    elif copy_of == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert str(other) == str(model) and other[0].config == model[0].config
    expected = model(x)
    with torch.no_grad():
        as_bytes(model[0].weight.qdata).zero_(), model[0].lora_B.zero_()
    assert torch.equal(other(x), expected)


def test_other_dtypes():
    """``module.to(dtype)`` takes adapters along, as it does all parameters, and leaves packed bytes."""
    model = lora(Config(r=R, adapter_dtype=torch.float32))
    qdata = model[0].weight.qdata.clone()
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert_same_bytes(model[0].weight.qdata, qdata)
    assert model(randn(3, K, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(TypeError, match=r"cannot become torch\.float64"):
        model.double()


def test_on_meta():
    model = lora(Config(r=R), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.empty(3, K, device="meta")).shape == (3, N)
    source = lora(Config(r=R))
    model.to_empty(device="cpu")
    model[0].reset_parameters()  # of the adapters
    assert not model[0].lora_B.any() and model[0].lora_A.abs().max() < 1 / math.sqrt(K)
    model.load_state_dict(source.state_dict())
    x = randn(3, K)
    assert torch.equal(model(x), source(x))


# --- what it refuses ------------------------------------------------------------------------------


def test_twice_is_once_with_a_warning():
    model = lora(Config(r=R))
    layer = model[0]
    with pytest.warns(UserWarning, match="already has adapters and is left as it is"):
        quantize_(model, Config(r=2 * R))
    with pytest.warns(UserWarning, match="already holds an MXTensor and is left as it is"):
        quantize_(model, BASES["w4a16"])
    assert model[0] is layer and layer.lora_A.shape == (R, K)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantized_by(base):
    return quantize(linear(), base)


def test_refusals_of_layers():
    calls = [
        refused(linear(k=100), Config(r=R)),
        refused(linear(k=72), Config(r=R, block_size=16)),
        refused(linear(dtype=torch.float64), Config(r=R)),
        refused(linear(n=8), Config()),
        refused(linear(k=32), Config(r=33)),
        refused(nn.Sequential(nn.LayerNorm(32)), Config(), filter_fn=of_type(nn.LayerNorm)),
        refused(quantized_by(QATConfig(BASES["w4a4"])), Config(r=R)),
        refused(quantized_by(BASES["w4a8"]), Config(r=R)),
        refused(quantized_by(BASES["nvfp4_weight_only"]), FP8),
        refused(nn.Sequential(Doubling(K, N)), Config(r=R)),
        refused(nn.MultiheadAttention(64, 2), Config(r=R), filter_fn=of_type(nn.Linear)),
        refused(nn.Sequential(nn.utils.parametrizations.weight_norm(linear()[0])), Config(r=R)),
        lambda: MXLoRALinear(100, 64),
        lambda: MXLoRALinear(64, 64, config=BASES["w4a16"]),
        lambda: MXLoRALinear.from_linear(lora(Config(r=R))[0], Config(r=R)),
    ]
    assert_expected_inline(
        refusals(calls),
        """\
ValueError: Linear(in_features=100, out_features=96): its weight has shape (96, 100); its axis -1 (100) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
ValueError: Linear(in_features=72, out_features=96): its weight has shape (96, 72); its axis -1 (72) is not a multiple of 16, the block size of nvfp4: pad it, or leave this layer out with filter_fn
TypeError: Linear(in_features=64, out_features=96): its weight has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: Linear(in_features=64, out_features=8): r=16 exceeds its smaller side; use a smaller r, or leave this layer out with filter_fn
ValueError: Linear(in_features=32, out_features=96): r=33 exceeds its smaller side; use a smaller r, or leave this layer out with filter_fn
TypeError: LayerNorm is not an nn.Linear; select linear layers with quantize_(..., filter_fn=torchao_mx.is_linear)
TypeError: MXFakeQuantizedLinear(in_features=64, out_features=96, bias=True, weight=mxfp4 (rceil), activation=mxfp4 (rceil)) is in training; convert it first, with step='convert' and the config that prepared it, or leave it out with filter_fn
ValueError: Linear(in_features=64, out_features=96): its weight: MXTensor(shape=(96, 64), mxfp4, orig_dtype=float32, activation=mxfp8_e4m3 (rceil), device=cpu) quantizes the other operand of its products, which LoRA products cannot do: use .replace(activation=None)
ValueError: Linear(in_features=64, out_features=96): its weight: compute_dtype=torch.float8_e4m3fn with a weight in nvfp4; only MXFP4 weights convert to e4m3 without loss: leave compute_dtype out, or use MXFP4
TypeError: Doubling(in_features=64, out_features=96): it has its own forward, or another module reads its weight, so adapters would be bypassed; leave this layer out with filter_fn
TypeError: NonDynamicallyQuantizableLinear(in_features=64, out_features=64): it has its own forward, or another module reads its weight, so adapters would be bypassed; leave this layer out with filter_fn
TypeError: ParametrizedLinear(in_features=64, out_features=96): its weight is computed, for example by a parametrization or weight_norm, and must be a parameter; remove that first, or leave this layer out with filter_fn
ValueError: Linear(in_features=100, out_features=64): its weight has shape (64, 100); its axis -1 (100) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
TypeError: config=MXWeightOnlyConfig(dtype=torch.float4_e2m1fn_x2, block_size=32, scaling_mode=<ScaleCalculationMode.RCEIL: 'rceil'>) must be a torchao_mx.MXWeightOnlyLoRAConfig
TypeError: MXLoRALinear(in_features=64, out_features=96, bias=True, r=4, alpha=32, scaling=8, weight=mxfp4, orig_dtype=float32, strategy=auto) already has adapters: train these, or leave this layer out""",
    )


def test_check_model():
    model = nn.ModuleDict(
        {"up": nn.Linear(100, 64), "lora": lora(Config(r=R))[0], "down": nn.Linear(64, 8)}
    )
    model["packed"] = quantized_by(BASES["w4a16"])[0]
    model["gate"] = quantized_by(BASES["w4a4"])[0]
    before = str(model)
    assert_expected_inline(
        refusals([lambda: check_model(model, Config())]),
        """\
ValueError: 3 of 5 layers cannot be quantized:
up: Linear(in_features=100, out_features=64): its weight has shape (64, 100); its axis -1 (100) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
down: Linear(in_features=64, out_features=8): r=16 exceeds its smaller side; use a smaller r, or leave this layer out with filter_fn
gate: Linear(in_features=64, out_features=96): its weight: MXTensor(shape=(96, 64), mxfp4, orig_dtype=float32, activation=mxfp4 (rceil), device=cpu) quantizes the other operand of its products, which LoRA products cannot do: use .replace(activation=None)""",
    )
    assert str(model) == before
    check_model(lora(Config(r=R)), Config())


def test_refusals_of_inputs():
    model = lora(Config(r=R))
    calls = [
        lambda: model(randn(3, K).double()),
        lambda: model(randn(3, K // 2)),
        lambda: model(torch.tensor(1.0)),
    ]
    assert_expected_inline(
        refusals(calls),
        """\
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (3, 32); the weight reduces over 64 elements, which x's last axis must have
ValueError: x has shape (); the weight reduces over 64 elements, which x's last axis must have""",
    )


def test_a_weight_whose_gradient_is_asked_for_is_refused():
    """Rather than trained by nobody; not where no gradient is computed."""
    model = lora(Config(r=R)).requires_grad_(True)
    assert_expected_inline(
        refusals([lambda: model(randn(3, K))], NotImplementedError),
        """\
NotImplementedError: MXLoRALinear: the MXTensor weight has requires_grad=True but cannot be trained; call .requires_grad_(False), or train it with QATConfig(step='prepare') before converting""",
    )
    with torch.no_grad():
        assert model(randn(3, K)).shape == (3, N)


def test_configs_are_frozen():
    config = Config(r=R)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 2 * R


def test_scaling():
    assert Config(r=8, lora_alpha=4).scaling == 0.5
    assert Config(r=16, lora_alpha=4, use_rslora=True).scaling == 1.0
    assert Config().scaling == 2.0


def test_refusals_of_configs():
    mode = ScaleCalculationMode.RCEIL
    calls = [
        lambda: Config(r=0),
        lambda: Config(r=8.0),
        lambda: Config(r=True),
        lambda: Config(lora_alpha=0),
        lambda: Config(lora_alpha=math.nan),
        lambda: Config(lora_alpha="32"),
        lambda: Config(lora_dropout=1.0),
        lambda: Config(lora_dropout=-0.1),
        lambda: Config(use_rslora=1),
        lambda: Config(dtype=torch.int8),
        lambda: Config(dtype="mxfp4"),
        lambda: Config(dtype=E4M3, block_size=16),
        lambda: Config(scaling_mode=mode.value),
        lambda: Config(compute_dtype=torch.bfloat16),
        lambda: Config(compute_dtype=E4M3, dtype=E4M3),
        lambda: Config(compute_dtype=E4M3, lora_dropout=0.1),
        lambda: Config(compute_dtype=E4M3, grad_compute_dtype=torch.float16),
        lambda: Config(grad_compute_dtype=E5M2),
        lambda: Config(strategy="fast"),
        lambda: Config(strategy="unpack8"),
        lambda: Config(strategy="fused", compute_dtype=E4M3),
        lambda: Config(adapter_dtype=torch.float64),
        lambda: Config(max_scratch_bytes=0),
        lambda: Config(max_scratch_bytes=1e9),
    ]
    assert_expected_inline(
        refusals(calls),
        """\
ValueError: r=0; the rank of adapters must be 1 or more
TypeError: r=8.0; it must be an int
TypeError: r=True; it must be an int
ValueError: lora_alpha=0; it must be positive and finite
ValueError: lora_alpha=nan; it must be positive and finite
TypeError: lora_alpha='32'; it must be a number
ValueError: lora_dropout=1.0; it must be a probability of at least 0 and below 1
ValueError: lora_dropout=-0.1; it must be a probability of at least 0 and below 1
TypeError: use_rslora=1; it must be a bool
ValueError: no block format has dtype=torch.int8 with block_size=32; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
TypeError: dtype='mxfp4' is not a torch.dtype; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
ValueError: no block format has dtype=torch.float8_e4m3fn with block_size=16; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
TypeError: scaling_mode='rceil' is not a ScaleCalculationMode; use one of ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL, ScaleCalculationMode.CEIL, ScaleCalculationMode.EVEN
ValueError: compute_dtype=torch.bfloat16; it must be None (x's dtype) or torch.float8_e4m3fn
ValueError: compute_dtype=torch.float8_e4m3fn with a weight in mxfp8_e4m3; only MXFP4 weights convert to e4m3 without loss: leave compute_dtype out, or use MXFP4
ValueError: lora_dropout=0.1 with compute_dtype=torch.float8_e4m3fn; dropout bypasses the fused product, the only one in 8 bits: set one of them to its default
ValueError: grad_compute_dtype=torch.float16; it must be None or torch.bfloat16 (x's dtype), torch.float8_e4m3fn or torch.float8_e5m2
ValueError: grad_compute_dtype=torch.float8_e5m2 without a compute_dtype; give compute_dtype=torch.float8_e4m3fn too
ValueError: strategy='fast'; it must be one of auto, fused, unpack, fused8, unpack8
ValueError: strategy='unpack8' with compute_dtype=None; only fused8 and unpack8 compute in torch.float8_e4m3fn: leave strategy out, or give both
ValueError: strategy='fused' with compute_dtype=torch.float8_e4m3fn; only fused8 and unpack8 compute in torch.float8_e4m3fn: leave strategy out, or give both
ValueError: adapter_dtype=torch.float64; it must be None (the weight's), torch.bfloat16, torch.float16 or torch.float32
ValueError: max_scratch_bytes=0; it must be a positive number, or None for the default
TypeError: max_scratch_bytes=1000000000.0; it must be an int""",
    )
    assert Config(dtype=E2M1, block_size=16).weight_spec.format == NVFP4
