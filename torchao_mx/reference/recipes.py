"""Define quantization in both directions, stochastic rounding and the operands of a recipe's three products.

A recipe quantizes each operand of a linear layer ``Y = X W^T`` along the axis that its product reduces::

    Y  = Qf(X) Qf(W)^T      reduces K: X and W in rows
    dX = Qg(dY) Qb(W)       reduces N: dY in rows, W in columns
    dW = Qg(dY)^T Qb(X)     reduces M: dY and X in columns

with Qf in NVFP4, Qb and Qg in MXFP8 (arXiv:2509.25149 trains in NVFP4 both ways; arXiv:2506.08027 in MXFP8).
The token axis M need not be whole blocks: zeros after the last token complete its block. They change neither
the block's largest magnitude nor any product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from torchao_mx.formats import BlockFormat, QuantizeSpec
from torchao_mx.reference.quantize import _e8m0_scale, dequantize, per_tensor_scale, quantize

_FP32_MANTISSA_BITS = 23
_WORD_BITS = 32
_WORD = (1 << _WORD_BITS) - 1
# Philox4x32-7: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", report that 7 rounds pass
# BigCrush. The libraries' default of 10 adds a safety margin.
PHILOX_ROUNDS = 7
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)

Packed = tuple[torch.Tensor, torch.Tensor]  # qdata, scale


class BothDirections(NamedTuple):
    """The quantized forms of ``x [M, K]``, None if not requested. ``M'`` is M rounded up to whole blocks.

    Attributes:
        rows: blocks along K: qdata ``[M, K / elems_per_byte]`` and scale ``[M, K / block_size]``.
        row_values: the values of ``rows``, ``[M, K]``.
        columns: blocks along M: qdata ``[K, M' / elems_per_byte]`` and scale ``[K, M' / block_size]``.
        column_values: the values of ``columns``, ``[M, K]``.
    """

    rows: Packed | None = None
    row_values: torch.Tensor | None = None
    columns: Packed | None = None
    column_values: torch.Tensor | None = None


class Products(NamedTuple):
    """The operands ``(a, b)``, as values, of a recipe's products ``a @ b``: y without its bias, dx and dw."""

    y: tuple[torch.Tensor, torch.Tensor]
    dx: tuple[torch.Tensor, torch.Tensor]
    dw: tuple[torch.Tensor, torch.Tensor]


