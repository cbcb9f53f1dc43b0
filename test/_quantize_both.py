"""The kernel of ``ops.quantize_both`` against the reference, for its tests."""

import importlib

import pytest
import torch
from _grids import assert_same_bytes, assert_same_values

from torchao_mx import reference

MODULE = importlib.import_module("torchao_mx.ops.quantization.quantize_both")
FORMS = MODULE.FORMS
poisoned = pytest.mark.usefixtures("poisoned")
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def to(device, x):
    """``x`` on the device, with its strides and its storage offset."""
    if x is None or device == "cpu":
        return x
    elements = x.untyped_storage().nbytes() // x.element_size()
    flat = x.as_strided((elements,), (1,), 0).to(device)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def check(device, x, row, column, forms=FORMS, dtype=torch.float32, seed=None, index=None, pts=()):
    """The kernel on ``x`` (given on the CPU) against the reference; x is left alone."""
    row_scale, column_scale = pts or (None, None)
    before = x.clone()
    want = reference.quantize_both(
        x, row, column, forms, dtype, row_scale, column_scale, seed, index
    )
    got = MODULE._quantize_both_triton(
        to(device, x), *MODULE.spec_strings(row), *MODULE.spec_strings(column), list(forms), dtype,
        *(to(device, t) for t in (row_scale, column_scale, seed, index)),
    )  # fmt: skip
    assert_same_values(x, before)
    got = MODULE.unflattened(got, forms)
    for name in forms:
        actual, wanted = getattr(got, name), getattr(want, name)
        if isinstance(actual, tuple):
            for a, w in zip(actual, wanted, strict=True):
                assert_same_bytes(a.cpu(), w)
        else:
            assert_same_values(actual.cpu(), wanted)
