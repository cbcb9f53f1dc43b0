"""MXTensor against the tensor it stands for: each operator on both, compared bit by bit."""

import copy
import io
import pickle

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

from torchao_mx import (
    MXFP4,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    QuantizeSpec,
    ScaleCalculationMode,
)
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
        assert actual.stride() == expected.stride()
        assert actual.storage_offset() == expected.storage_offset()


VIEWS_2D = {
    "detach": lambda w: w.detach(),
    "alias": lambda w: torch.ops.aten.alias(w),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "t_t": lambda w: w.t().t(),
    "transpose": lambda w: w.transpose(-1, 0),
    "transpose_same": lambda w: w.transpose(1, 1),
    "permute": lambda w: w.permute(1, 0),
    "rows": lambda w: w[8:24],
    "every_other_row": lambda w: w[1::2],
    "no_rows": lambda w: w[8:8],
    "last_rows": lambda w: w[-5:],
    "columns": lambda w: w[:, 32:96],
    "last_columns": lambda w: w[..., -64:],
    "rows_columns": lambda w: w[3:9, 64:],
    "t_rows": lambda w: w.t()[32:96],
    "t_columns": lambda w: w.t()[:, 3:9],
    "narrow": lambda w: w.narrow(0, 3, 5),
    "split": lambda w: w.split(24),
    "split_sizes": lambda w: w.split([10, 54]),
    "chunk_rows": lambda w: w.chunk(4),
    "chunk_columns": lambda w: w.chunk(2, dim=1),
    "t_chunk": lambda w: w.t().chunk(2),
    "view": lambda w: w.view(4, -1, K),
    "reshape": lambda w: w.reshape(2, 32, K),
    "t_view": lambda w: w.view(4, 16, K).mT.view(2, 2, K, 16),
    "unflatten_flatten": lambda w: w.unflatten(0, (4, 16)).flatten(0, 1),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "unsqueeze_middle": lambda w: w.unsqueeze(1),
    "unsqueeze_last": lambda w: w.unsqueeze(-1),
    "none": lambda w: w[None, 3:5],
    "squeeze": lambda w: w[None].squeeze(0),
    "squeeze_long": lambda w: w.squeeze(0),
}

VIEWS_3D = {
    "select": lambda w: w[1],
    "select_last": lambda w: w[-1],
    "select_rows": lambda w: w[1, 8:24],
    "slice": lambda w: w[1:3],
    "slice_step": lambda w: w[::2],
    "rows": lambda w: w[:, 8:24],
    "columns": lambda w: w[:, :, 32:96],
    "rows_columns": lambda w: w[2:, 8:24, 64:],
    "mT": lambda w: w.mT,
    "permute": lambda w: w.permute(0, 2, 1),
    "mT_select": lambda w: w.mT[1],
    "mT_slice": lambda w: w.mT[1:3, 32:96, 5:],
    "mT_mT": lambda w: w.mT.mT[1],
    "unbind": lambda w: w.unbind(),
    "iterate": lambda w: list(w),
    "split": lambda w: w.split(3),
    "chunk": lambda w: w.chunk(2),
    "chunk_rows": lambda w: w.chunk(2, dim=1),
    "one_squeezed": lambda w: w[1:2].squeeze(0),
    "same_view": lambda w: w.view(E, N, K),
}

VIEWS_3D_ONE_SCALE = {
    "flatten": lambda w: w.view(E * N, K),
    "reshape": lambda w: w.reshape(2, -1, K),
    "swap_experts": lambda w: w.transpose(0, 1),
    "select_row": lambda w: w[:, 3],
    "unsqueeze": lambda w: w.unsqueeze(1)[:, 0],
}

