"""What a kernel's signature says: its operands, sizes and tile, in a number that can be read."""

import importlib
import inspect
import pkgutil

import pytest
import torch

import torchao_mx.ops
from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4
from torchao_mx.ops.core.launch import _specialisation, kernel_format, launched

MOST_PARAMETERS = 24
# Their four Gluon kernels are about to become one pipeline, with signatures of its own.
TO_BE_REWRITTEN = "torchao_mx.ops.packed_mm.hopper."


def kernels():
    """The kernels under ``launched``, by module and name."""
    for info in pkgutil.walk_packages(torchao_mx.ops.__path__, "torchao_mx.ops."):
        if not info.name.startswith(TO_BE_REWRITTEN):
            for name, value in vars(importlib.import_module(info.name)).items():
                if isinstance(value, launched) and value.kernel.fn.__module__ == info.name:
                    yield f"{info.name}.{name}", value


def test_signatures_are_short():
    counts = {name: len(inspect.signature(k.kernel.fn).parameters) for name, k in kernels()}
    assert len(counts) > 25
    assert {name: n for name, n in counts.items() if n > MOST_PARAMETERS} == {}


def test_a_format_is_one_constant():
    """Formats differ as constants, which Triton compiles anew for."""
    formats = [kernel_format(f, fp8) for f in (MXFP4, MXFP8_E4M3, NVFP4) for fp8 in (False, True)]
    assert len(set(formats)) == 6
    assert [f.elem_bits for f in formats[::2]] == [4, 8, 4]
    assert [f.scale is None for f in formats[::2]] == [True, True, False]
    assert formats[-1].scale.has_fp8_instructions


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x, None, 33, (16, 2)),  # not a multiple of 16
        lambda x: (x, x, 32, (16, 2)),  # a tensor for None
        lambda x: (x[1:], None, 32, (16, 2)),  # not aligned
        lambda x: (x.half(), None, 32, (16, 2)),
        lambda x: (x, None, 32, (16, 1)),  # one, in a tuple in the tuple
        lambda x: (x, None, 2**32, (16, 2)),  # of 64 bits
    ],
)
def test_launches_tell_tuples_apart(other):
    """By what Triton compiles a kernel anew for."""
    x = torch.zeros(64)
    found = _specialisation((x, None, 32, (16, 2)))
    assert found == _specialisation((x[16:], None, 48, (160, 3)))
    assert found != _specialisation(other(x))
