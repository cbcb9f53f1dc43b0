"""The update of an AveragedModel (torch.optim.swa_utils) that has packed, frozen weights."""

from __future__ import annotations

import itertools

import torch

from torchao_mx import torch_internals
from torchao_mx.tensor.dispatch import _describe, _differences
from torchao_mx.tensor.mx_tensor import MXTensor


@MXTensor.implements(torch_internals.LERP_LISTS)
def _foreach_lerp_(func, types, args, kwargs):
    """Update an AveragedModel in place; packed weights are frozen and stay as they are."""
    starts, ends, _ = args
    plain = []
    for i, (x, end) in enumerate(zip(starts, ends, strict=True)):
        if not isinstance(x, MXTensor) and not isinstance(end, MXTensor):
            plain.append(i)
        elif not _is_same(x, end):
            raise ValueError(
                f"cannot average {_describe(x)} and {_describe(end)}: they differ, and packed weights have "
                f"no average; average in high precision, before convert, or start a new AveragedModel"
            )
    if plain:
        lists = [[t[i] for i in plain] if isinstance(t, (list, tuple)) else t for t in args]
        func(*lists, **kwargs)


def _is_same(x: object, y: object) -> bool:
    """Return whether both are MXTensors and equal bit for bit."""
    if not (isinstance(x, MXTensor) and isinstance(y, MXTensor)) or _differences(x, y):
        return False
    # Compare bytes, because the CPU cannot compare scale dtypes; per-tensor scales are float32.
    parts = [
        [t if t.dtype == torch.float32 else t.view(torch.uint8) for t in w.parts()] for w in (x, y)
    ]
    return len(parts[0]) == len(parts[1]) and all(
        itertools.starmap(torch.equal, zip(*parts, strict=True))
    )
