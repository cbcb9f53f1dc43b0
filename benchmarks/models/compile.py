"""Transformer blocks in training, eager and under torch.compile: milliseconds, and what compiling takes.

    pip install '.[hf,bench]'
    python -m benchmarks.models.compile [--case NAME ...] [--tokens 4096]
    python -m benchmarks.models.compile --tiny --device cpu      # gates alone; no time

Blocks of transformers' models, bf16 and with random weights: Llama-3-8B's (dense, SDPA) and gpt-oss-20b's (32
experts, eager attention). A step is forward and backward of ``LAYERS`` of them; a time is that of one block.

    LoRA          all linears and experts frozen in MXFP4, adapters of rank 16
    QAT W4A16     of all linears and experts, weights fake-quantized to MXFP4; W4A4: activations too
    recipe        forward in NVFP4, backward in MXFP8

Routers are frozen. Each block is one graph (``fullgraph=True``), an error otherwise. "reduce-overhead" is
inductor's mode with CUDA graphs. Inductor does not round to bf16 between ops that it fuses, which moves some
activations to another FP4 value and some tokens to another expert. So before any time the output and every
gradient of the compiled blocks must be as near to the eager ones' as those of the eager blocks for an input
whose last bits differ: within ``TIMES`` as much, or within ``BOUND``.
"""

from __future__ import annotations

import gc
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from benchmarks.shared import harness
from torchao_mx import (
    MXDynamicActivationMXWeightConfig,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    is_experts,
    is_linear,
)

E2M1 = torch.float4_e2m1fn_x2
RANK, LAYERS = 16, 2
BOUND, TIMES = 3e-2, 3.0
CONFIGS: dict[str, AOBaseConfig] = {
    "LoRA": MXWeightOnlyLoRAConfig(r=RANK, lora_alpha=2 * RANK),
    "QAT W4A16": QATConfig(MXWeightOnlyConfig(E2M1), step="prepare"),
    "QAT W4A4": QATConfig(MXDynamicActivationMXWeightConfig(E2M1, E2M1), step="prepare"),
    "recipe": NVFP4ForwardMXFP8BackwardConfig(),
}
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    ),
    "gpt_oss": dict(num_local_experts=32),
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama": dict(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
    ),
    "gpt_oss": dict(
        num_local_experts=4, hidden_size=64, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    ),
}  # fmt: skip
MODES = {"compiled": None, "reduce-overhead": "reduce-overhead"}


@dataclass(frozen=True)
class Case:
    """A kind of training of a model's blocks, and the most that a compiled step may take of eager's."""

    block: str
    config: str
    limit: float

    def __str__(self) -> str:
        return f"{self.config}, {self.block}"


CASES = [
    Case("llama", "LoRA", 1 / 1.1),
    Case("gpt_oss", "LoRA", 1 / 1.1),
    Case("llama", "QAT W4A16", 1.0),
    Case("llama", "QAT W4A4", 1.0),
    Case("gpt_oss", "QAT W4A16", 1.0),
    Case("llama", "recipe", 1.0),
]


class Blocks(nn.Module):
    """A model of transformers between its embedding and its head: ``[B, S, H]`` to ``[B, S, H]``."""

    def __init__(self, case: Case, sizes: dict[str, Any], device: str) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(
            case.block, **sizes, num_hidden_layers=LAYERS, vocab_size=512, use_cache=False
        )
        torch.manual_seed(0)
        with torch.device(device):
            self.model = AutoModel.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():  # adapters' gradients, for one, need a B that is not zero
            if case.config == "LoRA":
                self.model.requires_grad_(False)
            quantize_(self.model.layers, CONFIGS[case.config], filter_fn=is_quantized)
            for name, p in self.model.named_parameters():
                if "router" in name:
                    p.requires_grad_(False)
                if "lora_B" in name or "bias" in name or "sinks" in name:
                    p.normal_(std=0.02)
        self.hidden = config.hidden_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=x).last_hidden_state

    def compile_layers(self, mode: str | None) -> None:
        for layer in self.model.layers:
            layer.compile(fullgraph=True, mode=mode)


def is_quantized(module: nn.Module, name: str) -> bool:
    return is_experts(module) or (is_linear(module) and "router" not in name)


class Step:
    """Forward and backward of blocks; calling it computes all gradients anew."""

    def __init__(self, blocks: Blocks, tokens: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(1)
        shape = 1, tokens, blocks.hidden
        x, self.dy = (
            torch.randn(shape, device=device, generator=generator).bfloat16() for _ in range(2)
        )
        self.blocks, self.x = blocks, x.requires_grad_()

    def __call__(self) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        self.x.grad = None
        self.blocks.zero_grad(set_to_none=True)
        y = self.blocks(self.x)
        y.backward(self.dy)
        return y

    def results(self) -> dict[str, torch.Tensor]:
        """The output and all gradients."""
        found = {"y": self().detach(), "x": self.x.grad}
        found |= {n: p.grad for n, p in self.blocks.named_parameters() if p.requires_grad}
        return {name: value.float().clone() for name, value in found.items() if value is not None}

    def results_nearby(self) -> dict[str, torch.Tensor]:
        """The same for an input of which half of the elements have another last bit."""
        kept = self.x.detach().clone()
        with torch.no_grad():
            bits = self.x.view(torch.int16)
            bits ^= torch.randint_like(bits, 2)
        found = self.results()
        with torch.no_grad():
            self.x.copy_(kept)
        return found


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: harness.relative_error(got[key], want[key]) for key in want}


