"""LoRA on a model of gpt-oss's shape over several ranks: tokens a second, memory, bytes gathered.

    pip install '.[hf,bench]'
    script=benchmarks.distributed.train_distributed
    torchrun --nproc-per-node 8 -m $script --model 120b [--ep 4] [--compile]
    torchrun --nproc-per-node 8 -m $script --model 20b --method bf16-lora
    torchrun --nproc-per-node 2 -m $script --model tiny --device cpu --steps 3
    python -m $script --model tiny --device cpu       # one process, not sharded

transformers' GptOssForCausalLM with random frozen weights, made on the card and sharded one block at a time,
so that no rank ever holds the model. Adapters of rank 16 on both projections of all experts:

    lora         experts in MXFP4, MXLoRAExperts; all-gathered packed
    bf16-lora    bf16 experts with adapters in PyTorch, as moe_layer.py has them: what is done today

FSDP2 over all ranks, a block at a time; with ``--ep P`` experts are split over P ranks, which exchange rows,
and FSDP2 shards a rank's experts over the rest. Activation checkpointing, AdamW on the adapters, the loss
computed 512 tokens at a time. Each rank has ``--batch`` sequences of random tokens of its own, the same at
each step, so that the loss has to fall. That, and that all adapters have changed and are the same on all
ranks, is checked before any figure is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import quantize_

from benchmarks.layers.moe_layer import WEIGHTS, BaselineExperts
from benchmarks.models import gpt_oss
from benchmarks.models.gpt_oss import ALPHA, LEARNING_RATE, MODELS, RANK
from benchmarks.shared import harness
from torchao_mx import MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.distributed import ExpertParallel
from torchao_mx.nn.experts.module import local_of

LORA, BF16_LORA = "lora", "bf16-lora"
WARMUP = 2
KEYS = ["model", "method", "attention", "compiled", "ranks", "ep"]  # of a row
COLUMNS = dict(
    model="shape", method="experts", ranks="ranks", ep="ep", tokens="tokens a step", ms="ms a step",
    tokens_per_s="tok/s", peak_gb="peak GB, largest rank", all_gather_mb="all-gather MB a step",
    all_to_all_mb="all-to-all MB", first_s="first step s", first_loss="first loss", last_loss="last loss",
)  # fmt: skip


class Task(nn.Module):
    """``gpt_oss.loss_in_chunks`` as a module, for FSDP2."""

    def __init__(self, causal: nn.Module) -> None:
        super().__init__()
        self.causal = causal

    @property
    def layers(self) -> nn.ModuleList:
        return self.causal.model.layers

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return gpt_oss.loss_in_chunks(self.causal, ids)


def skeleton(size: str, device: str) -> Task:
    """The model without its weights."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(**MODELS[size], use_cache=False)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    causal.model.rotary_emb = type(causal.model.rotary_emb)(config).to(device)
    causal.gradient_checkpointing_enable({"use_reentrant": False})
    return Task(causal.train())


def materialize(module: nn.Module, packed: bool, device: str) -> None:
    """Random frozen weights for what is on meta; experts' in MXFP4 if ``packed``."""
    for prefix, owner in module.named_modules():
        for name, p in owner._parameters.items():
            if p is not None and p.is_meta:
                is_packed = packed and is_experts(owner) and p.dim() == 3
                value = gpt_oss.random_parameter(f"{prefix}.{name}", p, is_packed, device)
                owner._parameters[name] = value


def add_adapters(layer: nn.Module, method: str) -> None:
    if method == LORA:
        config = MXWeightOnlyLoRAConfig(r=RANK, lora_alpha=ALPHA)
        quantize_(layer, config, filter_fn=is_experts)
        return
    source, adapters = layer.mlp.experts, {}
    for name in WEIGHTS:
        weight = getattr(source, name)
        e, k, n = weight.shape
        a = weight.new_empty(e, RANK, k).uniform_(-(k**-0.5), k**-0.5)
        adapters |= {f"{name}_lora_A": a, f"{name}_lora_B": weight.new_zeros(e, n, RANK)}
    adapters = nn.ParameterDict({name: nn.Parameter(t) for name, t in adapters.items()})
    layer.mlp.experts = BaselineExperts(source, adapters, ALPHA / RANK)


