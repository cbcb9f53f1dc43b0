"""Launcher of the Hopper kernels: when they apply, and which tiles they take."""

from __future__ import annotations

import torch

from torchao_mx.formats import MXFP4, BlockFormat
from torchao_mx.ops.core.launch import (
    bytes_of,
    capability,
    cdiv,
    multiprocessors,
    next_power_of_2,
    on_device_of,
)
from torchao_mx.ops.core.operands import Added, Rows
from torchao_mx.ops.core.register import as_dense
from torchao_mx.ops.core.tiles import (
    BackwardTile,
    ForwardTile,
    Fp8Tile,
    hopper_backward_tile,
    hopper_forward_tile,
    hopper_fp8_tile,
)
from torchao_mx.ops.moe.narrow import add_splits, partial_sums

# A dense product of few rows has fewer tiles than a GPU has multiprocessors, and is bound by latency. Its
# reduction is cut into parts of at least this many chunks.
MAX_SPLITS, MIN_CHUNKS_PER_SPLIT = 32, 8


def takes_hopper(x: torch.Tensor, qdata: torch.Tensor, fmt: BlockFormat) -> bool:
    """Whether ``x`` times this weight, in either orientation, has a Hopper kernel."""
    n, k = qdata.shape[-2], qdata.shape[-1] * fmt.elems_per_byte
    return (
        x.is_cuda
        and fmt == MXFP4
        and x.dtype == torch.bfloat16
        and capability(x.device.index)[0] == 9
        and k % 64 == 0
        and n % 32 == 0
    )


def permuted(x: torch.Tensor) -> torch.Tensor:
    """Return ``x [T, K]`` in the order in which the forward kernel meets K."""
    from torchao_mx.ops.packed_mm.hopper.forward import permute_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_chunks = x.numel() // 64
    with on_device_of(x):
        permute_kernel[(cdiv(n_chunks, 32),)](
            x, out, n_chunks, x.shape[1] // 64, x.stride(0), TILE=32, num_warps=4
        )
    return out


