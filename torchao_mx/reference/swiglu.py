"""Define SwiGLU of x plus a bias, with gpt-oss's clamps.

::

    g, u = halves of x + bias_e                                  x [R, 2 C]
    g, u = min(g, limit), min(max(u, -limit), limit)             if there is a limit
    y    = (u + up_offset) * g * sigmoid(alpha * g)              y [R, C]

The halves are the first and last C columns or, if interleaved, the even and odd columns. Experts own rows as
in ``reference/mm.py``: rows after ``offs[-1]`` are unassigned and give zeros, whatever they hold. Computed in
fp32, or in float64 for float64 x.
"""

from __future__ import annotations

import torch

from torchao_mx.reference.mm import _groups, _sum_dtype


def swiglu(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    offs: torch.Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
) -> torch.Tensor:
    """Return ``y [R, C]`` as defined at the top of the file, in x's dtype.

    ``bias`` is ``[E, 2 C]`` with int32 end offsets ``offs [E]``, and ``[2 C]`` without.
    """
    y = x.new_zeros((x.shape[0], x.shape[1] // 2))
    for e, rows in _groups(offs, x.shape[0]):
        gate, up = _halves(x[rows], _bias_of(bias, offs, e), interleaved)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        y[rows] = ((up + up_offset) * (gate * torch.sigmoid(alpha * gate))).to(x.dtype)
    return y


def swiglu_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    offs: torch.Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
) -> torch.Tensor:
    """Return ``dx [R, 2 C]`` of :func:`swiglu` in x's dtype; its ``group_sum`` is the bias's gradient.

    As in torch, a clamp passes gradients within its bounds, the bounds included.
    """
    dx = x.new_zeros(x.shape)
    for e, rows in _groups(offs, x.shape[0]):
        gate_in, up_in = _halves(x[rows], _bias_of(bias, offs, e), interleaved)
        gate, up = gate_in, up_in
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        dy_rows, sigmoid = dy[rows].to(gate.dtype), torch.sigmoid(alpha * gate)
        slope = sigmoid + alpha * (gate * (sigmoid * (1 - sigmoid)))
        dgate, dup = dy_rows * (up + up_offset) * slope, dy_rows * (gate * sigmoid)
        if limit is not None:
            dgate = dgate.where(gate_in <= limit, 0)
            dup = dup.where(up_in.abs() <= limit, 0)
        halves = (dgate, dup)
        dx_rows = torch.stack(halves, -1).flatten(1) if interleaved else torch.cat(halves, 1)
        dx[rows] = dx_rows.to(x.dtype)
    return dx


def _bias_of(bias: torch.Tensor | None, offs: torch.Tensor | None, e: int) -> torch.Tensor | None:
    return bias if bias is None or offs is None else bias[e]


def _halves(
    x: torch.Tensor, bias: torch.Tensor | None, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gate, up) of ``x + bias``."""
    x = x.to(_sum_dtype(x))
    x = x if bias is None else x + bias.to(x.dtype)
    return (x[:, 0::2], x[:, 1::2]) if interleaved else tuple(x.chunk(2, 1))