def parallelize(layer: nn.Module, mesh: DeviceMesh, whole: DeviceMesh) -> None:
    """Split the experts over "ep" and shard them over "dp"; shard the rest over all ranks."""
    if mesh["ep"].size() > 1:
        plan = {"mlp.experts": ExpertParallel()}
        parallelize_module(layer, mesh["ep"], plan, src_data_rank=None)  # made alike on all ranks
        fully_shard(layer.mlp.experts, mesh=mesh["dp"])
        layer.mlp.experts.set_gradient_divide_factor(whole.size())
        if mesh.device_type == "cpu":  # gloo does not scale while it sums
            layer.mlp.experts.set_force_sum_reduction_for_comms(True)
    fully_shard(layer, mesh=whole)


def build(args: argparse.Namespace, ranks: int) -> Task:
    task = skeleton(args.model, args.device)
    mesh = whole = None
    if dist.is_initialized():
        shape = (ranks // args.ep, args.ep)
        mesh = init_device_mesh(args.device, shape, mesh_dim_names=("dp", "ep"))
        whole = init_device_mesh(args.device, (ranks,))
    torch.manual_seed(0)  # the same weights on all ranks
    for layer in task.layers:
        materialize(layer, args.method == LORA, args.device)
        add_adapters(layer, args.method)
        check_alike("adapters as made", adapters_of(layer))
        if mesh is not None:
            parallelize(layer, mesh, whole)
    materialize(task, False, args.device)  # embeddings, head and norm
    if whole is not None:
        fully_shard(task, mesh=whole)
    return task


def compile_layers(task: Task, ep: int) -> None:
    """The forward of each layer, inside of the hooks with which FSDP2 gathers its weights.

    Experts that are split have hooks of their own, and wait for the sizes of their exchanges.
    """
    for layer in task.layers:
        for module in [layer] if ep == 1 else [layer.self_attn, layer.mlp.router]:
            module.forward = torch.compile(module.forward, fullgraph=True)


def adapters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gathered(value: Any) -> list[Any]:
    """Every rank's ``value``."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_alike(what: str, parameters: dict[str, torch.Tensor]) -> None:
    digest = hashlib.sha256()
    for p in parameters.values():
        whole = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        digest.update(whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    harness.gate(f"{what}: not the same on all ranks", len(set(gathered(digest.digest()))) == 1)


def check_trained(task: Task, before: dict[str, torch.Tensor], losses: list[float]) -> None:
    adapters = adapters_of(task)
    harness.gate(f"losses {losses}", losses[-1] < losses[0] < math.inf)
    changed = gathered([n for n, p in adapters.items() if not torch.equal(local_of(p), before[n])])
    same = adapters.keys() - set().union(*changed)  # a rank may hold nothing of one
    harness.gate(f"not changed: {sorted(same)}", not same)
    check_alike("adapters as trained", adapters)


class Traffic(TorchDispatchMode):
    """Bytes of the collectives' outputs, on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.exchanged = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in (torch.ops.c10d._allgather_base_.default, torch.ops.c10d.alltoall_base_.default):
            size = args[0].numel() * args[0].itemsize
            if func is torch.ops.c10d._allgather_base_.default:
                self.gathered += size
            else:
                self.exchanged += size
        return func(*args, **(kwargs or {}))


def run(args: argparse.Namespace, rank: int, ranks: int) -> harness.Row:
    task = build(args, ranks)
    before = {n: local_of(p).detach().clone() for n, p in adapters_of(task).items()}
    adapters = adapters_of(task).values()
    # Without weight decay, what has no gradient does not change.
    optimizer = torch.optim.AdamW(adapters, lr=LEARNING_RATE, weight_decay=0.0)
    torch.manual_seed(1 + rank)
    vocabulary = task.causal.config.vocab_size
    ids = torch.randint(vocabulary, (args.batch, args.seq), device=args.device)

    def step() -> torch.Tensor:
        loss = task(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    traffic = Traffic()
    with traffic:  # with eager attention: torch.compile does not trace under it
        losses = [step()]
    task.causal.set_attn_implementation(args.attention)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if args.compile:
        compile_layers(task, args.ep)
    clock = harness.Clock(args.device)
    losses.append(step())
    first_s = clock.ms() / 1e3
    losses += [step() for _ in range(WARMUP)]
    times = []
    for _ in range(args.steps):
        clock = harness.Clock(args.device)
        losses.append(step())
        times.append(clock.ms())
    of_ranks = gathered([loss.item() for loss in losses])
    losses = [statistics.mean(at_step) for at_step in zip(*of_ranks, strict=True)]
    check_trained(task, before, losses)
    peaks = gathered(harness.peak_gb(args.device))
    ms, tokens = statistics.median(times), ids.numel() * ranks
    return dict(
        model=args.model, method=args.method, attention=args.attention, compiled=args.compile, ranks=ranks,
        ep=args.ep, tokens=tokens, ms=ms, tokens_per_s=tokens / ms * 1e3, peak_gb=max(peaks),
        peak_gb_by_rank=peaks, all_gather_mb=traffic.gathered / 1e6, all_to_all_mb=traffic.exchanged / 1e6,
        first_s=first_s, first_loss=losses[0], last_loss=losses[-1],
    )  # fmt: skip


def save(row: harness.Row, args: argparse.Namespace) -> None:
    """Beside the rows of other runs, which one machine or another measured."""
    rows = harness.with_saved_rows("train_distributed", [row], KEYS)
    rows.sort(key=lambda r: [list(MODELS).index(r["model"]), *(r[key] for key in KEYS[1:])])
    meta = dict(rank=RANK, batch=args.batch, sequence=args.seq)
    png = harness.save("train_distributed", meta, rows)
    plot(rows, png, f"{torch.cuda.get_device_name()}: LoRA on gpt-oss, {args.seq} tokens a GPU")


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    labels = [
        f"{r['model']}, {r['method']}, {r['attention']}{', compiled' * r['compiled']}: {r['ranks']} GPU"
        + "s" * (r["ranks"] > 1)
        + f", experts over {r['ep']}" * (r["ep"] > 1)
        for r in rows
    ]
    colors = [
        harness.BASELINE_COLOR if r["method"] == BF16_LORA else harness.OURS_COLOR for r in rows
    ]
    figure, axes = plt.subplots(1, 2, figsize=(14, 1.2 + 0.35 * len(rows)), sharey=True)
    for ax, key, heading in zip(
        axes, ("tokens_per_s", "peak_gb"), ("tokens a second", "peak GB a GPU"), strict=True
    ):
        fmt = "{:,.0f}" if key == "tokens_per_s" else "{:.1f}"
        harness.bars(ax, labels, [r[key] for r in rows], heading, fmt, colors)
    axes[0].invert_yaxis()
    harness.save_figure(figure, path, title)


@contextlib.contextmanager
def ranks_of(device: str) -> Iterator[tuple[int, int]]:
    """(this rank, how many there are), as torchrun says."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="20b")
    parser.add_argument("--method", choices=[LORA, BF16_LORA], default=LORA)
    parser.add_argument("--steps", type=int, default=10, help="timed ones")
    parser.add_argument("--batch", type=int, default=1, help="sequences a rank")
    parser.add_argument("--seq", type=int, help="tokens of one; default 4096, of tiny 64")
    parser.add_argument("--ep", type=int, default=1, help="ranks that the experts are split over")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each layer")
    parser.add_argument("--attention", choices=["eager", "flex_attention"], default="eager")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    args.seq = args.seq or (64 if args.model == "tiny" else 4096)
    if args.ep > 1 and args.method == BF16_LORA:
        parser.error("--ep splits the experts of --method lora only")
    if args.ep > 1 and int(os.environ.get("WORLD_SIZE", 1)) % args.ep:
        parser.error(f"--ep {args.ep} does not divide the number of ranks")
    return args


def main() -> None:
    args = parse()
    if args.device == "cuda":
        harness.require_gpu()
    with ranks_of(args.device) as (rank, ranks):
        row = run(args, rank, ranks)
        if rank != 0:
            return
    if args.device == "cuda" and args.model != "tiny":
        save(row | dict(host_us=harness.host_us()), args)
    print(json.dumps(row))
    print(harness.markdown([row], COLUMNS))


if __name__ == "__main__":
    main()
