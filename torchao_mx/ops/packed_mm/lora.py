"""lora_matmul and lora_grouped_mm: the verbs of ``packed_mm/op.py`` for a packed weight with LoRA adapters.

A ``[r, K]`` and B ``[N, r]`` adapt ``W [N, K]`` to ``W + s B A``, whichever way it is multiplied::

    transpose_weight       y = x (W + s B A)^T = x W^T + s (x A^T) B^T       x [M, K]
    not transpose_weight   y = x (W + s B A)   = x W   + s (x B) A           x [M, N]

so the op's ``down`` and ``up`` are A and B, or views of B^T and A^T respectively.
"""

from __future__ import annotations

import torch

from torchao_mx.formats import BlockFormat
from torchao_mx.ops.core.arguments import (
    adapters_of,
    as_rows,
    check_groups,
    check_product,
    check_weight,
    dense_bias,
    operands,
    product_sizes,
)
from torchao_mx.ops.packed_mm.op import mm_op
from torchao_mx.ops.packed_mm.strategy import check_strategy, compute_names


def lora_matmul(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    per_tensor_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    transpose_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
    grad_compute_dtype: torch.dtype | None = None,
    strategy: str = "auto",
    max_scratch_bytes: int | None = None,
) -> torch.Tensor:
    """Return ``x (W + scaling * B A)^T + bias`` with the packed ``W [N, K]``; see the file's head.

    Computes in x's dtype (autocast's, under autocast). Gradients go to x, ``lora_a``, ``lora_b`` and
    ``bias``, each in its own dtype, summed in fp32; a gradient that is not required costs nothing. Kept for
    backward are the packed weight, by reference, x if ``lora_a`` (``lora_b`` without ``transpose_weight``) is
    trained, and ``x A^T``.

    Args:
        x: ``[..., K]`` (``[..., N]`` without ``transpose_weight``), rank 1 or more; bfloat16, float16 or
            float32.
        qdata, scale, fmt, per_tensor_scale: ``W``, as in :func:`torchao_mx.ops.matmul`.
        lora_a: ``A [r, K]``, 1 <= r <= min(N, K); bfloat16, float16 or float32, independent of x's dtype.
        lora_b: ``B [N, r]``, likewise.
        scaling: the factor of the adapters' product; a Python number.
        bias: ``[N]`` (``[K]``), or one number.
        transpose_weight: reduce over K, the packed axis; otherwise over N.
        compute_dtype: None for x's, or ``torch.float8_e4m3fn``: x is rounded by rows, an MXFP4 weight is
            exact, and the product (except for the adapters) runs on 8-bit tensor cores.
        grad_compute_dtype: None for x's (for a bfloat16 x, ``torch.bfloat16`` means the same), or, with a
            ``compute_dtype``, ``torch.float8_e5m2`` or ``torch.float8_e4m3fn``: the incoming gradient is
            rounded likewise in the product that gives x's gradient.
        strategy: ``"auto"``, ``"fused"``, ``"unpack"``; with a ``compute_dtype`` ``"unpack8"``, ``"fused8"``; see
            :func:`torchao_mx.ops.packed_mm.strategy.choose_strategy`.
        max_scratch_bytes: as in :func:`torchao_mx.ops.matmul`.

    Returns:
        ``[..., N]`` (``[..., K]``) in x's dtype.

    Raises:
        TypeError: a wrong dtype; a ``scaling`` that is not a number.
        ValueError: shapes or devices that do not match; a rank of 0 or above min(N, K); a ``strategy`` or
            compute dtype that is unknown, or does not support this weight.
        NotImplementedError: a second derivative, unless the adapters are frozen; a ``compute_dtype`` on a GPU
            without 8-bit tensor cores.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> qdata, scale = ops.quantize(torch.eye(32), MXFP4)
        >>> a, b = torch.ones(1, 32), torch.ones(32, 1)
        >>> ops.lora_matmul(torch.arange(32.0), qdata, scale, MXFP4, a, b, 0.5)[-4:]
        tensor([276., 277., 278., 279.])
    """
    check_weight(qdata, scale, per_tensor_scale, fmt)
    reduced, columns = product_sizes(qdata, fmt, transpose_weight)
    x, _ = operands(x, None)
    check_product(x, qdata, reduced, None)
    if qdata.dim() != 2:
        raise ValueError(
            f"the weight has shape {tuple(qdata.shape)} (packed); lora_matmul takes W [N, K]: for "
            f"experts use lora_grouped_mm"
        )
    down, up = adapters_of(x, qdata, fmt, lora_a, lora_b, scaling, transpose_weight)
    compute = compute_names(compute_dtype, grad_compute_dtype, fmt, grouped=False, dtype=x.dtype)
    check_strategy(strategy, max_scratch_bytes, compute[0])
    y, _ = mm_op(
        as_rows(x),
        qdata,
        scale,
        per_tensor_scale,
        dense_bias(bias, columns, x),
        down,
        up,
        None,
        None,
        scaling,
        fmt.name,
        transpose_weight,
        strategy,
        *compute,
        max_scratch_bytes or 0,
    )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], columns)


