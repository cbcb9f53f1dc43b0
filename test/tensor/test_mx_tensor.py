"""MXTensor against the tensor it represents: each operator on both, compared bit for bit."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.prototype.mx_formats.mx_tensor import MXTensor as TorchAOMXTensor
from torchao.prototype.mx_formats.mx_tensor import QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import (
    NVFP4Tensor,
    QuantizeTensorToNVFP4Kwargs,
    per_tensor_amax_to_scale,
)
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.utils import _quantization_type

from torchao_mx import MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4, QuantizeSpec, ScaleCalculationMode
from torchao_mx.tensor import MXTensor

FORMATS = [MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4]
MX_FORMATS = FORMATS[:3]
SPEC = QuantizeSpec(MXFP8_E4M3)
E, N, K = 4, 64, 128

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def hp(*shape, dtype=torch.bfloat16, seed=0):
    """Random values whose rows differ in magnitude, so that mixed-up scales show."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    return (x * torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=g))).to(dtype)


def make(fmt, *shape, dtype=torch.bfloat16, seed=0):
    return MXTensor.from_hp(hp(*shape, dtype=dtype, seed=seed), fmt, activation=SPEC)


def storage(t):
    return t.untyped_storage().data_ptr()


def assert_same(actual, expected, like=None):
    """``actual`` is an MXTensor of expected's values; with ``like``, a view of its memory."""
    if not isinstance(expected, torch.Tensor):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e, like)
        return
    assert isinstance(actual, MXTensor)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.activation == SPEC
    assert torch.equal(actual.dequantize(), expected)
    if like is not None:
        assert storage(actual.qdata) == storage(like.qdata)
        assert storage(actual.scale) == storage(like.scale)
        strides = [list(t.stride()) for t in (actual, expected)]
        assert all(a == e or n == 1 for a, e, n in zip(*strides, actual.shape, strict=True))
        assert actual.storage_offset() == expected.storage_offset()


def expressions(text):
    """A function of ``w`` for each expression, named by it."""
    names = [name.strip() for name in re.split(r"[|\n]", text.strip())]
    return {name: eval("lambda w: " + name, globals()) for name in names}


def each(operators):
    return pytest.mark.parametrize("op", operators.values(), ids=operators)


VIEWS_2D = expressions("""
    w.detach() | torch.ops.aten.alias(w) | w.squeeze(0) | w[None].squeeze(0)
    w.t() | w.T | w.mT | w.t().t() | w.transpose(-1, 0) | w.transpose(1, 1) | w.permute(1, 0)
    w[8:24] | w[1::2] | w[8:8] | w[-5:] | w[:, 32:96] | w[..., -64:] | w[3:9, 64:] | w[None, 3:5]
    w.t()[32:96] | w.t()[:, 3:9] | w.narrow(0, 3, 5) | w.split(24) | w.split([10, 54])
    w.chunk(4) | w.chunk(2, dim=1) | w.t().chunk(2)
    w.view(4, -1, K) | w.reshape(2, 32, K) | w.view(4, 16, K).mT.view(2, 2, K, 16)
    w.unflatten(0, (4, 16)).flatten(0, 1) | w.unsqueeze(0) | w.unsqueeze(1) | w.unsqueeze(-1)
""")
VIEWS_3D = expressions("""
    w[1] | w[-1] | w[1, 8:24] | w[1:3] | w[::2] | w[1:2].squeeze(0) | w.view(E, N, K)
    w[:, 8:24] | w[:, :, 32:96] | w[2:, 8:24, 64:] | w.mT[1] | w.mT[1:3, 32:96, 5:] | w.mT.mT[1]
    w.mT | w.permute(0, 2, 1) | w.unbind() | list(w) | w.split(3) | w.chunk(2) | w.chunk(2, dim=1)
""")
VIEWS_3D_ONE_SCALE = expressions("""
    w.view(E * N, K) | w.reshape(2, -1, K) | w.transpose(0, 1) | w[:, 3] | w.unsqueeze(1)[:, 0]
""")
COPIES_3D = expressions("""
    w.clone() | w.mT.clone(memory_format=torch.contiguous_format) | copy.deepcopy(w[1:])
    w[:, 1:, 32:].contiguous() | w.mT[:, 32:, 1:].contiguous() | w.to(torch.half).to(torch.bfloat16)
    w.index_select(0, torch.tensor([3, 0, 3])) | w.index_select(1, torch.tensor([3, 0, 3]))
    w[torch.tensor([2, 0])] | w[[2, 0]] | w[torch.arange(E) != 1] | w[:, torch.tensor([2, 0])]
    torch.cat([w, w[1:2], w[:2]]) | torch.cat([w, w[:, :8]], dim=1) | torch.stack([w[2], w[0]])
    torch.cat([w, w[..., :64]], dim=-1) | torch.cat([w.mT, w.mT[:, 32:]], dim=1)
    pickle.loads(pickle.dumps(w[1:].mT)) | save_load(w[1:, 8:])
""")


