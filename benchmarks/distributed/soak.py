"""Thousands of LoRA steps on MXFP4 experts, each of another size: do memory, synchronisation and losses hold?

    pip install '.[hf,bench]'
    python -m benchmarks.distributed.soak [--steps 2000] [--layers 2]
    python -m benchmarks.distributed.soak --tiny --device cpu    # a minute; what needs a GPU is left out

Layers of gpt-oss-20b's experts, packed as they are made, behind frozen routers. Every step draws its tokens
anew, 1 to 8,192 (as many steps below 90 as above), and the experts that it may route to, so that others are
empty; its data follow from its number alone. The gradients are scaled by ``torch.amp.GradScaler``. Every 50th
step is poisoned: NaN or infinity in the input, or a loss so large that its gradients overflow.

Gates, before any figure:

    a step       poisoned ones, and no others, are skipped and leave adapters and optimizer as they were;
                 forward and backward never wait for the GPU
    memory       allocated: the same behind every step from WARMUP on; reserved: of the second half at most
                 1 % over the first's; of the process: at most 64 MiB more in the second half
    recordings   of ``ops/core/replay.py``: no more than MAX_RECORDINGS an op
    losses       are finite and fall; a second run's are the same, bit for bit, and so are those of a run
                 that goes on from a checkpoint in its middle, and of one without the poisoned steps;
                 and their adapters
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.models import gpt_oss
from benchmarks.models.ablation import recordings
from benchmarks.models.gpt_oss import ALPHA, MODELS, RANK
from benchmarks.shared import harness
from torchao_mx import MXLoRAExperts, MXWeightOnlyLoRAConfig
from torchao_mx.ops.core import replay

LEARNING_RATE = 1e-4  # for steps of a single token too
REPEATED = 100  # steps of the runs that are compared
WARMUP = 50  # steps until libraries have their workspaces
REPLAYED_OPS = 6  # mm, swiglu and combine, and their backwards
RESERVED_GROWTH, RESIDENT_GROWTH_MB = 1.01, 64 * 2**20 / 1e6
HUGE = 3e38  # times the scale: beyond fp32
THINNED = 200  # points of a series that is saved


class Batch(NamedTuple):
    x: torch.Tensor  # [T, H]
    allowed: torch.Tensor  # bool [E]
    loss_weight: float


class Data:
    """Batches and poisons by the number of their step."""

    def __init__(self, config: Any, max_tokens: int, poison_every: int, device: str) -> None:
        self.config, self.max_tokens, self.device = config, max_tokens, device
        self.poison_every = poison_every

    def is_poisoned(self, step: int) -> bool:
        return step % self.poison_every == self.poison_every - 1

    def tokens(self, step: int) -> int:
        """The extremes come first; then log-uniform."""
        if step < 2:
            return (self.max_tokens, 1)[step]
        return int(math.exp(random.Random(step).uniform(0, math.log(self.max_tokens + 1))))

    def batch(self, step: int) -> Batch:
        config, generator = self.config, torch.Generator(self.device).manual_seed(step)
        options = dict(device=self.device, generator=generator)
        x = torch.randn(self.tokens(step), config.hidden_size, **options).bfloat16()
        poison = step // self.poison_every % 3 if self.is_poisoned(step) else None
        if poison in (0, 1):
            x[0] = (math.nan, math.inf)[poison]
        experts = config.num_local_experts
        some = random.Random(f"experts {step}").randint(config.num_experts_per_tok, experts)
        allowed = torch.rand(experts, **options).argsort() < some
        return Batch(x, allowed, HUGE if poison == 2 else 1.0)


class Layer(nn.Module):
    """``x + experts(x)``, routed to experts that are allowed."""

    def __init__(self, config: Any, device: str) -> None:
        super().__init__()
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        with torch.device("meta"):
            experts = GptOssExperts(config).bfloat16()
        for name, p in experts.named_parameters():
            experts._parameters[name] = gpt_oss.random_parameter(name, p, p.dim() == 3, device)
        self.experts = MXLoRAExperts.from_experts(
            experts, MXWeightOnlyLoRAConfig(r=RANK, lora_alpha=ALPHA, adapter_dtype=torch.float32)
        )
        shape = config.num_local_experts, config.hidden_size
        router = torch.randn(shape, device=device, dtype=torch.bfloat16) / math.sqrt(shape[1])
        self.register_buffer("router", router)
        self.top_k = config.num_experts_per_tok

    def forward(self, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, self.router).masked_fill(~allowed, -math.inf)
        values, ids = logits.topk(self.top_k)
        return x + self.experts(x, ids, values.softmax(-1))


class Result(NamedTuple):
    """Of a step."""

    loss: float
    skipped: bool
    ms: float


class Run:
    """Layers in training, always the same at first."""

    def __init__(self, layers: int, data: Data) -> None:
        torch.manual_seed(0)
        self.data = data
        self.layers = nn.ModuleList(Layer(data.config, data.device) for _ in range(layers))
        self.adapters = [p for p in self.layers.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.adapters, lr=LEARNING_RATE)
        # Grows as often as it is halved.
        interval = max(1, data.poison_every // 2)
        self.scaler = torch.amp.GradScaler(data.device, growth_interval=interval)

    def step(self, number: int) -> Result:
        batch, poisoned = self.data.batch(number), self.data.is_poisoned(number)
        before = self.snapshot() if poisoned else None
        start = time.perf_counter()
        with no_host_sync(self.data.device):
            loss = self.loss(batch)
            self.scaler.scale(loss).backward()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        self.optimizer.zero_grad()
        result = Result(loss.item(), skipped, (time.perf_counter() - start) * 1e3)
        harness.gate(f"step {number}: skipped: {skipped}", skipped == poisoned)
        if before is not None:
            harness.gate(f"step {number} left a trace", same(before, self.snapshot()))
        return result

    def loss(self, batch: Batch) -> torch.Tensor:
        x = batch.x
        for layer in self.layers:
            x = layer(x, batch.allowed)
        return x.float().square().mean() * batch.loss_weight

    @torch.no_grad()
    def first_loss(self) -> float:
        """Of the first batch, which is the largest."""
        return self.loss(self.data.batch(0)).item()

    def snapshot(self) -> list[torch.Tensor]:
        """Adapters and the optimizer's state."""
        tensors = [p.detach().clone() for p in self.adapters]
        states = (self.optimizer.state.get(p, {}) for p in self.adapters)
        return tensors + [t.clone() for state in states for t in state.values()]

    def save(self, path: pathlib.Path) -> None:
        adapters = {n: p for n, p in self.layers.state_dict().items() if "lora" in n}
        parts = (adapters, self.optimizer.state_dict(), self.scaler.state_dict())
        torch.save(parts, path)

    def load(self, path: pathlib.Path) -> None:
        adapters, optimizer, scaler = torch.load(path, weights_only=True)
        keys = self.layers.load_state_dict(adapters, strict=False)
        harness.gate("the checkpoint has other names", not keys.unexpected_keys)
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(scaler)


