"""What a step of LoRA on MXFP4 experts costs, by counting bytes and operations; no GPU is needed.

    python -m benchmarks.models.cost_model

A step is a list of kernels. Each counts the bytes that it moves, from L2 or beyond, its operations, tiles
that are not full counted as full, and the weights that it decodes; those of a product are the kernels of
``packed_mm/op.py``, with the library's strategies and tiles. Times follow from the copy bandwidth and the
bf16 matmul rate measured on the card and a few constants, fitted to some of the measurements in
``results/``::

    fused product       max(bytes, decoded * decode_ps + operations / fused)
    other GEMMs         max(bytes, operations / gemm)
    decode, row copies  bytes / copy
    ours over rows      bytes / rows                 adapters, activation, combine; partly from L2
    torch's own         bytes / torch                norms, PEFT, loss, eager attention
    flex_attention      operations / attention
    each of them        + launch_us

and an eager step takes no less than the host needs. The other measurements are predicted; the page, which is
markdown, and ``results/cost_model.json`` say how well. Last, what the same steps would take on many GPUs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from benchmarks.layers import lora_grouped as grouped
from benchmarks.models.gpt_oss import LOSS_TOKENS, MODELS, OURS, RANK
from benchmarks.shared import harness, results
from torchao_mx import MXFP4
from torchao_mx.ops.packed_mm.hopper import product
from torchao_mx.ops.packed_mm.strategy import DEFAULT_SCRATCH, HOPPER_CROSSOVER

BF16 = 2  # bytes
PACKED = MXFP4.bits_per_element / 8
TOP_K, TOKENS = 4, 4096
# Bytes that torch's operations move, forward and backward, as transformers 5 writes them: for an element
# of x, of x, of q and k, and for a logit; and passes over the bf16 scores of all heads.
NORM, RESIDUAL, ROPE, LOSS = (40, 92), (6, 12), (18, 20), (14, 22)
EAGER_PASSES = (13.2, 21.2)
OPTIMIZER = 14  # AdamW in bf16, a parameter
CLOSE = 0.2  # an error up to which a prediction counts as right
POINT_COLUMNS = dict(
    point="point", column="time", use="", predicted_ms="model ms", measured_ms="measured ms", error="error"
)  # fmt: skip
SCALING_COLUMNS = dict(
    model="model", gpus="GPUs", plan="plan", weights_gb="weights GB a GPU",
    gather_gb="gathered, reduced GB a step", exchange_gb="all-to-all GB", compute_ms="compute ms",
    gather_ms="gather ms", exchange_ms="all-to-all ms", ms="step ms", tokens_per_s="tok/s",
    efficiency="efficiency",
)  # fmt: skip
FORWARD_TWICE = "With checkpointing a step takes each forward twice, the head's too."
FITTED = """Fitted: shape A of lora_grouped with dense routing, auto and unpack; the host's cost to its
smallest point; torch and attention to the two steps of gpt-oss-20b, so that attention stands for all of a
layer that is not counted. All else is predicted."""
ASSUMED = f"""Assumed, and none of it measured: {TOKENS} tokens a GPU, flex_attention; NVLink at 450 GB/s and
a port of 400 Gb/s a GPU, 8 GPUs a node, both reached; 20 us a collective and 10 us for each further node.
Packed weights are gathered in forward and in backward, hidden behind compute but for the first layer,
embeddings and head; adapters' gradients are reduced in bf16, AdamW is as on one GPU; all-to-alls are hidden
behind nothing, and with EP the step is that of the GPU with the most rows."""
SHARES = ("fused", "decode_ps", "gemm", "copy", "rows", "launch_us")  # fitted to products


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
        tile_of = product._forward_tile if forward else product._backward_tile
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
    torch.manual_seed(0)
    return tuple(
        grouped.route(routing, grouped.Shape(experts, 0, 0, top_k, ()), tokens, "cpu").sizes
    )


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


class Point(NamedTuple):
    """A measurement; ``products`` is how many the host launches a step of, where the host counts."""

    name: str
    column: str
    kernels: list[Kernel]
    measured: float
    fitted: bool = False
    host_us: float = 0
    products: int = 0

    def ms(self, c: Constants) -> float:
        gpu = sum(kernel.ms(c) for kernel in self.kernels)
        return max(gpu, self.products * c.host_calls * self.host_us / 1e3)


def points() -> list[Point]:
    found = []
    meta, rows = results.read("lora_grouped").values()
    for row in rows:
        strategy = {"bf16": "auto", "bf16, unpack": "unpack"}.get(row["variant"])
        fitted = row["shape"] == "A" and row["routing"] == "dense"
        if row["shape"] not in "AB" or strategy is None or (strategy == "unpack" and not fitted):
            continue
        shape = grouped.SHAPES[row["shape"]]
        sizes = rows_of(row["routing"], shape.experts, shape.top_k, row["tokens"])
        p = Product("", sizes, shape.n, shape.k, row["tokens"]).passes(strategy)
        name = f"{row['shape']} {row['routing']} {row['tokens']}, {row['variant']}"
        found.append(Point(name, "forward, graph", p.forward, row["forward_ms"], fitted))
        both = p.forward + p.backward
        found.append(Point(name, "step, graph", both, row["graph_ms"], fitted))
        if strategy == "auto":
            host = fitted and row["tokens"] == 256
            found.append(Point(name, "step, eager", both, row["ms"], host, meta["host_us"], 1))
    meta, rows = results.read("moe_layer").values()
    for row in rows:
        if row["variant"] == OURS:
            p = Model(1, rows_of("balanced", 32, TOP_K, row["tokens"]), row["tokens"]).experts()
            kernels, name = p.forward + p.backward, f"MoE layer, {row['tokens']} tokens"
            found.append(Point(name, "step, eager", kernels, row["ms"], False, meta["host_us"], 2))
    for file in ("gpt_oss", "gpt_oss_flex_attention"):
        meta, rows = results.read(file).values()
        for row in rows:
            if row["variant"] == OURS:
                step = gpt_oss(row["model"], meta["attention"] == "eager").step()
                name = f"gpt-oss {row['model']}, {meta['attention']}"
                found.append(Point(name, "step", step, row["ms"], row["model"] == "20b"))
    return found


def fitted(c: Constants, names: Sequence[str], to: Sequence[Point]) -> Constants:
    """``names`` changed, a factor at a time, until the squared log errors of ``to`` are least."""

    def loss(c: Constants) -> float:
        return sum(math.log(point.ms(c) / point.measured) ** 2 for point in to)

    factor, least = 1.5, loss(c)
    while factor > 1.001:
        trials = [replace(c, **{n: getattr(c, n) * f}) for n in names for f in (factor, 1 / factor)]
        best = min(trials, key=loss)
        if loss(best) < least:
            c, least = best, loss(best)
        else:
            factor = math.sqrt(factor)
    return c


def calibrated(found: Sequence[Point]) -> Constants:
    meta = results.read("lora_grouped")["meta"]
    c = Constants(meta["copy_gbs"], meta["bf16_tflops"])
    base = [point for point in found if point.fitted]
    c = fitted(c, SHARES, [point for point in base if point.column.endswith("graph")])
    c = fitted(c, ["host_calls"], [point for point in base if point.column == "step, eager"])
    return fitted(c, ["torch", "attention"], [point for point in base if point.column == "step"])


@dataclass(frozen=True)
class Cluster:
    """Assumed, and so is that these rates are reached: bytes each GPU gets a second, one way."""

    nvlink_gbs: float = 450
    network_gbs: float = 50  # 400 Gb/s a GPU
    gpus_a_node: int = 8
    latency_us: float = 20  # of a collective in a node; and for each further node of a ring
    hop_us: float = 10

    def ms(self, nbytes: float, ranks: int, stride: int, calls: float) -> float:
        """Of ``calls`` collectives of ``ranks`` GPUs, ``stride`` apart, that bring each ``nbytes``."""
        if ranks == 1:
            return 0.0
        in_node = max(1, self.gpus_a_node // stride)
        nodes = math.ceil(ranks / in_node)
        # What a node needs comes once over the network, through the ports of all GPUs in it that take part.
        gbs = self.nvlink_gbs if nodes == 1 else min(self.nvlink_gbs, in_node * self.network_gbs)
        return nbytes / gbs / 1e6 + calls * (self.latency_us + (nodes - 1) * self.hop_us) / 1e3


def scaled(size: str, gpus: int, plan: str, c: Constants, cluster: Cluster) -> harness.Row:
    """A step of TOKENS tokens a GPU, flex_attention.

    ``plan``: FSDP2 over all GPUs; "in a node", FSDP2 in each node and gradients summed over nodes; "+ EP",
    experts split over up to 8 GPUs of a node and FSDP2 over all.
    """
    whole = gpt_oss(size, eager=False)
    ep = min(gpus, cluster.gpus_a_node) if plan == "FSDP2 + EP" else 1
    sizes = rows_of("balanced", len(whole.sizes), TOP_K, TOKENS * ep)
    share = len(sizes) // ep
    local = replace(
        whole, sizes=max((sizes[i * share : (i + 1) * share] for i in range(ep)), key=sum)
    )
    compute_ms = sum(kernel.ms(c) for kernel in local.step())
    shards = min(gpus, cluster.gpus_a_node) if plan == "FSDP2 in a node" else gpus
    root = 2 * whole.vocabulary * whole.hidden * BF16
    experts = (local.packed_bytes + local.expert_adapter_bytes, shards // ep, ep)
    others = (whole.dense_bytes, shards, 1)

    def gathered(part: tuple[float, int, int], times: float) -> tuple[float, float]:
        nbytes, ranks, stride = part
        received = times * nbytes * (ranks - 1) / ranks
        return received, cluster.ms(received, ranks, stride, times)

    parts = [
        gathered(experts, 2 * whole.layers),
        gathered(others, 2 * whole.layers),
        gathered((root, shards, 1), 1),
    ]
    gradients = whole.layers * local.expert_adapter_bytes
    parts.append(gathered((gradients, shards // ep, ep), 1))
    if gpus > shards:  # two passes over what a GPU keeps of them
        parts.append(gathered((2 * gradients / shards, gpus // shards, cluster.gpus_a_node), 1))
    gather_bytes, gather_ms = (sum(values) for values in zip(*parts, strict=True))
    exposed = parts[2][1] + (parts[0][1] + parts[1][1]) / (2 * whole.layers)
    # There and back, in forward, in its recomputation, and in backward.
    rows = 6 * whole.layers * TOKENS * TOP_K * whole.hidden * BF16
    exchanged = rows * (ep - 1) / ep
    exchange_ms = cluster.ms(exchanged, ep, 1, 6 * whole.layers)
    ms = max(compute_ms, gather_ms - exposed) + exposed + exchange_ms
    weights = whole.layers * (experts[0] / experts[1] + others[0] / shards) + root / shards
    return dict(
        model=size, gpus=gpus, plan=plan, weights_gb=weights / 1e9, gather_gb=gather_bytes / 1e9,
        exchange_gb=exchanged / 1e9, compute_ms=compute_ms, gather_ms=gather_ms, exchange_ms=exchange_ms,
        ms=ms, tokens_per_s=gpus * TOKENS / ms * 1e3,
    )  # fmt: skip


def scaling(c: Constants, cluster: Cluster) -> list[harness.Row]:
    rows = []
    for size in ("20b", "120b"):
        one = scaled(size, 1, "FSDP2", c, cluster)
        for gpus in (1, 2, 4, 8, 64, 1000):
            plans = ["FSDP2"] if gpus == 1 else ["FSDP2", "FSDP2 + EP"]
            plans += ["FSDP2 in a node"] * (gpus > cluster.gpus_a_node)
            for plan in plans:
                row = scaled(size, gpus, plan, c, cluster)
                efficiency = row["tokens_per_s"] / gpus / one["tokens_per_s"]
                rows.append(row | dict(efficiency=f"{efficiency:.0%}"))
    return rows


def work(size: str) -> list[harness.Row]:
    """Bytes and operations a token, by part: of a layer and, below, of head and loss."""
    model = gpt_oss(size)
    sides = zip(model.layer() + model.head(), ("forward", "backward"), strict=True)
    rows: dict[str, harness.Row] = {}
    for kernels, side in sides:
        for k in kernels:
            row = rows.setdefault(k.part, dict(model=size, part=k.part))
            for key, value in ((f"{side}_kb", k.nbytes / 1e3), (f"{side}_mflop", k.flops / 1e6),
                               (f"{side}_decoded_k", k.decoded / 1e3)):  # fmt: skip
                row[key] = row.get(key, 0.0) + value / TOKENS
    return list(rows.values())


def comparison(found: Iterable[Point], c: Constants) -> list[harness.Row]:
    rows = []
    for p in found:
        error = p.ms(c) / p.measured - 1
        use = "fitted" if p.fitted else "predicted"
        rows.append(dict(
            point=p.name, column=p.column, use=use, predicted_ms=p.ms(c), measured_ms=p.measured,
            error=error,
        ))  # fmt: skip
    return rows


def share_close(rows: Iterable[harness.Row], use: str = "predicted") -> tuple[int, int]:
    """(how many of ``use`` are within CLOSE, how many there are)."""
    errors = [abs(row["error"]) for row in rows if row["use"] == use]
    return sum(error <= CLOSE for error in errors), len(errors)


def page(
    rows: list[harness.Row], works: list[harness.Row], scales: list[harness.Row], c: Constants
) -> str:
    sides = {
        f"{side}_{key}": f"{side}, {what}"
        for side in ("forward", "backward")
        for key, what in (("kb", "KB"), ("mflop", "MFLOP"), ("decoded_k", "k weights decoded"))
    }
    constants = ", ".join(f"{name} {value:.4g}" for name, value in asdict(c).items())
    close, count = share_close(rows)
    of_fit, n_fit = share_close(rows, "fitted")
    right = f"{close} of {count} predicted ({close / count:.0%}), {of_fit} of {n_fit} fitted"
    shown = [row | dict(error=f"{row['error']:+.0%}") for row in rows]
    parts = [
        f"# LoRA on MXFP4 experts: a cost model\n\n## A token in a layer, of {TOKENS}",
        harness.markdown(works, dict(model="model", part="part") | sides),
        FORWARD_TWICE,
        f"## Predicted and measured, NVIDIA H200\n\n{FITTED}\n\nConstants: {constants}.",
        harness.markdown(shown, POINT_COLUMNS),
        f"**Within {CLOSE:.0%}: {right}.**\n\n## On many GPUs\n\n{ASSUMED}",
        harness.markdown(scales, SCALING_COLUMNS),
    ]
    return "\n\n".join(parts)


def main() -> None:
    found, cluster = points(), Cluster()
    c = calibrated(found)
    rows, scales = comparison(found, c), scaling(c, cluster)
    works = [row for size in ("20b", "120b") for row in work(size)]
    print(page(rows, works, scales, c))
    close, count = share_close(rows)
    meta = dict(
        constants=asdict(c), cluster=asdict(cluster), tokens=TOKENS, close=close, predicted=count
    )
    results.write(results.path_of("cost_model"), meta, rows, work=works, scaling=scales)


if __name__ == "__main__":
    main()
