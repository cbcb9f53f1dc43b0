"""NVFP4's per-tensor scale: the largest magnitude of a matrix, or per expert, in one read.

Programs write their largest magnitude to a scratch buffer, and a second launch takes the maximum of those.
There are no atomics, and nothing is copied to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torchao_mx.formats import BlockFormat
from torchao_mx.ops.core.launch import (
    cdiv,
    launched,
    multiprocessors,
    next_power_of_2,
    on_device_of,
)
from torchao_mx.ops.core.tiles import AMAX, AMAX_PROGRAMS_PER_MULTIPROCESSOR
from torchao_mx.ops.quantization import tile
from torchao_mx.reference.quantize import E4M3_MAX, MIN_PER_TENSOR_SCALE

_MIN_SCALE = tl.constexpr(MIN_PER_TENSOR_SCALE)


@launched
@triton.jit
def _amax_kernel(
    x_ptr, amax_ptr, offs_ptr, n, columns, n_groups, GROUPED: tl.constexpr, TILE: tl.constexpr
):
    """Reduce ``x [E, n]`` to the largest magnitude per program, ``[E, P]``: bits of fp32, NaN above all.

    GROUPED: only over the rows (of ``columns`` elements) before the last end offset.
    """
    expert, step = tl.program_id(1).to(tl.int64), tl.num_programs(0).to(tl.int64) * TILE
    x_ptr += expert * n
    if GROUPED:
        end = tl.maximum(tl.load(offs_ptr + n_groups - 1), 0).to(tl.int64)
        n = tl.minimum(end * columns, n)
    found = tl.zeros((TILE,), tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * TILE, n, step):
        i = first + tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        found = tl.maximum(found, tile.bits_of(x) & 0x7FFFFFFF)
    place = expert * tl.num_programs(0) + tl.program_id(0)
    tl.store(amax_ptr + place, tl.max(found, axis=0))


@launched
@triton.jit
def _scale_kernel(amax_ptr, scale_ptr, n_found, reciprocal, SPAN: tl.constexpr):
    """Scale the largest of ``amax [E, n_found]`` by ``reciprocal``, to at least the smallest scale; NaN stays."""
    expert, i = tl.program_id(0), tl.arange(0, SPAN)
    found = tl.load(amax_ptr + expert * n_found + i, mask=i < n_found, other=0)
    scale = tile.float_of(tl.max(found, axis=0)) * reciprocal
    tl.store(scale_ptr + expert, tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale))


def amax_scale(
    x: torch.Tensor,
    fmt: BlockFormat,
    per_expert: bool = False,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    """``reference.per_tensor_scale`` on a GPU, for a non-empty ``x``.

    A GPU divides by a number by multiplying by its fp32 reciprocal; torchao's quantizer does so there too.
    """
    any_order = offs is None and x.dim() > 1 and x.mT.is_contiguous()
    x = x.mT if any_order else x.contiguous()
    experts = x.shape[0] if per_expert else 1
    n = x.numel() // experts
    programs = cdiv(AMAX_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device), experts)
    programs = min(programs, cdiv(n, AMAX.size))
    shape = (experts, 1, 1) if per_expert else ()
    with on_device_of(x):
        amax = torch.empty((experts, programs), dtype=torch.int32, device=x.device)
        scale = torch.empty(shape, dtype=torch.float32, device=x.device)
        _amax_kernel[(programs, experts)](
            x,
            amax,
            offs,
            n,
            x.shape[-1] if x.dim() else 1,
            0 if offs is None else offs.shape[0],
            GROUPED=offs is not None,
            TILE=AMAX.size,
            num_warps=AMAX.warps,
        )
        _scale_kernel[(experts,)](
            amax,
            scale,
            programs,
            1 / (E4M3_MAX * fmt.elem_max),
            SPAN=next_power_of_2(programs),
            num_warps=4,
        )
    return scale
