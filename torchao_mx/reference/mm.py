"""Define products of x with a decoded weight plus a low-rank update, dense or grouped by expert.

Each expert e owns a run of rows and has ``W_e [N, K]``, ``down_e [r, C]`` and ``up_e [D, r]``. The product
reduces over C and leaves D columns. A dense product is one expert that owns all rows::

    h = x down_e^T        y = x W_e^T + s * h up_e^T + bias_e      (x W_e without transpose_weight)

Names used throughout: R rows, T tokens, E experts, rank r. ``offs [E]`` holds the int32 end offsets of the
experts' rows, or is None for a dense product. With ``order [R]``, x is ungrouped, and grouped row i is token
``order[i] // top_k``, ``top_k = R // T``. Rows after ``offs[-1]`` are unassigned: zero in results, ignored
in sums.

Products are in x's dtype; sums over rows are in fp32, or in float64 for float64 operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Rows(NamedTuple):
    """The assignment of x's rows to experts; see the top of the file."""

    offs: torch.Tensor | None
    order: torch.Tensor | None
    top_k: int
    n_rows: int  # R

    @classmethod
    def of(cls, x: torch.Tensor, offs: torch.Tensor | None, order: torch.Tensor | None) -> Rows:
        n_rows = x.shape[0] if order is None else order.shape[0]
        return cls(offs, order, rows_per_token(x.shape[0], order), n_rows)


class Added(NamedTuple):
    """The terms added to a product, ``scaling * h up_e^T + bias_e``; None for an absent term."""

    h: torch.Tensor | None = None  # [R, r]
    up: torch.Tensor | None = None  # [E, D, r], of any strides and float dtype
    scaling: float = 1.0
    bias: torch.Tensor | None = None  # [E, D]

    def at(self, index: Any) -> Added:
        """Select an expert, or a slice of the columns: ``up[index]`` and ``bias[index]``."""
        up, bias = (None if t is None else t[index] for t in (self.up, self.bias))
        return self._replace(up=up, bias=bias)