@contextlib.contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """Waiting for the GPU in it is an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def resident_mb() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def check_repeats(layers: int, data: Data, steps: int) -> None:
    """A run again, from its middle, and without the poisoned steps."""
    whole = Run(layers, data)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "checkpoint.pt"
        want = []
        for i in range(steps):
            if i == steps // 2:
                whole.save(path)
            want.append(whole.step(i).loss)
        middle = Run(layers, data)
        middle.load(path)
    runs = [
        ("a second run", Run(layers, data), range(steps)),
        ("a run from a checkpoint", middle, range(steps // 2, steps)),
        ("a run without poison", Run(layers, data), (i for i in range(steps) if not data.is_poisoned(i))),
    ]  # fmt: skip
    for name, run, numbers in runs:
        for i in numbers:
            loss = run.step(i).loss
            is_same = loss == want[i] or (math.isnan(loss) and math.isnan(want[i]))
            harness.gate(f"{name}, step {i}: loss {loss}, not {want[i]}", is_same)
        harness.gate(f"{name}: other adapters", same(run.snapshot(), whole.snapshot()))
        print(f"{name}: the same, bit for bit, to step {steps}", flush=True)


def soak(layers: int, data: Data, steps: int) -> list[harness.Row]:
    """A row a step."""
    is_gpu = data.device == "cuda"
    if is_gpu:  # what earlier runs reserved would hide growth
        gc.collect()
        torch.cuda.empty_cache()
    run, rows, base = Run(layers, data), [], None
    before = run.first_loss()
    for i in range(steps):
        result = run.step(i)
        row = dict(step=i, tokens=data.tokens(i), **result._asdict(), resident_mb=resident_mb())
        if result.skipped:
            row["loss"] = None  # JSON has no NaN
        if is_gpu:
            allocated = torch.cuda.memory_allocated()
            base = allocated if i == WARMUP else base
            stays = base in (None, allocated)
            harness.gate(f"step {i} leaves {allocated} bytes, not {base}", stays)
            reserved = torch.cuda.memory_reserved()
            row |= dict(allocated_mb=allocated / 1e6, reserved_mb=reserved / 1e6)
        rows.append(row)
        if (i + 1) % max(1, steps // 10) == 0:
            shown = f"{row['reserved_mb']:.0f} MB reserved, " if is_gpu else ""
            print(f"step {i + 1}: {shown}{row['resident_mb']:.0f} MB resident", flush=True)
    after = run.first_loss()
    harness.gate(f"the first batch's loss from {before} to {after}", after < before)
    return rows


def check_soak(rows: list[harness.Row]) -> None:
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    grown = max(row["resident_mb"] for row in second) - second[0]["resident_mb"]
    harness.gate(f"the process grew by {grown:.0f} MB", grown <= RESIDENT_GROWTH_MB)
    if "reserved_mb" in rows[0]:
        before, after = (max(row["reserved_mb"] for row in half) for half in (first, second))
        harness.gate(f"{before:.0f} to {after:.0f} MB reserved", after <= RESERVED_GROWTH * before)
    finite = all(math.isfinite(row["loss"]) for row in rows if not row["skipped"])
    harness.gate("a loss that is not finite", finite)


def summary(rows: list[harness.Row]) -> harness.Row:
    ms = [row["ms"] for row in rows[WARMUP if len(rows) > 2 * WARMUP else 0 :]]
    cuts = statistics.quantiles(ms, n=100, method="inclusive")
    found = dict(steps=len(rows), skipped=sum(row["skipped"] for row in rows),
                 sizes=len({row["tokens"] for row in rows}))  # fmt: skip
    found |= {f"ms_p{p}": cuts[p - 1] for p in (10, 50, 90, 99)} | dict(ms_max=max(ms))
    for column in ("allocated_mb", "reserved_mb", "resident_mb"):
        if column in rows[0]:
            values = [row[column] for row in rows]
            found |= {f"{column}_first": values[0], f"{column}_max": max(values)}
    return found


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    figure, (memory, loss) = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
    steps = [row["step"] for row in rows]
    for column in ("reserved_mb", "allocated_mb", "resident_mb"):
        if column in rows[0]:
            values = [row[column] for row in rows]
            memory.plot(steps, values, label=column.removesuffix("_mb"))
    memory.set(ylabel="MB behind a step", ylim=(0, None))
    memory.legend()
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    loss.plot(steps, losses, ".", ms=3)
    for row in rows:
        if row["skipped"]:
            loss.axvline(row["step"], color="#b2182b", lw=0.5)
    loss.set(xlabel="step (red: poisoned, skipped)", ylabel="loss")
    harness.save_figure(figure, path, title)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=int, help="default 2000, with --tiny 60")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="4 experts of 64 x 64, up to 64 tokens")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda":
        harness.require_gpu()
    steps = args.steps or (60 if args.tiny else 2000)
    if steps < 20:
        parser.error(f"--steps {steps}: the gates compare halves; take 20 or more")
    from transformers import GptOssConfig

    size, top_k = ("tiny", 2) if args.tiny else ("20b", 4)
    config = GptOssConfig(**MODELS[size], num_experts_per_tok=top_k)
    tokens, every = (64, 10) if args.tiny else (8192, 50)
    data = Data(config, tokens, every, args.device)
    check_repeats(args.layers, data, min(steps, REPEATED))
    rows = soak(args.layers, data, steps)
    check_soak(rows)
    found = summary(rows)
    if args.device == "cuda":
        found["recordings"] = recordings()
        limit = REPLAYED_OPS * replay.MAX_RECORDINGS
        harness.gate(f"{found['recordings']} recordings", 0 < found["recordings"] <= limit)
        thin = max(1, len(rows) // THINNED)
        meta = found | dict(layers=args.layers, size=size, rank=RANK, poison_every=every)
        png = harness.save("soak", meta, rows[::thin])
        gpu = torch.cuda.get_device_name()
        plot(rows, png, f"{gpu}: {steps} LoRA steps of 1 to {tokens} tokens")
    else:
        print("no GPU: left out: allocated and reserved memory, host synchronisation, recordings")
    print(harness.markdown([found], {key: key.replace("_", " ") for key in found}))


if __name__ == "__main__":
    main()
