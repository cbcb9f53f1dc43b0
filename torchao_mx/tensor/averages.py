"""The step of an AveragedModel (torch.optim.swa_utils), some of whose weights are packed and frozen."""

from __future__ import annotations

import itertools

import torch

from torchao_mx import torch_internals
from torchao_mx.tensor.dispatch import _describe, _differences
from torchao_mx.tensor.mx_tensor import MXTensor


@MXTensor.implements(torch_internals.LERP_LISTS)
def _foreach_lerp_(func, types, args, kwargs):
    """An AveragedModel's step, in place: packed weights, being frozen, stay as they are."""
    starts, ends, _ = args
    plain = []
    for i, (x, end) in enumerate(zip(starts, ends, strict=True)):
        if not isinstance(x, MXTensor) and not isinstance(end, MXTensor):
            plain.append(i)
        elif not _is_same(x, end):
            raise ValueError(
                f"average of {_describe(x)} and {_describe(end)}, which differ: packed weights have none "
                f"in their format; average in high precision, before convert, or start a new AveragedModel"
            )
    if plain:
        lists = [[t[i] for i in plain] if isinstance(t, (list, tuple)) else t for t in args]
        func(*lists, **kwargs)


def _is_same(x: object, y: object) -> bool:
    """Whether two MXTensors are bit for bit equal."""
    if not (isinstance(x, MXTensor) and isinstance(y, MXTensor)) or _differences(x, y):
        return False
    # Bytes, as the CPU compares no scales; a per-tensor scale is a float32.
    parts = [
        [t if t.dtype == torch.float32 else t.view(torch.uint8) for t in w.parts()] for w in (x, y)
    ]
    return len(parts[0]) == len(parts[1]) and all(
        itertools.starmap(torch.equal, zip(*parts, strict=True))
    )
