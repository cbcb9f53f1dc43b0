"""The kernels of a step of LoRA on MXFP4 experts: what each moves and computes, and how long that takes.

Times follow from :class:`Constants`; ``cost_model.py``, which fits and uses them, says how.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import bench_lora_grouped as grouped
import lora_common
import torch
from bench_gpt_oss import LOSS_TOKENS, MODELS, RANK

from torchao_mx import MXFP4
from torchao_mx.ops.core.tiles import hopper_backward_tile, hopper_forward_tile
from torchao_mx.ops.packed_mm.strategy import DEFAULT_SCRATCH, HOPPER_CROSSOVER

BF16 = 2  # bytes
PACKED = MXFP4.bits_per_element / 8
TOP_K, TOKENS = 4, 4096
# Bytes that torch's operations move, forward and backward, as transformers 5 writes them: for an element
# of x, of x, of q and k, and for a logit; and passes over the bf16 scores of all heads.
NORM, RESIDUAL, ROPE, LOSS = (40, 92), (6, 12), (18, 20), (14, 22)
EAGER_PASSES = (13.2, 21.2)
OPTIMIZER = 14  # AdamW in bf16, a parameter


@dataclass(frozen=True)
class Constants:
    """Two measured rates, the shares of them that kernels reach, and what launches take."""

    copy_gbs: float
    bf16_tflops: float
    fused: float = 0.75
    decode_ps: float = 0.1
    gemm: float = 0.8
    copy: float = 0.8
    rows: float = 0.8
    launch_us: float = 5.0
    host_calls: float = (
        100.0  # of torch's smallest ops, which take as long as an eager product's step
    )
    torch: float = 0.5
    attention: float = 0.4


class Kernel(NamedTuple):
    """``kind`` is a share of :class:`Constants`; ``flops`` are useful ones, ``tile_flops`` those done."""

    part: str
    kind: str
    nbytes: float = 0
    flops: float = 0
    tile_flops: float = 0
    decoded: float = 0
    launches: float = 1

    def ms(self, c: Constants) -> float:
        moved = self.nbytes / c.copy_gbs / 1e6
        work = max(self.flops, self.tile_flops) / c.bf16_tflops / 1e9 / getattr(c, self.kind)
        if self.kind in ("fused", "gemm", "attention"):
            busy = max(moved, self.decoded * c.decode_ps * 1e-9 + work)
        else:
            busy = moved / getattr(c, self.kind)
        return busy + self.launches * c.launch_us / 1e3


class Passes(NamedTuple):
    forward: list[Kernel]
    backward: list[Kernel]

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Product:
    """LoRA on ``W [E, n, k]`` with ``sizes`` rows an expert, gathered from ``tokens`` unless that is None."""

    part: str
    sizes: Sequence[int]
    n: int
    k: int
    tokens: int | None = None

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def weights(self) -> int:
        """Elements of the experts that have rows."""
        return sum(size > 0 for size in self.sizes) * self.n * self.k

    def flops(self, forward: bool) -> int:
        """Of the product and of the adapters' second factor, which goes along in it."""
        return 2 * self.rows * (self.n * self.k + RANK * (self.n if forward else self.k))

    def fused(self, forward: bool) -> list[Kernel]:
        tile_of = hopper_forward_tile if forward else hopper_backward_tile
        tile, *_ = tile_of(self.rows, len(self.sizes))
        tiles, work = sum(-(-size // tile) for size in self.sizes), self.n * self.k
        moved = self.weights * PACKED + self.rows * (self.n + self.k) * BF16
        x = (self.tokens or self.rows) * self.k * BF16
        rearranged = x if forward else self.weights / MXFP4.block_size  # x, or the scales
        return [
            Kernel(self.part, "rows", 2 * rearranged),
            Kernel(self.part, "fused", moved, self.flops(forward), 2 * tiles * tile * work, tiles * work),
        ]  # fmt: skip

    def unpacked(self, forward: bool) -> list[Kernel]:
        """Decode, GEMM, and a copy of rows: x made wide, or y with the adapters' part added."""
        reduced, columns = (self.k, self.n) if forward else (self.n, self.k)
        moved = self.rows * (self.n + self.k) * BF16
        summed = not forward and self.tokens is not None
        allowed = max(DEFAULT_SCRATCH, moved * 2 // 3 if summed else moved)
        slices = math.ceil(len(self.sizes) * reduced * columns * BF16 / allowed)
        wide = (forward and self.tokens is not None) or reduced <= columns
        copied = (reduced if wide else columns) * (1 + (wide and slices > 1 and not summed))
        return [
            Kernel(self.part, "copy", self.weights * (PACKED + BF16), launches=2 * slices),
            Kernel(self.part, "gemm", moved + self.weights * BF16, self.flops(forward), launches=slices),
            Kernel(self.part, "copy", 2 * self.rows * copied * BF16, launches=slices),
        ]  # fmt: skip

    def passes(self, strategy: str = "auto") -> Passes:
        x, y, a, b = (
            n * BF16 for n in (self.rows * self.k, self.rows * self.n,
                               len(self.sizes) * RANK * self.k, len(self.sizes) * RANK * self.n)
        )  # fmt: skip
        with_a = Kernel(self.part, "rows", x + a, 2 * self.rows * self.k * RANK)  # h or dA
        with_b = Kernel(self.part, "rows", y + b, 2 * self.rows * self.n * RANK)  # g or dB
        products = []
        for forward in (True, False):
            fuses = HOPPER_CROSSOVER.fuses(self.rows, len(self.sizes), forward)
            fuses = fuses and strategy == "auto"
            products.append(self.fused(forward) if fuses else self.unpacked(forward))
        backward = [with_b, *products[1], with_a, with_b]
        if self.tokens is not None:  # rows summed to their tokens
            moved = x + self.tokens * self.k * BF16
            backward.append(Kernel(self.part, "rows", moved, launches=2))
        return Passes([with_a, *products[0]], backward)


@functools.cache
def rows_of(routing: str, experts: int, top_k: int, tokens: int) -> tuple[int, ...]:
    """Rows of each expert, as the benchmarks draw them."""
    lora_common.DEVICE = "cpu"  # where route draws
    torch.manual_seed(0)
    return tuple(grouped.route(routing, grouped.Shape(experts, 0, 0, top_k, ()), tokens).sizes)


@dataclass(frozen=True)
class Model:
    """gpt-oss on one GPU, whose experts get ``sizes`` rows."""

    layers: int
    sizes: tuple[int, ...]
    tokens: int = TOKENS
    eager: bool = True
    hidden: int = 2880
    inner: int = 2880
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 201_088

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(in, out) of q, k, v and o."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]

    @property
    def products(self) -> list[Product]:
        up = Product("MoE: gate_up", self.sizes, 2 * self.inner, self.hidden, self.tokens)
        return [up, Product("MoE: down", self.sizes, self.hidden, self.inner)]

    @property
    def packed_bytes(self) -> float:
        """Of a layer's experts; with biases."""
        elements = sum(p.n * (p.k * PACKED + BF16) for p in self.products)
        return len(self.sizes) * elements

    @property
    def expert_adapter_bytes(self) -> int:
        return len(self.sizes) * RANK * BF16 * sum(p.n + p.k for p in self.products)

    @property
    def dense_bytes(self) -> int:
        """Of a layer's attention with its adapters and sinks, router and norms."""
        attention = sum(i * o + o + RANK * (i + o) for i, o in self.projections) + self.heads
        router = (self.hidden + 1) * len(self.sizes)
        return BF16 * (attention + router + 2 * self.hidden)

    def experts(self) -> Passes:
        rows, part = sum(self.sizes), "MoE: route, swiglu, combine"
        act, y, out = (
            n * BF16 for n in (rows * self.inner, rows * self.hidden, self.tokens * self.hidden)
        )
        route = Kernel(part, "rows", rows * 64, launches=9)
        gate = [Kernel(part, "rows", n * act) for n in (3, 5)]
        combine = [Kernel(part, "rows", n * y + out, launches=2) for n in (1, 2)]
        up, down = (p.passes() for p in self.products)
        return up + down + Passes([route, gate[0], combine[0]], [combine[1], gate[1]])

    def layer(self) -> Passes:
        passes = self.experts()
        for shape in self.projections:
            passes += self._projection(*shape)
        x = self.tokens * self.hidden
        rotated = self.tokens * (self.heads + self.kv_heads) * self.head_dim
        scores = self.tokens**2 * self.heads  # one sequence
        for kernels, i in zip(passes, (0, 1), strict=True):
            rest = 2 * (NORM[i] + RESIDUAL[i]) * x + ROPE[i] * rotated
            kernels.append(Kernel("norms, rope, residuals", "torch", rest, launches=(38, 60)[i]))
            kernels.append(Kernel("router", "gemm", x * BF16, 2 * x * len(self.sizes), launches=4))
            flops = (2, 4 + (not self.eager))[i] * 2 * scores * self.head_dim
            if self.eager:
                moved = EAGER_PASSES[i] * scores * BF16
                kernels.append(Kernel("attention scores", "torch", moved, flops, launches=14))
            else:  # the causal half; half of the layers see a window of 128
                kernels.append(Kernel("attention scores", "attention", 0, flops / 4, launches=3))
        return passes

    def _projection(self, n_in: int, n_out: int) -> Passes:
        t, part = self.tokens, "attention projections"
        base = Kernel(
            part, "gemm", (n_in * n_out + t * (n_in + n_out)) * BF16, 2 * t * n_in * n_out
        )
        low = [Kernel(part, "gemm", t * n * BF16, 2 * t * n * RANK) for n in (n_in, n_out)]
        added = [
            Kernel(part, "torch", t * n, launches=2) for n in (10 * n_out, 4 * n_out + 6 * n_in)
        ]
        return Passes([base, *low, added[0]], [base, *low, *low, added[1]])

    def head(self) -> Passes:
        """LOSS_TOKENS at a time."""
        part, weight, logits = (
            "head and loss",
            self.vocabulary * self.hidden,
            self.tokens * self.vocabulary,
        )
        chunks = math.ceil(self.tokens / LOSS_TOKENS)
        gemm = Kernel(part, "gemm", (chunks * weight + logits) * BF16, 2 * self.tokens * weight)
        rest = [Kernel(part, "torch", n * logits, launches=4 * chunks) for n in LOSS]
        return Passes([gemm, rest[0]], [gemm, rest[1]])

    def step(self) -> list[Kernel]:
        """Forward, each layer's and the head's again in backward, AdamW."""
        layer, head = self.layer(), self.head()
        attention = sum(RANK * (i + o) for i, o in self.projections)
        adapters = self.layers * (attention + self.expert_adapter_bytes // BF16)
        layers = self.layers * (2 * layer.forward + layer.backward)
        return [
            *layers,
            *2 * head.forward,
            *head.backward,
            Kernel("AdamW", "rows", OPTIMIZER * adapters),
        ]


def gpt_oss(size: str, eager: bool = True) -> Model:
    shape = MODELS[size]
    sizes = rows_of("balanced", shape["num_local_experts"], TOP_K, TOKENS)
    return Model(shape["num_hidden_layers"], sizes, eager=eager)