def lora_grouped_mm(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    offs: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    order: torch.Tensor | None = None,
    per_tensor_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    transpose_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
    grad_compute_dtype: torch.dtype | None = None,
    strategy: str = "auto",
    max_scratch_bytes: int | None = None,
) -> torch.Tensor:
    """Multiply rows ``offs[e - 1] : offs[e]`` by expert e of ``W + scaling * B A``, ``W [E, N, K]`` packed.

    The adapters are as in :func:`lora_matmul`, with a leading axis of experts. Groups, ``order`` and
    unassigned rows are as in :func:`torchao_mx.ops.grouped_mm`. Experts without rows have zero gradients.

    Args:
        x: ``[R, K]`` (``[R, N]`` without ``transpose_weight``), or ``[T, K]`` with an ``order``.
        qdata, scale, fmt, per_tensor_scale: ``W``, as in :func:`torchao_mx.ops.matmul`.
        offs: ``[E]`` int32 end offsets on x's device, ascending; their values are checked on the CPU only.
        lora_a: ``A [E, r, K]``, 1 <= r <= min(N, K); bfloat16, float16 or float32.
        lora_b: ``B [E, N, r]``, likewise.
        scaling: the factor of the adapters' product; a Python number.
        order: ``[R]`` int32 (or int64, converted): the argsort of the flattened expert ids.
        bias: ``[E, N]`` (``[E, K]``).
        transpose_weight, compute_dtype, grad_compute_dtype, strategy, max_scratch_bytes: as in
            :func:`lora_matmul`; on a GPU, ``"unpack"`` needs a bfloat16 x. Gradients of experts are not
            computed in ``torch.float8_e5m2``.

    Returns:
        ``[R, N]`` (``[R, K]``) in x's dtype, in the order of the groups.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`lora_matmul` and
            :func:`torchao_mx.ops.grouped_mm`.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> qdata, scale = ops.quantize(torch.stack([torch.eye(32), 2 * torch.eye(32)]), MXFP4)
        >>> a, b = torch.ones(2, 1, 32), torch.ones(2, 32, 1)
        >>> ids = torch.tensor([[1], [0], [1]])  # one expert for each of three tokens
        >>> order = ids.flatten().argsort(stable=True)
        >>> offs = ids.flatten().bincount(minlength=2).cumsum(0).int()
        >>> x = torch.tensor([[1.0], [10.0], [100.0]]).expand(-1, 32)
        >>> ops.lora_grouped_mm(x, qdata, scale, MXFP4, offs, a, b, 0.5, order=order)[:, 0]
        tensor([ 170.,   18., 1800.])
    """
    check_weight(qdata, scale, per_tensor_scale, fmt)
    reduced, columns = product_sizes(qdata, fmt, transpose_weight)
    x, _ = operands(x, None)
    check_product(x, qdata, reduced, None)
    offs, order = check_groups(x, qdata, offs, order, bias, columns)
    down, up = adapters_of(x, qdata, fmt, lora_a, lora_b, scaling, transpose_weight)
    compute = compute_names(compute_dtype, grad_compute_dtype, fmt, grouped=True, dtype=x.dtype)
    check_strategy(strategy, max_scratch_bytes, compute[0])
    y, _ = mm_op(
        x,
        qdata,
        scale,
        per_tensor_scale,
        bias,
        down,
        up,
        offs,
        order,
        scaling,
        fmt.name,
        transpose_weight,
        strategy,
        *compute,
        max_scratch_bytes or 0,
    )
    return y