def save_load(x, **kwargs):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **kwargs)


@each_format
@each(VIEWS_2D)
def test_views_of_2d(op, fmt):
    w = make(fmt, N, K)
    assert_same(op(w), op(w.dequantize()), like=w)


@each_format
@each(VIEWS_3D)
def test_views_of_3d(op, fmt):
    w = make(fmt, E, N, K)
    assert_same(op(w), op(w.dequantize()), like=w)


@each_format
@each(VIEWS_3D_ONE_SCALE)
def test_views_of_3d_without_scale_per_expert(op, fmt):
    w = make(fmt, E, N, K)
    if fmt.has_per_tensor_scale:
        with pytest.raises(NotImplementedError, match="each expert has a per_tensor_scale"):
            op(w)
        w = w.replace(per_tensor_scale=torch.tensor(0.5))
    assert_same(op(w), op(w.dequantize()), like=w)


@each_format
@each(COPIES_3D)
def test_copies(op, fmt):
    w = make(fmt, E, N, K)
    out = op(w)
    assert_same(out, op(w.dequantize()))
    data = (w.qdata, w.scale, w.per_tensor_scale)
    theirs = {storage(t) for t in data if t is not None}
    for t in (out.qdata, out.scale, out.per_tensor_scale):
        assert t is None or storage(t) not in theirs


@each_format
@pytest.mark.parametrize("shape", [(1, 32), (32, 32), (1, 1, 64), (2, 3, 4, 32)], ids=str)
def test_shapes_whose_strides_do_not_tell_the_packed_axis(shape, fmt):
    w = make(fmt, *shape)
    for op in (lambda w: w, lambda w: w.mT, lambda w: w.mT.contiguous(), lambda w: w.mT.mT):
        assert_same(op(w), op(w.dequantize()))
    assert (w.mT.packed_axis, w.mT.mT.packed_axis) == (-2, -1)
    assert w.mT.contiguous() is not w and w.contiguous() is w


