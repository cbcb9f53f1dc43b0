"""Operands of products with fp8 rows, and the product in float64, for two test files."""

import pytest
import torch
from _grids import generator

from torchao_mx import MXFP4, reference
from torchao_mx.ops.core.operands import Packed
from torchao_mx.reference import Added, Rows
from torchao_mx.reference import fp8 as definition

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E, N, K = 5, 80, 96
ENDS = [3, 3, 21, 90, 93]  # an empty expert; tiles of several experts, an expert of several tiles
ROWS = 97  # four of them behind the last group
each_direction = pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def packed(*shape, powers=0, seed=1):
    """MXFP4 (qdata, scale) of Gaussians whose blocks lie up to ``powers`` powers of two apart."""
    e = torch.randint(
        -powers, 1, (*shape[:-1], shape[-1] // 32), generator=generator(seed)
    ).repeat_interleave(32, -1)
    w = randn(*shape, seed=seed) * torch.exp2(e.float()) / 8
    return reference.quantize(w, MXFP4)


def exact(qdata, scale):
    return reference.dequantize(qdata, scale, MXFP4, torch.float32)


def operands(transpose_weight, rank=7, dtype=torch.float32, powers=0, device="cpu", top_k=1):
    """Arguments of a grouped product, by name; with top_k > 1 tokens, and the order of their rows."""
    reduced, columns = (K, N) if transpose_weight else (N, K)
    rows = ROWS - ROWS % top_k
    args = dict(
        x=randn(rows // top_k, reduced, dtype=dtype),
        offs=torch.tensor(ENDS, dtype=torch.int32),
        order=None,
        top_k=top_k,
        n_rows=rows,
        h=randn(rows, rank, seed=3, dtype=dtype),
        up=randn(E, rank, columns, seed=4).mT,  # fp32, and a view as in a product reduced over N
        scaling=0.5,
        bias=randn(E, columns, seed=5),
    )
    if top_k > 1:
        args["order"] = torch.randperm(rows, generator=generator(6)).int()
    args["qdata"], args["scale"] = packed(E, N, K, powers=powers)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def dense(args):
    """The same with the third expert's weight for all rows."""
    one = {k: args[k][2] for k in ("qdata", "scale", "up", "bias") if args[k] is not None}
    return {**args, **one, "offs": None}


def rows_and_added(args):
    rows, added = ([args[name] for name in of._fields] for of in (Rows, Added))
    return Rows(*rows), Added(*added)


def call(function, args, transpose_weight, *rest, packed=False, fmt=MXFP4):
    """A product of ``args``: its weight as one operand or as several, the format among them unless None."""
    rows, added = rows_and_added(args)
    weight = (args["qdata"], args["scale"])
    if packed:
        weight = (Packed(*weight, None, fmt),)
    elif fmt is not None:
        weight += (fmt,)
    return function(args["x"], *weight, rows, transpose_weight, added, *rest)


def expected(args, transpose_weight, dtype=E4M3, **changes):
    here = {
        k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in {**args, **changes}.items()
    }
    return call(definition.fp8_product, here, transpose_weight, dtype)


def in_float64(args, transpose_weight):
    """The product of unrounded operands."""
    x, w = args["x"].double(), exact(args["qdata"], args["scale"]).double()
    rows = x if args["order"] is None else x[args["order"].long() // args["top_k"]]
    y, start = torch.zeros(args["n_rows"], N if transpose_weight else K, dtype=torch.float64), 0
    one = args["offs"] is None
    for e, end in enumerate([args["n_rows"]] if one else args["offs"].tolist()):
        of, mine = (... if one else e), slice(start, end)
        y[mine] = rows[mine] @ (w[of].mT if transpose_weight else w[of])
        if args["h"] is not None:
            y[mine] += args["scaling"] * args["h"][mine].double() @ args["up"][of].double().mT
        if args["bias"] is not None:
            y[mine] += args["bias"][of].double()
        start = end
    return y