def quantize_both(
    x: torch.Tensor,
    row: QuantizeSpec | None,
    column: QuantizeSpec | None,
    forms: tuple[str, ...] = BothDirections._fields,
    dtype: torch.dtype | None = None,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> BothDirections:
    """Quantize ``x [M, K]`` along K (``row``) and along M (``column``) and return the requested ``forms``.

    Args:
        row: format and scaling mode of the row forms; None if none is requested.
        column: format and scaling mode of the column forms, likewise.
        forms: the fields of the result to compute.
        dtype: dtype of the values; x's by default.
        row_scale: the rows' fp32 per-tensor scale, 0-d.
        column_scale: the columns' fp32 per-tensor scale, 0-d.
        seed: int64, 0-d: round stochastically with its :func:`random_words`. For 8-bit elements only.
        index: int32 ``[P]``: compute the column forms of the rows ``x[index[i]]``, zeros for a negative
            ``index[i]``, so that blocks begin where the caller wants. The row forms remain those of x.
    """
    dtype = x.dtype if dtype is None else dtype
    wanted, found = {*forms}, {}
    words = None if seed is None else random_words(seed, x.shape)
    if wanted & {"rows", "row_values"}:
        low = words if words is None else words & ((1 << dropped_bits(row.format)) - 1)
        packed = found["rows"] = _quantize(x, row, row_scale, low)
        if "row_values" in wanted:
            found["row_values"] = dequantize(*packed, row.format, dtype, -1, row_scale)
    if wanted & {"columns", "column_values"}:
        unused = _WORD_BITS - dropped_bits(column.format)
        high = words if words is None else _gathered(words >> unused, index)
        gathered = _gathered(x, index)
        n_rows = len(gathered)
        whole = (0, -n_rows % column.format.block_size)
        turned = F.pad(gathered.mT, whole)
        high = None if high is None else F.pad(high.mT, whole)
        packed = found["columns"] = _quantize(turned, column, column_scale, high)
        if "column_values" in wanted:
            values = dequantize(*packed, column.format, dtype, -1, column_scale)
            found["column_values"] = values[:, :n_rows].mT.contiguous()
    return BothDirections(**{name: found[name] for name in forms})


def recipe_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    dy: torch.Tensor,
    forward: QuantizeSpec,
    backward: QuantizeSpec,
    grad: QuantizeSpec,
    seed: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> Products:
    """Return the decoded operands of a linear layer's products in x's dtype; see the top of the file.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        dy: ``[M, N]``.
        forward: Qf, for X and W in forward.
        backward: Qb, for X and W in backward.
        grad: Qg, for dY.
        seed: seed for dY's stochastic rounding; None rounds to nearest.
        x_scale: X's per-tensor scale, if ``forward`` has one; computed from X if None.
        weight_scale: W's per-tensor scale, likewise.
    """

    def both(t: torch.Tensor, scale: torch.Tensor | None) -> BothDirections:
        if scale is None and forward.format.has_per_tensor_scale:
            scale = per_tensor_scale(t, forward.format)
        return quantize_both(t, forward, backward, dtype=x.dtype, row_scale=scale)

    x_both, w_both = both(x, x_scale), both(weight, weight_scale)
    dy_both = quantize_both(dy, grad, grad, seed=seed)
    return Products(
        y=(x_both.row_values, w_both.row_values.mT),
        dx=(dy_both.row_values, w_both.column_values),
        dw=(dy_both.column_values.mT, x_both.column_values),
    )


def random_words(seed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return random 32-bit words, int64 ``[M, K]``: Philox4x32-7 keyed by ``seed``, equal on every device.

    Counter ``(k // 4, m, 0, 0)`` yields the words of row m's four columns from ``4 (k // 4)`` on. Row forms
    use a word's lowest bits, as many as the rounding drops; column forms use its highest. Bits that both use
    are the column forms' least significant ones.
    """
    m, k = shape
    device = seed.device
    counter = [
        torch.arange(-(-k // 4), device=device).expand(m, -1),
        torch.arange(m, device=device)[:, None].expand(-1, -(-k // 4)),
        *torch.zeros(2, m, -(-k // 4), dtype=torch.int64, device=device),
    ]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(PHILOX_ROUNDS):
        products = [c * factor for c, factor in zip(counter[::2], _PHILOX_MULTIPLIERS, strict=True)]
        # int64 products wrap; their upper and lower words still equal those of the unsigned products.
        (high_a, low_a), (high_b, low_b) = ((p >> 32 & _WORD, p & _WORD) for p in products)
        counter = [high_b ^ counter[1] ^ key[0], low_b, high_a ^ counter[3] ^ key[1], low_a]
        key = [(word + weyl) & _WORD for word, weyl in zip(key, _PHILOX_WEYL, strict=True)]
    return torch.stack(counter, -1).flatten(1)[:, :k]


def dropped_bits(fmt: BlockFormat) -> int:
    """Return how many bits of an fp32 mantissa rounding to an element of ``fmt`` drops."""
    return _FP32_MANTISSA_BITS - fmt.mantissa_bits


def round_stochastically(y: torch.Tensor, fmt: BlockFormat, random: torch.Tensor) -> torch.Tensor:
    """Round fp32 ``y`` up or down to an element of ``fmt``; the nearer element is the likelier.

    ``random`` is uniform in ``[0, 2**dropped_bits)``, so the expectation is y unless y saturates, which under
    RCEIL and CEIL it never does. Subnormals are first rounded to 2**-dropped_bits of the element spacing.
    """
    dropped = dropped_bits(fmt)
    smallest = 2.0**fmt.min_exponent
    magnitude = y.abs().clamp(max=fmt.elem_max)
    is_small = magnitude < smallest  # subnormals: the spacing equals that of the binade above
    bits = torch.where(is_small, magnitude + smallest, magnitude).view(torch.int32) + random.int()
    grid = (bits & -(1 << dropped)).view(torch.float32)
    grid = torch.where(is_small, grid - smallest, grid).copysign(y)
    return torch.where(y.isnan(), y, grid)


def _quantize(
    x: torch.Tensor,
    spec: QuantizeSpec,
    per_tensor_scale: torch.Tensor | None,
    random: torch.Tensor | None,
) -> Packed:
    """Quantize along the last axis; with ``random`` bits, round stochastically to 8-bit elements."""
    if random is None:
        return quantize(x, spec.format, spec.scaling_mode, -1, per_tensor_scale)
    fmt = spec.format
    blocks = x.contiguous().unflatten(-1, (-1, fmt.block_size))
    amax = blocks.abs().amax(-1, keepdim=True).float()
    scale, multiplier = _e8m0_scale(amax, fmt, spec.scaling_mode)
    y = round_stochastically(blocks.float() * multiplier, fmt, random.view(blocks.shape))
    codes = y.to(fmt.elem_dtype).view(torch.uint8)
    codes = torch.where(multiplier.isnan(), fmt.nan_code, codes).flatten(-2)
    return codes.view(fmt.elem_dtype), scale.squeeze(-1).view(fmt.scale_dtype)


def _gathered(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Return ``x[index]``, with zeros for negative indices."""
    return x if index is None else torch.where((index >= 0)[:, None], x[index.clamp(min=0)], 0)