COPIES_3D = {
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w[:, 1:, 32:].contiguous(),
    "mT_contiguous": lambda w: w.mT[:, 32:, 1:].contiguous(),
    "mT_clone": lambda w: w.mT.clone(memory_format=torch.contiguous_format),
    "index_select": lambda w: w.index_select(0, torch.tensor([3, 0, 3])),
    "index_select_rows": lambda w: w.index_select(1, torch.tensor([3, 0, 3])),
    "index": lambda w: w[torch.tensor([2, 0])],
    "index_list": lambda w: w[[2, 0]],
    "index_mask": lambda w: w[torch.tensor([True, False, True, True])],
    "index_rows": lambda w: w[:, torch.tensor([2, 0])],
    "cat": lambda w: torch.cat([w, w[1:2], w[:2]]),
    "cat_rows": lambda w: torch.cat([w, w[:, :8]], dim=1),
    "cat_columns": lambda w: torch.cat([w, w[..., :64]], dim=-1),
    "mT_cat": lambda w: torch.cat([w.mT, w.mT[:, 32:]], dim=1),
    "stack": lambda w: torch.stack([w[2], w[0]]),
    "to_dtype": lambda w: w.to(torch.float16).to(torch.bfloat16),
    "cpu": lambda w: w.cpu(),
    "deepcopy": lambda w: copy.deepcopy(w[1:]),
    "pickle": lambda w: pickle.loads(pickle.dumps(w[1:].mT)),
    "save": lambda w: save_load(w[1:, 8:]),
}


def save_load(x, **kwargs):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **kwargs)


@each_format
@pytest.mark.parametrize("op", VIEWS_2D.values(), ids=VIEWS_2D)
def test_views_of_2d(op, fmt):
    w = make(fmt, N, K)
    assert_same(op(w), op(w.dequantize()), like=w)


@each_format
@pytest.mark.parametrize("op", VIEWS_3D.values(), ids=VIEWS_3D)
def test_views_of_3d(op, fmt):
    w = make(fmt, E, N, K)
    assert_same(op(w), op(w.dequantize()), like=w)


@each_format
@pytest.mark.parametrize("op", VIEWS_3D_ONE_SCALE.values(), ids=VIEWS_3D_ONE_SCALE)
def test_views_of_3d_without_scale_per_expert(op, fmt):
    w = make(fmt, E, N, K)
    if fmt.has_per_tensor_scale:
        with pytest.raises(NotImplementedError, match="per_tensor_scale is one per expert"):
            op(w)
        w = w.replace(per_tensor_scale=torch.tensor(0.5))
    assert_same(op(w), op(w.dequantize()), like=w)


@each_format
@pytest.mark.parametrize("op", COPIES_3D.values(), ids=COPIES_3D)
def test_copies(op, fmt):
    w = make(fmt, E, N, K)
    out = op(w)
    assert_same(out, op(w.dequantize()))
    if op is not COPIES_3D["cpu"]:
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
    with pytest.raises(RuntimeError, match="both need to be MXTensors"):
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


@pytest.mark.parametrize("theirs", torchao_cases())
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
    with pytest.raises(TypeError, match="got a Tensor: quantize plain tensors"):
        MXTensor.from_torchao(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="no block format has dtype=.* with block_size=64"):
        MXTensor.from_torchao(TorchAOMXTensor.to_mx(hp(N, K), torch.float8_e4m3fn, 64))
    with pytest.raises(ValueError, match="fp6_e3m2 is no format here"):
        MXTensor.from_torchao(TorchAOMXTensor.to_mx(hp(N, K), "fp6_e3m2", 32))
    w = make(MXFP4, E, N, K)
    for bad in (w[0, :, :64], w.mT, w[0, :1].t()):
        with pytest.raises(ValueError, match="torchao infers packed_axis from them"):
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
        ((blocks.int(), scales), TypeError, "gpt-oss stores both as uint8"),
        ((blocks, scales.int()), TypeError, "gpt-oss stores both as uint8"),
        ((blocks[..., :8], scales), ValueError, r"expected \[..., N, K/32, 16\]"),
        ((blocks, scales[:8]), ValueError, r"and, for these blocks, \(64, 4\)"),
        ((blocks.transpose(0, 1), scales.t()), ValueError, "no view joins the last two axes"),
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


def message(fn, *args):
    with pytest.raises((NotImplementedError, ValueError, TypeError, IndexError)) as info:
        fn(*args)
    return f"{info.type.__name__}: {info.value}"