@each_format
def test_inference_mode_decomposes(fmt):
    w = make(fmt, E, N, K)
    d = w.dequantize()
    with torch.inference_mode():
        for op in (lambda w: w.chunk(2), lambda w: list(w), lambda w: w.split(N // 2, dim=1)):
            assert_same(op(w), op(d), like=w)
        assert_same(w[1].reshape(2, -1, K), d[1].reshape(2, -1, K), like=w)
        assert_same(w.mT.contiguous(), d.mT.contiguous())
        assert w.to(torch.float32).dtype == torch.float32
        assert w.to(device="meta", dtype=torch.float16).device.type == "meta"


@each_format
def test_equality_is_by_value(fmt):
    w, other = make(fmt, N, K), make(fmt, N, K, seed=1)
    d = w.dequantize()
    assert torch.equal(w, w.clone()) and torch.equal(w, d) and not torch.equal(w, other)
    assert torch.equal(w == other, d == other.dequantize())
    assert torch.equal(w != other, d != other.dequantize())
    assert torch.equal(w.t() == d.t(), torch.ones(K, N, dtype=torch.bool))
    assert torch.equal(w == 0, d == 0) and torch.equal(w != 0, d != 0)


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_from_hp_of_any_strides(fmt, dtype):
    data = hp(2, K, 3 * N, dtype=dtype).mT[:, ::3]
    w = MXTensor.from_hp(nn.Parameter(data), fmt, ScaleCalculationMode.FLOOR)
    expected = MXTensor.from_hp(data.contiguous(), fmt, ScaleCalculationMode.FLOOR)
    assert torch.equal(w, expected) and w.dtype == dtype and not w.requires_grad
    relative = (w.dequantize().float() - data.float()).norm() / data.float().norm()
    assert relative < 2.0**-fmt.mantissa_bits / 2
    assert w.dequantize(torch.float32).dtype == torch.float32
    pts = w.per_tensor_scale
    assert pts.shape == (2, 1, 1) if fmt.has_per_tensor_scale else pts is None
    assert torch.equal(w[1], MXTensor.from_hp(data[1], fmt, ScaleCalculationMode.FLOOR))


@each_format
def test_copy_(fmt):
    w, src = make(fmt, E, N, K), make(fmt, E, N, K, seed=1)
    qdata = w.qdata
    assert w.copy_(src) is w and w.qdata is qdata and torch.equal(w, src)
    w[2].copy_(w[0].clone())
    w.mT[3].copy_(src.mT[1])
    assert torch.equal(w[2], src[0]) and torch.equal(w[3], src[1]) and torch.equal(w[1], src[1])
    if fmt.has_per_tensor_scale:
        for part in (w[0, :8], w[1:3, :8], src[0].clone()[:8]):
            with pytest.raises(ValueError, match="would also replace that of the other parts"):
                part.copy_(part.clone())
    p = nn.Parameter(src.clone(), requires_grad=False)
    p.data = w.to(torch.float32)
    assert p.dtype == torch.float32 and torch.equal(p, w.to(torch.float32))


# --- modules and files ----------------------------------------------------------------------------


def linear(w):
    module = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    module.weight = nn.Parameter(w, requires_grad=False)
    return module


@each_format
def test_module(fmt):
    w = make(fmt, N, K)
    module = linear(w)
    assert isinstance(module.weight, nn.Parameter) and isinstance(module.weight, MXTensor)
    assert_same(copy.deepcopy(module).float().weight.to(torch.bfloat16), w.dequantize())
    half = copy.deepcopy(module).half().weight
    assert isinstance(half, nn.Parameter) and half.dtype == torch.float16
    assert torch.equal(half.qdata, w.qdata)
    meta = copy.deepcopy(module).to("meta")
    assert meta.weight.device.type == meta.weight.qdata.device.type == "meta"
    empty = meta.to_empty(device="cpu").weight
    assert empty.device.type == "cpu" and empty.shape == w.shape
    assert not w.is_pinned()
    tied = nn.ModuleList([module, module])
    assert len(list(copy.deepcopy(tied).parameters())) == 1


@each_format
def test_state_dict(fmt):
    w = make(fmt, N, K)
    state = save_load(linear(w).state_dict())
    assert_same(state["weight"], w.dequantize())
    copied = linear(make(fmt, N, K, seed=1))
    copied.load_state_dict(state)
    assert torch.equal(copied.weight, w) and isinstance(copied.weight, nn.Parameter)
    with torch.device("meta"):
        assigned = nn.Linear(K, N, bias=False)
    assigned.load_state_dict(dict(state), assign=True)
    assert_same(assigned.weight, w.dequantize(), like=state["weight"])
    plain = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="both must be MXTensors"):
        plain.load_state_dict(dict(state))


@each_format
def test_save_keeps_parameters_and_maps_devices(fmt):
    p = nn.Parameter(make(fmt, E, N, K), requires_grad=False)
    for loaded in (save_load(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert isinstance(loaded, nn.Parameter) and torch.equal(loaded, p)
    meta = save_load(p, map_location="meta")
    assert meta.device.type == meta.scale.device.type == "meta" and meta.shape == p.shape
    assert save_load(p.to("meta")).format == fmt


def test_a_forged_file_is_refused():
    w = make(MXFP4, N, K)
    state = w.__getstate__()
    with pytest.raises(ValueError, match="check that they belong to one weight"):
        w.__setstate__(state | {"scale": state["scale"][:8]})
    with pytest.raises(ValueError, match="it is corrupt"):
        w.__setstate__(w[:8].__getstate__())
    with pytest.raises(ValueError, match="no block format is called"):
        w.__setstate__(state | {"format": "mxfp3"})


@pytest.mark.parametrize("fmt", [MXFP8_E5M2, NVFP4], ids=str)
def test_compile(fmt):
    w, x = make(fmt, E, N, K), hp(5, K)
    p = nn.Parameter(w[1], requires_grad=False)
    assert is_traceable_wrapper_subclass(p)

    def run(op, *args):
        torch.compiler.reset()
        return torch.compile(op, backend="aot_eager", fullgraph=True)(*args)

    d = w.dequantize()
    assert torch.equal(run(lambda w, x: w.dequantize() @ x.t(), p, x), d[1] @ x.t())
    assert torch.equal(run(lambda w, x: F.linear(x, w.dequantize()), p, x), F.linear(x, d[1]))
    out = run(lambda w, x: x @ w.mT[2, :, 8:24].contiguous().dequantize(), w, x)
    assert torch.equal(out, x @ d.mT[2, :, 8:24])
    assert_same(run(lambda w: torch.cat([w[1:], w]).clone(), w), torch.cat([d[1:], d]))


# --- torchao and gpt-oss --------------------------------------------------------------------------


def torchao_mx(fmt, *shape, **kwargs):
    return TorchAOMXTensor.to_mx(hp(*shape), fmt.elem_dtype, fmt.block_size, **kwargs)


def torchao_nvfp4(*shape, **kwargs):
    data = hp(*shape, dtype=torch.float32)
    scale = per_tensor_amax_to_scale(data.abs().max())
    return NVFP4Tensor.to_nvfp4(data, per_tensor_scale=scale, **kwargs)


def torchao_cases():
    kwargs = QuantizeTensorToMXKwargs(scaling_mode=ScaleCalculationMode.EVEN)
    for fmt in MX_FORMATS:
        yield pytest.param(torchao_mx(fmt, N, K, act_quant_kwargs=kwargs), id=f"{fmt}")
        yield pytest.param(torchao_mx(fmt, N, K).t(), id=f"{fmt}-t")
        yield pytest.param(torchao_mx(fmt, 2, N, K), id=f"{fmt}-3d")
        yield pytest.param(torchao_mx(fmt, 1, 32), id=f"{fmt}-row")
        swizzled = torchao_mx(fmt, 200, 192, is_swizzled_scales=True)
        yield pytest.param(swizzled, id=f"{fmt}-swizzled")
        yield pytest.param(swizzled.t(), id=f"{fmt}-swizzled-t")
    yield pytest.param(torchao_mx(MXFP8_E4M3, 2, N, K).view(2 * N, K), id="mxfp8-view")
    kwargs = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=True)
    yield pytest.param(torchao_nvfp4(N, K, act_quant_kwargs=kwargs), id="nvfp4")
    yield pytest.param(torchao_nvfp4(N, K).t(), id="nvfp4-t")
    yield pytest.param(torchao_nvfp4(200, 192, is_swizzled_scales=True), id="nvfp4-swizzled")
    yield pytest.param(torchao_nvfp4(200, 192, is_swizzled_scales=True).t(), id="nvfp4-swizzled-t")


@pytest.mark.parametrize("theirs", list(torchao_cases()))
def test_from_torchao_and_back(theirs):
    ours = MXTensor.from_torchao(theirs)
    assert torch.equal(ours.dequantize(), theirs.dequantize())
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.qdata.data_ptr() == theirs.qdata.data_ptr()
    assert theirs.is_swizzled_scales or ours.scale.data_ptr() == theirs.scale.data_ptr()
    back = ours.to_torchao()
    assert type(back) is type(theirs) and back.act_quant_kwargs == theirs.act_quant_kwargs
    assert back.qdata.data_ptr() == ours.qdata.data_ptr()
    assert back.scale.data_ptr() == ours.scale.data_ptr()
    assert torch.equal(back.dequantize(), theirs.dequantize())


@each_format
@pytest.mark.parametrize("shape", [(N, K), (E, N, K)], ids=str)
@pytest.mark.parametrize("activation", FORMATS, ids=str)
def test_to_torchao_and_back(shape, fmt, activation):
    w = MXTensor.from_hp(hp(*shape, dtype=torch.float32), fmt, activation=QuantizeSpec(activation))
    theirs = w.to_torchao(KernelPreference.AUTO)
    assert torch.equal(theirs.dequantize(), w.dequantize())
    back = MXTensor.from_torchao(theirs)
    assert back.activation == w.activation and repr(back) == repr(w)
    for name in ("qdata", "scale"):
        assert getattr(back, name).data_ptr() == getattr(w, name).data_ptr()


def test_torchao_refusals():
    spec = QuantizeTensorToNVFP4Kwargs()
    with pytest.raises(NotImplementedError, match="use_dynamic_per_tensor_scale=True"):
        MXTensor.from_torchao(torchao_nvfp4(N, K, act_quant_kwargs=spec))
    with pytest.raises(TypeError, match="NVFP4Tensor: quantize plain tensors"):
        MXTensor.from_torchao(torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"no block format has dtype=.* with block_size=64"):
        MXTensor.from_torchao(TorchAOMXTensor.to_mx(hp(N, K), torch.float8_e4m3fn, 64))
    with pytest.raises(ValueError, match="fp6_e3m2 is not supported"):
        MXTensor.from_torchao(TorchAOMXTensor.to_mx(hp(N, K), "fp6_e3m2", 32))
    w = make(MXFP4, E, N, K)
    for bad in (w[0, :, :64], w.mT, w[0, :1].t()):
        with pytest.raises(ValueError, match="torchao would infer"):
            bad.to_torchao()
    with pytest.raises(TypeError, match="kernel_preference='auto' is not a KernelPreference"):
        w.to_torchao("auto")


@pytest.mark.parametrize("shape", [(N, K), (E, N, K)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_blocks(shape, scale_dtype):
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape[:-1], K // 32, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 140, (*shape[:-1], K // 32), generator=g, dtype=torch.uint8)
    w = MXTensor.from_blocks(blocks, scales.view(scale_dtype))
    assert (w.shape, w.dtype, w.format) == (shape, torch.bfloat16, MXFP4)
    # transformers' convert_moe_packed_tensors: low nibble first, ldexp by the scale less 127.
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    expected = torch.ldexp(values[nibbles], scales.int().unsqueeze(-1) - 127)
    assert torch.equal(w.dequantize().float(), expected.flatten(-2))
    back, back_scales = w.to_blocks()
    assert torch.equal(back, blocks) and torch.equal(back_scales, scales)
    ptrs = (blocks.data_ptr(), scales.data_ptr())
    assert (w.qdata.data_ptr(), w.scale.data_ptr()) == ptrs
    assert (back.data_ptr(), back_scales.data_ptr()) == ptrs


def test_blocks_refusals():
    blocks, scales = torch.zeros(N, 4, 16, dtype=torch.uint8), torch.zeros(N, 4, dtype=torch.uint8)
    for bad, error, match in [
        ((blocks.int(), scales), TypeError, "both must be uint8, as gpt-oss stores them"),
        ((blocks, scales.int()), TypeError, "both must be uint8, as gpt-oss stores them"),
        ((blocks[..., :8], scales), ValueError, r"expected \[..., N, K/32, 16\]"),
        ((blocks, scales[:8]), ValueError, r"and, for these blocks, \(64, 4\)"),
        ((blocks.transpose(0, 1), scales.t()), ValueError, "no view can join their last two axes"),
        ((blocks, scales, torch.int8), TypeError, "orig_dtype has dtype torch.int8"),
    ]:
        with pytest.raises(error, match=match):
            MXTensor.from_blocks(*bad)
    for bad in (make(MXFP4, N, K).t(), make(MXFP8_E4M3, N, K), make(NVFP4, N, K)):
        with pytest.raises(ValueError, match="has no gpt-oss blocks"):
            bad.to_blocks()


# --- what it says ---------------------------------------------------------------------------------


def test_repr():
    w = MXTensor.from_hp(hp(N, K), MXFP4)
    shown = [w, w.t(), make(NVFP4, E, N, K)[1:].to("meta"), nn.Parameter(w.to(torch.float16))]
    assert_expected_inline(
        "\n".join(map(str, shown)),
        """\
MXTensor(shape=(64, 128), mxfp4, orig_dtype=bfloat16, device=cpu)
MXTensor(shape=(128, 64), mxfp4, orig_dtype=bfloat16, packed_axis=-2, device=cpu)
MXTensor(shape=(3, 64, 128), nvfp4, orig_dtype=bfloat16, activation=mxfp8_e4m3 (rceil), device=meta)
MXTensor(shape=(64, 128), mxfp4, orig_dtype=float16, device=cpu)""",
    )
    assert _quantization_type(w) == "MXTensor(mxfp4, orig_dtype=bfloat16)"


def transcript(expected, **names):
    """The lines of ``expected``, each an expression and its error, with the errors that come."""
    lines = []
    for line in expected.strip().split("\n"):
        expression, _, _ = line.partition("  ->  ")
        with pytest.raises((NotImplementedError, ValueError, TypeError)) as info:
            eval(expression, globals(), names)
        shown = str(info.value)
        for name, value in names.items():
            shown = shown.replace(str(value), f"<{name}>")
        lines.append(f"{expression}  ->  {info.type.__name__}: {shown}")
    return "\n".join(["", *lines, ""])


def test_what_operators_refuse():
    expected = """
w + 1  ->  NotImplementedError: aten.add.Tensor is not implemented for <w>: call .dequantize() on it first; for PEFT's DoRA, merge_and_unload and several adapters at once, load the model in high precision, or merge one adapter with torchao_mx.hf.save_pretrained(merge_adapters=True)
torch.zeros_like(w)  ->  NotImplementedError: aten.zeros_like.default is not implemented for <w>: call .dequantize() on it first
w.double()  ->  TypeError: <w> cannot become torch.float64; its logical dtype must be bfloat16, float16 or float32: call .dequantize() on it first
w[1]  ->  NotImplementedError: select of <w>: the result would have one dimension; an MXTensor has two or more; call .dequantize() on it first
w[:, 16:]  ->  ValueError: slice of <w> along axis 1 from 16 to 64 by 1: the axis is packed, so start and end must be multiples of 32, the block size of mxfp4, and step must be 1: align them, or call .dequantize() first
w[:, ::2]  ->  ValueError: slice of <w> along axis 1 from 0 to 64 by 2: the axis is packed, so start and end must be multiples of 32, the block size of mxfp4, and step must be 1: align them, or call .dequantize() first
w[:, 3]  ->  NotImplementedError: select along axis 1 of <w>: this would cut blocks of the packed axis; call .dequantize() on it first
w[torch.tensor([[0], [1]])]  ->  NotImplementedError: indexing of <w>: use one index tensor of one dimension; call .dequantize() on it first
w.index_select(1, torch.tensor([0]))  ->  NotImplementedError: index_select along axis 1 of <w>: this would cut blocks of the packed axis; call .dequantize() on it first
w.view(8, 32)  ->  NotImplementedError: view as (8, 32) of <w>: the last axis must stay, to keep the blocks whole; call .dequantize() on it first
w.view(3, 64)  ->  ValueError: view of <w> as (3, 64): the shape must have 256 elements
w[None].permute(2, 0, 1)  ->  NotImplementedError: permute of MXTensor(shape=(1, 4, 64), mxfp4, orig_dtype=bfloat16, device=cpu): the packed axis must remain one of the last two; call .dequantize() on it first
w[None].t()  ->  ValueError: t of MXTensor(shape=(1, 4, 64), mxfp4, orig_dtype=bfloat16, device=cpu): t needs two dimensions; use .mT to swap the last two
w.split([1, 2])  ->  ValueError: split of <w> along axis 0 into [1, 2]: the sizes must sum to 4
w.copy_(other)  ->  ValueError: copy_ into <w> from <other>: they differ in format: mxfp4 and mxfp8_e4m3; quantize both the same way, or assign instead of copying: load_state_dict(..., assign=True)
w.copy_(w.dequantize())  ->  ValueError: copy_ into <w> from a Tensor of shape (4, 64) and torch.bfloat16; both must be MXTensors: quantize a plain source with MXTensor.from_hp, or call .dequantize() on a packed one
torch.cat([w, other])  ->  ValueError: cat along axis 0: the tensors differ in format: mxfp4 and mxfp8_e4m3; make them alike, or call .dequantize() on them first
torch.cat([w, w.dequantize()])  ->  TypeError: cat of MXTensors and a Tensor of shape (4, 64) and torch.bfloat16: quantize it with MXTensor.from_hp, or call .dequantize() on the MXTensors; for DistributedDataParallel, pass init_sync=False
torch.cat([w, w[:, :32]])  ->  ValueError: cat along axis 0: the tensors differ in shape: (4, 64) and (4, 32); make them alike, or call .dequantize() on them first
torch.cat([a, b])  ->  ValueError: cat along axis 0: the tensors have different per_tensor_scales, and the result has only one: use torch.stack for one scale per expert, or concatenate the .dequantize() values and quantize them with MXTensor.from_hp
torch.cat([a, a.replace(per_tensor_scale=None)])  ->  ValueError: cat along axis 0: some of the tensors have a per_tensor_scale and some do not; requantize all of them with MXTensor.from_hp
setattr(w, "data", torch.zeros(4, 64))  ->  TypeError: cannot set .data of <w> to a Tensor of shape (4, 64) and torch.float32: quantize it with MXTensor.from_hp, or replace the parameter
"""
    w, other = MXTensor.from_hp(hp(4, 64), MXFP4), MXTensor.from_hp(hp(4, 64), MXFP8_E4M3)
    a, b = (MXTensor.from_hp(hp(4, 16, seed=seed), NVFP4) for seed in range(2))
    assert transcript(expected, w=w, other=other, a=a, b=b) == expected


def test_what_constructors_refuse():
    expected = """
MXTensor.from_hp(torch.zeros(32), MXFP4)  ->  ValueError: data has shape (32,); an MXTensor needs two or more dimensions: unsqueeze it
MXTensor.from_hp(torch.zeros(2, 48), MXFP4)  ->  ValueError: data has shape (2, 48); its axis -1 (48) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
MXTensor.from_hp(torch.zeros(0, 32), MXFP4)  ->  ValueError: data has shape (0, 32); block formats need dimensions above zero: skip empty tensors before quantizing
MXTensor.from_hp(torch.zeros(2, 32, dtype=torch.int8), MXFP4)  ->  TypeError: data has dtype torch.int8; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
MXTensor.from_hp(torch.zeros(2, 32), "mxfp4")  ->  TypeError: format='mxfp4' is not a BlockFormat; use MXFP4, MXFP8_E4M3, MXFP8_E5M2 or NVFP4
MXTensor.from_hp(torch.zeros(2, 32), MXFP4, "floor")  ->  TypeError: scaling_mode='floor' is not a ScaleCalculationMode; use one of ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL, ScaleCalculationMode.CEIL, ScaleCalculationMode.EVEN
MXTensor.from_hp(torch.zeros(2, 32), MXFP4, activation=MXFP4)  ->  TypeError: activation=mxfp4 is a BlockFormat; it must be a QuantizeSpec or None: wrap a format, QuantizeSpec(MXFP8_E4M3)
w.dequantize(torch.float64)  ->  TypeError: output_dtype has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
w.replace(qdata=w.qdata.int())  ->  TypeError: qdata has dtype torch.int32; mxfp4 needs torch.uint8: view the bytes as that dtype, or quantize with MXTensor.from_hp
w.replace(qdata=w.qdata.to("meta"))  ->  ValueError: scale is on cpu and qdata on meta; move them to one device
w.replace(qdata=w.qdata[:, :8])  ->  ValueError: qdata has shape (4, 8) and scale (4, 2); mxfp4 needs 16 bytes of qdata per scale along packed_axis=-1, and equal other axes: check that they belong to one weight
w.replace(packed_axis=0)  ->  ValueError: axis=0; blocks run along the last axis (-1) or the one before it (-2): move yours there with torch.movedim
w.replace(per_tensor_scale=torch.tensor(1.0))  ->  ValueError: mxfp4 has no per_tensor_scale; leave it None
v.replace(per_tensor_scale=torch.ones(4, 1))  ->  ValueError: per_tensor_scale has shape (4, 1); for a tensor of shape (4, 64) it must be 0-d, or [E, 1, 1] if the tensor is [E, N, K]: reshape it
"""
    w, v = MXTensor.from_hp(hp(4, 64), MXFP4), MXTensor.from_hp(hp(4, 64), NVFP4)
    assert transcript(expected, w=w, v=v) == expected
