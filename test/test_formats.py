"""The constants of each format, and the refusals of what is none."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
from _grids import FORMATS, MODES, name_of, refusals
from expecttest import assert_expected_inline

import torchao_mx
from torchao_mx import (
    MXFP4,
    MXFP8_E4M3,
    NVFP4,
    BlockFormat,
    QuantizeSpec,
    ScaleCalculationMode,
)
from torchao_mx.formats import check_scaling_mode, format_by_name

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