def paired_scales(scale: torch.Tensor) -> torch.Tensor:
    """Transpose scale bytes ``[.., N, K / 32]`` to ``[.., K / 32, N]``, for the backward kernel.

    It multiplies two neighbouring rows at once, so it loads their two bytes together.
    """
    from torchao_mx.ops.packed_mm.hopper.backward import transpose_kernel

    rows, columns = scale.shape[-2:]
    out = torch.empty((*scale.shape[:-2], columns, rows), dtype=torch.uint8, device=scale.device)
    tiles = cdiv(rows, 128) * cdiv(columns // 2, 32)
    with on_device_of(scale):
        transpose_kernel[(tiles * (scale.numel() // (rows * columns)),)](
            scale.view(torch.uint16), out, rows, columns // 2, TILE_R=128, TILE_C=32, num_warps=4
        )
    return out


def _splits(
    n_rows: int, reduced: int, chunk: int, programs: int, two_operands: bool, sms: int
) -> int:
    """Return the parts of a dense product's reduction: enough to fill the GPU once, as registers allow.

    The fp32 sums of the parts, written and read, take no more bytes than the weight.
    """
    wanted = (2 if two_operands else 3) * sms // programs
    bytes_allow = reduced // (16 * n_rows)
    return max(1, min(wanted, bytes_allow, reduced // chunk // MIN_CHUNKS_PER_SPLIT, MAX_SPLITS))


def hopper_product(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    tile: ForwardTile | BackwardTile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """``portable.fused_product`` for MXFP4 and bf16, where ``takes_hopper`` holds.

    ``tile`` overrides the table, and ``splits`` the number of parts of a dense product.
    """
    from torchao_mx.ops.packed_mm.hopper import backward, forward

    offs, order, top_k, n_rows = rows
    h, up, scaling, bias = added
    n, k = qdata.shape[-2], 2 * qdata.shape[-1]
    y = torch.empty((n_rows, n if transpose_weight else k), dtype=x.dtype, device=x.device)
    if n_rows == 0:
        return y
    x = permuted(x) if transpose_weight else _rows_of_16_bytes(x)
    qdata, scale = as_dense(qdata), as_dense(bytes_of(scale))
    scale = scale if transpose_weight else paired_scales(scale)
    n_groups = 0 if offs is None else offs.shape[0]
    groups = max(1, n_groups)
    rank = 0 if h is None else h.shape[1]
    up_strides = (
        (0, 0, 0) if up is None else (up.stride(0) if up.dim() == 3 else 0, *up.stride()[-2:])
    )
    if transpose_weight:
        kernel, reduced, chunk = forward.forward_kernel, k, forward.CHUNK.value
        tile_t, tile_columns, stages, two, registers = tile or hopper_forward_tile(n_rows, n_groups)
        options = dict(TILE_N=tile_columns)
    else:
        kernel, reduced, chunk = backward.backward_kernel, n, backward.CHUNK.value
        tile_t, stages, two, registers = tile or hopper_backward_tile(n_rows, n_groups)
        tile_columns, options = backward.TILE_K.value, {}
    if registers is not None:
        options.update(maxnreg=registers)
    slots = groups + n_rows // tile_t + 1 if offs is not None else cdiv(n_rows, tile_t)
    programs = slots * cdiv(y.shape[1], tile_columns)
    if offs is not None:
        splits = 1
    elif splits is None:
        splits = _splits(n_rows, reduced, chunk, programs, two, multiprocessors(x.device))
    splits = min(splits, reduced // chunk)
    sums = partial_sums(y, splits)
    pointers = (
        qdata.view(torch.int32), scale.view(torch.uint16), sums,
        y if offs is None else offs, y if order is None else order, y if h is None else h,
        y if up is None else up, y if bias is None else bias,
    )  # fmt: skip
    numbers = (
        n_rows, groups, n, k, x.stride(0), top_k, rank, *up_strides,
        bias.stride(0) if bias is not None and bias.dim() == 2 else 0, scaling,
    )  # fmt: skip
    with on_device_of(x):
        kernel[(programs * splits,)](
            x, *pointers, *numbers, GROUPED=offs is not None, GATHER=order is not None,
            RANK=1 if rank else 0, HAS_BIAS=bias is not None, TILE_T=tile_t, STAGES=stages,
            TWO_OPERANDS=two, E_SPAN=next_power_of_2(groups + 1), SPLITS=splits,
            num_warps=4, **options,
        )  # fmt: skip
        add_splits(sums, y, splits)
    return y


def takes_hopper_fp8(x: torch.Tensor) -> bool:
    """Whether x times MXFP4 weights (16 divides N) has a kernel in ``fp8_forward`` and ``fp8_backward``."""
    return x.is_cuda and x.dtype == torch.bfloat16 and capability(x.device.index)[0] == 9


def hopper_fp8_product(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    lowered: torch.Tensor,
    w_scale: torch.Tensor,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    tile: Fp8Tile | None = None,
) -> torch.Tensor:
    """Return ``fp8_product``'s ``y [n_rows, N]`` (``[n_rows, K]``) in bf16, except for flagged columns.

    Args:
        x8, x_scale: from :func:`torchao_mx.ops.packed_mm.fp8.kernels.permuted_rows`, one row per token, in the order
            ``"halves"`` (``"pairs"`` without ``transpose_weight``).
        qdata: ``[E, N, K / 2]``, or ``[N, K / 2]`` dense.
        lowered, w_scale: from :func:`torchao_mx.ops.packed_mm.fp8.lowered.lowered_rows` (``lowered_columns``).
        tile: overrides the table.
    """
    from torchao_mx.ops.packed_mm.hopper import fp8_backward, fp8_forward

    offs, order, top_k, n_rows = rows
    h, up, scaling, bias = added
    n, k = qdata.shape[-2], 2 * qdata.shape[-1]
    columns = n if transpose_weight else k
    y = torch.empty((n_rows, columns), dtype=torch.bfloat16, device=x8.device)
    qdata = as_dense(bytes_of(qdata))
    n_groups = 0 if offs is None else offs.shape[0]
    tile = tile or hopper_fp8_tile(n_rows, n_groups, transpose_weight)
    tile_t, tile_columns, stages, operands, warps, registers = tile
    options = {}
    if transpose_weight:
        kernel, lowered = fp8_forward.fp8_forward_kernel, lowered.view(torch.int32)
        options["TILE_N"] = tile_columns
    else:
        kernel, qdata = fp8_backward.fp8_backward_kernel, qdata.view(torch.int16)
        tile_columns = fp8_backward.COLUMNS_A_WARP.value * warps
    slots = n_groups + n_rows // tile_t + 1 if offs is not None else cdiv(n_rows, tile_t)
    up_strides = (0, 0, 0)
    if up is not None:
        up_strides = (up.stride(0) if up.dim() == 3 else 0, *up.stride()[-2:])
    if registers is not None:
        options["maxnreg"] = registers
    with on_device_of(x8):
        kernel[(slots * cdiv(columns, tile_columns),)](
            x8, x_scale, qdata, lowered, w_scale, y,
            y if offs is None else offs, y if order is None else order,
            y if h is None else h, y if up is None else up, y if bias is None else bias,
            n_rows, max(1, n_groups), n, k, x8.stride(0), top_k, 0 if h is None else h.shape[1],
            *up_strides, bias.stride(0) if bias is not None and bias.dim() == 2 else 0, scaling,
            GROUPED=offs is not None, GATHER=order is not None, RANK=0 if h is None else 1,
            HAS_BIAS=bias is not None, TILE_T=tile_t, STAGES=stages, OPERANDS=operands,
            E_SPAN=next_power_of_2(max(1, n_groups) + 1), num_warps=warps, **options,
        )  # fmt: skip
    return y


def _rows_of_16_bytes(x: torch.Tensor) -> torch.Tensor:
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