def check(name: str, found: dict[str, float], nearby: dict[str, float]) -> None:
    for key, error in found.items():
        bound = max(BOUND, TIMES * nearby[key])
        harness.gate(f"{name}: {key} differs by {error:.3g} > {bound:.3g}", error < bound)


def bench(case: Case, sizes: dict[str, Any], tokens: int, device: str) -> list[harness.Row]:
    """A row for each mode, behind eager's; on a CPU without times."""
    is_gpu = device == "cuda"
    eager = Step(Blocks(case, sizes, device), tokens, device)
    want = eager.results()
    nearby = errors(eager.results_nearby(), want)
    rows = [dict(case=str(case), mode="eager", error=0.0, limit=None)]
    for name, mode in MODES.items():
        if mode is not None and not is_gpu:
            continue
        torch.compiler.reset()
        blocks = Blocks(case, sizes, device)
        blocks.compile_layers(mode)
        step = Step(blocks, tokens, device)
        first_s = harness.first_call_s(step) if is_gpu else None
        for _ in range(3):  # of reduce-overhead, these warm up and record
            step()
        got = step.results()
        harness.gate(f"{case}: gradients of {got.keys() ^ want.keys()}", got.keys() == want.keys())
        found = errors(got, want)
        check(f"{case}, {name}", found, nearby)
        row = dict(case=str(case), mode=name, error=max(found.values()), first_s=first_s)
        row |= dict(nearby=max(nearby.values()), limit=case.limit)
        if is_gpu:
            ms, row["ratio"] = harness.paired_ms(step, eager)
            row |= dict(ms=ms / LAYERS, peak_mb=harness.peak_mb(step))
        rows.append(row)
        print(
            f"{case}, {name}: relative error of y {found['y']:.2g}, largest {row['error']:.2g}; of an "
            f"input nearby {nearby['y']:.2g}, {row['nearby']:.2g}",
            flush=True,
        )
    if is_gpu:
        rows[0] |= dict(ms=harness.step_ms(eager) / LAYERS, ratio=1.0)
        rows[0]["peak_mb"] = harness.peak_mb(eager)
    return rows


def verdicts(rows: list[harness.Row]) -> None:
    for row in rows:
        if row["limit"] is not None:
            met = "met" if row["ratio"] <= row["limit"] else "MISSED"
            print(f"{row['case']}, {row['mode']}: {met}: {row['ratio']:.3f} <= {row['limit']:.3f}")


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    cases, modes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "mode"))
    figure, ax = plt.subplots(figsize=(9, 1 + 0.7 * len(cases)))
    height = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        mine = {row["case"]: row["ms"] for row in rows if row["mode"] == mode}
        at = [cases.index(case) + i * height for case in mine]
        ax.bar_label(ax.barh(at, list(mine.values()), height, label=mode), fmt="%.2f", padding=3)
    ax.set_yticks([i + height for i in range(len(cases))], cases)
    ax.set_xlabel("forward + backward of one block, ms")
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.legend()
    harness.save_figure(figure, path, title)


def main() -> None:
    parser = harness.parser(__doc__)
    names = [str(case) for case in CASES]
    parser.add_argument("--case", choices=names, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--tiny", action="store_true", help="blocks of 64 channels, 32 tokens")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda":
        harness.require_gpu()
    elif not args.tiny:
        parser.error("--device cpu is for --tiny")
    rows = []
    for case in CASES:
        if args.case is None or str(case) in args.case:
            sizes = (TINY if args.tiny else BLOCKS)[case.block]
            rows += bench(case, sizes, 32 if args.tiny else args.tokens, args.device)
            gc.collect()
    if args.device == "cpu":
        return
    if not args.tiny:
        png = harness.save("compile", dict(rank=RANK, tokens=args.tokens, layers=LAYERS), rows)
        plot(rows, png, f"{torch.cuda.get_device_name()}: one block, {args.tokens} tokens")
    columns = dict(
        case="block", mode="mode", ms="ms a block", ratio="ratio to eager", peak_mb="peak MB",
        first_s="first step s", error="largest relative error to eager", nearby="of an input nearby",
    )  # fmt: skip
    print(harness.markdown(rows, columns))
    verdicts(rows)


if __name__ == "__main__":
    main()
