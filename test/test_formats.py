"""The constants of each format, and the refusals of what is none."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
from _grids import FORMATS, MODES, assert_same_bytes, name_of, refusals
from expecttest import assert_expected_inline
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

import torchao_mx
from torchao_mx import (
    MXFP4,
    MXFP8_E4M3,
    NVFP4,
    BlockFormat,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    QuantizeSpec,
    ScaleCalculationMode,
    formats,
    ops,
)
from torchao_mx.formats import check_scaling_mode, format_by_name
from torchao_mx.ops.core.register import implementations
from torchao_mx.ops.quantization.quantize import quantize_op

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=name_of)


def test_fields():
    names = (
        "elem_bits",
        "elems_per_byte",
        "bits_per_element",
        "exponent_bias",
        "min_exponent",
        "max_exponent",
        "nan_code",
        "qdata_dtype",
    )
    lines = [f"{fmt}: " + ", ".join(str(getattr(fmt, n)) for n in names) for fmt in FORMATS]
    assert_expected_inline(
        "\n".join(lines),
        """\
mxfp4: 4, 2, 4.25, 1, 0, 2, 7, torch.uint8
mxfp8_e4m3: 8, 1, 8.25, 7, -6, 8, 127, torch.float8_e4m3fn
mxfp8_e5m2: 8, 1, 8.25, 15, -14, 15, 127, torch.float8_e5m2
nvfp4: 4, 2, 4.5, 1, 0, 2, 7, torch.uint8""",
    )


@each_format
def test_element_constants_are_torchs(fmt):
    """The largest element and the NaN code, from torch's own dtype or (E2M1) from OCP's table."""
    if fmt.elem_bits == 8:
        finfo = torch.finfo(fmt.elem_dtype)
        assert fmt.elem_max == finfo.max
        assert 2.0**fmt.min_exponent == finfo.smallest_normal
        nan = torch.tensor([fmt.nan_code], dtype=torch.uint8).view(fmt.elem_dtype)
        assert nan.float().isnan().all()
    else:
        assert fmt.elem_max == 6.0
        assert fmt.min_exponent == 0
    assert 2.0**fmt.max_exponent <= fmt.elem_max < 2.0 ** (fmt.max_exponent + 1)


@each_format
def test_is_a_value(fmt):
    for twin in (
        copy.deepcopy(fmt),
        pickle.loads(pickle.dumps(fmt)),
        dataclasses.replace(fmt),
        format_by_name(fmt.name),
        BlockFormat.from_dtype(fmt.elem_dtype, fmt.block_size),
    ):
        assert twin == fmt
        assert hash(twin) == hash(fmt)
    assert len({*FORMATS}) == len(FORMATS)
    assert str(fmt) == fmt.name


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MXFP4.block_size = 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizeSpec(MXFP4).format = NVFP4


def test_public_names_are_exported():
    for name in torchao_mx.__all__:
        assert getattr(torchao_mx, name) is not None
    from torchao.prototype.mx_formats.config import ScaleCalculationMode as torchaos

    assert torchao_mx.ScaleCalculationMode is torchaos


@pytest.mark.parametrize("mode", MODES, ids=name_of)
def test_specs_are_values_and_print_short(mode):
    spec = QuantizeSpec(MXFP8_E4M3, mode)
    assert spec == pickle.loads(pickle.dumps(spec))
    assert len({spec, copy.deepcopy(spec)}) == 1
    assert str(spec) == f"mxfp8_e4m3 ({mode.value})"
    assert str(QuantizeSpec(NVFP4, mode)) == "nvfp4"  # which reads no mode


def test_import_is_light():
    """No GPU touched; neither transformers nor peft."""
    code = (
        "import sys, torch, torchao_mx\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_refusals():
    assert_expected_inline(
        refusals(
            [
                lambda: BlockFormat.from_dtype(torch.bfloat16),
                lambda: BlockFormat.from_dtype(torch.float8_e4m3fn, 16),
                lambda: BlockFormat.from_dtype("float8_e4m3fn"),
                lambda: format_by_name("mxfp6"),
                lambda: QuantizeSpec("mxfp4"),
                lambda: QuantizeSpec(MXFP4, "rceil"),
                lambda: check_scaling_mode(None),
            ]
        ),
        """\
ValueError: no block format has dtype=torch.bfloat16 with block_size=32; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
ValueError: no block format has dtype=torch.float8_e4m3fn with block_size=16; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
TypeError: dtype='float8_e4m3fn' is not a torch.dtype; use one of torch.float4_e2m1fn_x2 with block_size 32, torch.float8_e4m3fn with block_size 32, torch.float8_e5m2 with block_size 32, torch.float4_e2m1fn_x2 with block_size 16
ValueError: no block format is called 'mxfp6'; use one of ['mxfp4', 'mxfp8_e4m3', 'mxfp8_e5m2', 'nvfp4']
TypeError: format='mxfp4' is not a BlockFormat; use one of MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4 from torchao_mx
TypeError: scaling_mode='rceil' is not a ScaleCalculationMode; use one of ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL, ScaleCalculationMode.CEIL, ScaleCalculationMode.EVEN
TypeError: scaling_mode=None is not a ScaleCalculationMode; use one of ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL, ScaleCalculationMode.CEIL, ScaleCalculationMode.EVEN""",
    )


def test_scaling_modes_are_torchaos_four():
    assert [m.name for m in ScaleCalculationMode] == ["FLOOR", "RCEIL", "CEIL", "EVEN"]


def test_a_format_is_one_line(monkeypatch):
    """With 64 elements per block: torchao's bytes, QAT = PTQ, LoRA, and the kernels, with nothing else changed."""
    fmt = BlockFormat("wide", torch.float4_e2m1fn_x2, 2, 1, 6.0, 64, torch.float8_e8m0fnu)
    monkeypatch.setitem(formats._FORMATS, fmt.name, fmt)
    x, config = torch.randn(5, 128), MXWeightOnlyConfig(block_size=64)
    wanted = to_mx(x, fmt.elem_dtype, 64, ScaleCalculationMode.RCEIL)
    found = [ops.quantize(x, fmt)]
    if not torch.cuda.is_available():  # the interpreter's
        found.append(implementations[quantize_op, "cuda"](x, fmt.name, "rceil", -1, None))
    for qdata, scale in found:
        assert_same_bytes(scale, wanted[0])
        assert_same_bytes(qdata, wanted[1])

    model = torch.nn.Sequential(torch.nn.Linear(128, 48))
    quantize_(model, QATConfig(config, step="prepare"))
    y = model(x)
    y.sum().backward()
    quantize_(model, QATConfig(config, step="convert"))
    assert torch.equal(model(x), y)
    quantize_(model, MXWeightOnlyLoRAConfig(r=4, block_size=64))
    model(x).sum().backward()
    assert model[0].weight.format == fmt and model[0].lora_B.grad.any()