def mm(
    x: torch.Tensor,
    w_values: torch.Tensor,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    offs: torch.Tensor | None,
    order: torch.Tensor | None,
    scaling: float,
    bias: torch.Tensor | None,
    transpose_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(y [R, D], h [R, r])`` as defined at the top of the file; h is ``[0]`` without adapters.

    ``w_values``: see :func:`product`. ``down [E, r, C]``, ``up [E, D, r]``, ``bias [E, D]``; a dense product
    drops E from all three.
    """
    rows = Rows.of(x, offs, order)
    h = None if down is None else low_rank(x, down, *rows)
    y = product(x, w_values, rows, transpose_weight, Added(h, up, scaling, bias))
    return y, x.new_empty(0) if h is None else h


def product(
    x: torch.Tensor, w_values: torch.Tensor, rows: Rows, transpose_weight: bool, added: Added
) -> torch.Tensor:
    """Return ``y [R, D]`` as defined at the top of the file, given h.

    ``w_values [E, N, K]`` is a tensor in x's dtype, or any object with that ``shape`` whose item e is
    ``[N, K]``; only experts that have rows are indexed.
    """
    if rows.offs is None:
        return _one_product(x, w_values, transpose_weight, added)
    columns = w_values.shape[-2 if transpose_weight else -1]
    y = x.new_zeros((rows.n_rows, columns))
    for e, group in _groups(rows.offs, rows.n_rows):
        added_e = added.at(e)._replace(h=None if added.h is None else added.h[group])
        x_e = _rows_of(x, group, rows.order, rows.top_k)
        y[group] = _one_product(x_e, w_values[e], transpose_weight, added_e)
    return y


def add_low_rank(y: torch.Tensor, offs: torch.Tensor | None, added: Added) -> torch.Tensor:
    """Return ``y + scaling * h up_e^T + bias_e`` per expert e, summed in fp32; unassigned rows are zero.

    ``up [E, C, r]`` and ``bias [E, C]``; E = 1 without ``offs``.
    """
    h, up, scaling, bias = added
    out = torch.zeros_like(y)
    for e, rows in _groups(offs, y.shape[0]):
        total = y[rows].to(_sum_dtype(y))
        if h is not None:
            total = total + scaling * (
                h[rows].to(total.dtype) @ up[e].to(y.dtype).to(total.dtype).mT
            )
        if bias is not None:
            total = total + bias[e].to(total.dtype)
        out[rows] = total.to(y.dtype)
    return out


def _one_product(
    x: torch.Tensor, w: torch.Tensor, transpose_weight: bool, added: Added
) -> torch.Tensor:
    h, up, scaling, bias = added
    bias = None if bias is None else bias.to(x.dtype)
    y = F.linear(x, w if transpose_weight else w.mT, bias)
    return y if h is None else torch.addmm(y, h, up.to(x.dtype).mT, alpha=scaling)


def low_rank(
    x: torch.Tensor,
    down: torch.Tensor,
    offs: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    n_rows: int,
    *,
    scale_by: float = 1.0,
) -> torch.Tensor:
    """Return ``h [R, r]`` in x's dtype: ``h[i] = scale_by * x[token of i] down_e^T``, ``down [E, r, C]``."""
    dtype = _sum_dtype(x)
    down = down.to(x.dtype).to(dtype)
    h = x.new_zeros((n_rows, down.shape[-2]))
    for e, rows in _groups(offs, n_rows):
        d = down if offs is None else down[e]
        h[rows] = (_rows_of(x, rows, order, top_k).to(dtype) @ d.mT * scale_by).to(x.dtype)
    return h


def gram(
    l: torch.Tensor,  # noqa: E741
    m: torch.Tensor,
    offs: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    scaling: float,
    dtype: torch.dtype,
    transposed: bool,
) -> torch.Tensor:
    """Return ``[E, r, C]`` in ``dtype``: ``scaling * sum over e's rows i of l[i]^T m[token of i]``.

    ``l [R, r]``; ``m [R, C]``, or ``[T, C]`` with an ``order``. ``transposed`` gives ``[E, C, r]``. Experts
    without rows get zeros; a dense gram has no E.
    """
    r, columns = l.shape[1], m.shape[1]
    experts = 1 if offs is None else offs.shape[0]
    out = l.new_zeros((experts, r, columns), dtype=_sum_dtype(l))
    for e, rows in _groups(offs, l.shape[0]):
        out[e] = l[rows].to(out.dtype).mT @ _rows_of(m, rows, order, top_k).to(out.dtype)
    out = out.mul_(scaling).to(dtype)
    out = out.mT.contiguous() if transposed else out
    return out[0] if offs is None else out


def sum_rows(
    y: torch.Tensor,
    order: torch.Tensor,
    top_k: int,
    weights: torch.Tensor | None,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``[T, C]`` in y's dtype: each token's weighted sum of its ``top_k`` rows of ``y [R, C]``.

    ``weights [T, top_k]``; row ``i`` takes its token's weight ``order[i] % top_k``; None for ones. With
    ``offs``, unassigned rows and their weights count as zero.
    """
    owned = _owned(offs, y.shape[0])
    rows = y.to(_sum_dtype(y)).where(owned, 0)
    if weights is not None:
        rows = (rows * weights.to(rows.dtype).flatten()[order.long()][:, None]).where(owned, 0)
    return _ungrouped(rows, order, top_k).sum(1).to(y.dtype)


def combine_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    offs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(dy [R, C], dweights [T, top_k])`` of ``sum_rows(y, order, top_k, weights, offs)``."""
    dtype = _sum_dtype(dout)
    top_k, order = weights.shape[1], order.long()
    owned = _owned(offs, y.shape[0])
    dout_rows = dout.to(dtype)[order // top_k].where(owned, 0)
    products = (y.to(dtype).where(owned, 0) * dout_rows).sum(-1, keepdim=True)
    dweights = _ungrouped(products, order, top_k).squeeze(-1)
    dy = (dout_rows * weights.to(dtype).flatten()[order][:, None]).where(owned, 0)
    return dy.to(y.dtype), dweights.to(weights.dtype)


def group_sum(dy: torch.Tensor, offs: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Sum each expert's rows of ``dy [R, C]`` to ``[E, C]`` in ``dtype``; a dense sum has no E."""
    out = dy.new_zeros((1 if offs is None else offs.shape[0], dy.shape[1]), dtype=_sum_dtype(dy))
    for e, rows in _groups(offs, dy.shape[0]):
        out[e] = dy[rows].to(out.dtype).sum(0)
    out = out.to(dtype)
    return out[0] if offs is None else out


def rows_per_token(n_tokens: int, order: torch.Tensor | None) -> int:
    """Return ``top_k``, the number of rows of ``order`` per token; 1 without an order or tokens."""
    return 1 if order is None or n_tokens == 0 else order.shape[0] // n_tokens


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_offsets(offs: torch.Tensor | None, n_rows: int) -> list[int]:
    """Return the end offsets as numbers, ``[n_rows]`` for None.

    Raises:
        ValueError: the offsets are negative, descend or exceed ``n_rows``.
    """
    ends = [n_rows] if offs is None else offs.tolist()
    if any(end < start for start, end in zip([0, *ends], [*ends, n_rows], strict=True)):
        raise ValueError(
            f"offs is {ends} for {n_rows} row(s); end offsets must ascend from 0 and not exceed "
            f"the number of rows: use the cumulative sum of the experts' row counts"
        )
    return ends


def check_order(order: torch.Tensor) -> None:
    """Raise unless ``order`` is a permutation of its rows.

    Raises:
        ValueError: a number is out of range or occurs twice.
    """
    rows = torch.arange(order.shape[0], dtype=order.dtype)
    if not torch.equal(order.sort().values, rows):
        raise ValueError(
            f"order holds {_first_numbers(order)}; it must hold each of 0 .. {order.shape[0] - 1} once: "
            f"use the argsort of the flattened [T, k] expert ids, as ops.route returns it"
        )


def _first_numbers(t: torch.Tensor, count: int = 8) -> str:
    numbers = ", ".join(map(str, t[:count].tolist()))
    return f"{numbers}, ..." if len(t) > count else numbers


def _owned(offs: torch.Tensor | None, n_rows: int) -> torch.Tensor:
    """Flag each row that belongs to a group: ``[n_rows, 1]``."""
    end = check_offsets(offs, n_rows)[-1]
    return (torch.arange(n_rows) < end)[:, None]


def _groups(offs: torch.Tensor | None, n_rows: int) -> Iterator[tuple[int, slice]]:
    """Yield ``(expert, its rows)`` for each expert that has rows."""
    ends = check_offsets(offs, n_rows)
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            yield e, slice(start, end)


def _rows_of(x: torch.Tensor, rows: slice, order: torch.Tensor | None, top_k: int) -> torch.Tensor:
    return x[rows] if order is None else x[order[rows] // top_k]


def _ungrouped(y: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """Reorder ``y [R, C]`` by token: ``[T, top_k, C]``."""
    return torch.empty_like(y).index_copy_(0, order.long(), y).unflatten(0, (-1, top_k))
