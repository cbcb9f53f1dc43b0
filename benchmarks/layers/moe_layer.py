"""One mixture-of-experts layer of gpt-oss-20b, LoRA on both projections, against the same in bf16.

    pip install '.[hf,bench]'
    python -m benchmarks.layers.moe_layer [--tokens M ...] [--no-peft]

The layer is transformers' ``GptOssExperts`` (32 experts, H = I = 2880, 4 a token), whose routing is given:
Gaussian logits and a bias of std 0.5 an expert. Variants, of which all train the same adapters of rank 16:

    bf16 grouped_mm + LoRA     the baseline: transformers' grouped_mm forward, the adapters written in torch
    PEFT target_parameters     on the same bf16 experts, W + s B A formed in every step
    MXLoRAExperts              on MXFP4 experts; in fp8 with activations rounded by rows

A step is forward and backward, with gradients to hidden states, routing weights and adapters. Each variant's
are first compared with the baseline's on the dequantized weights (but for those of PEFT's adapters, which it
lays out in its own way). Peak memory is over what was allocated before.
"""

from __future__ import annotations

import copy
import pathlib
import tempfile
from collections.abc import Callable

import torch
from torch import nn
from torchao.quantization import quantize_

from benchmarks.shared import harness
from torchao_mx import MXLoRAExperts, MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts

EXPERTS, HIDDEN, INNER, TOP_K, RANK, ALPHA = 32, 2880, 2880, 4, 16, 32
DEVICE = "cuda"
BASELINE, PEFT = "bf16 grouped_mm + LoRA", "PEFT target_parameters"
E4M3 = torch.float8_e4m3fn
OURS = {
    "MXLoRAExperts": {},
    "MXLoRAExperts, fp8": dict(compute_dtype=E4M3),
    "MXLoRAExperts, fp8, dX too": dict(compute_dtype=E4M3, grad_compute_dtype=E4M3),
}
TOLERANCE = {"MXLoRAExperts": 2e-2, PEFT: 2e-2}  # relative error; 8e-2 in fp8
TARGETS = {BASELINE: 0.85, PEFT: 0.35}  # at most, MXLoRAExperts to this variant
WEIGHTS = ("gate_up_proj", "down_proj")


class BaselineExperts(nn.Module):
    """transformers' ``grouped_mm`` experts, with adapters as a careful user writes them."""

    def __init__(self, source: nn.Module, adapters: nn.ParameterDict, scaling: float) -> None:
        super().__init__()
        self.source, self.adapters, self.scaling = source, adapters, scaling

    def product(
        self, rows: torch.Tensor, name: str, offs: torch.Tensor, expert: torch.Tensor
    ) -> torch.Tensor:
        a, b = self.adapters[f"{name}_lora_A"], self.adapters[f"{name}_lora_B"]
        y = torch._grouped_mm(rows, getattr(self.source, name), offs=offs)
        h = torch._grouped_mm(rows, a.mT, offs=offs)
        y = y + self.scaling * torch._grouped_mm(h, b.mT, offs=offs)
        return y + getattr(self.source, f"{name}_bias")[expert]

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        expert, order = ids.flatten().sort(stable=True)
        ends = torch.arange(self.source.num_experts, device=ids.device)
        offs = torch.searchsorted(expert, ends, right=True, out_int32=True)
        rows = hidden[order // ids.shape[1]]
        rows = self.source._apply_gate(self.product(rows, WEIGHTS[0], offs, expert))
        rows = self.product(rows, WEIGHTS[1], offs, expert) * weights.flatten()[order, None]
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=order.device)
        return rows[slots].view(*ids.shape, -1).sum(1)


class Holder(nn.Module):
    """PEFT names a parameter by its module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.experts(*args)


def source_experts() -> nn.Module:
    """transformers' module, random, in bf16."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INNER,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device(DEVICE):
        experts = GptOssExperts(config).bfloat16()
    with torch.no_grad():
        for name, p in experts.named_parameters():
            p.normal_(std=0.1 if "bias" in name else p.shape[1] ** -0.5)
    return experts.requires_grad_(False)


def adapters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if "lora" in name}


def variants(with_peft: bool) -> dict[str, tuple[nn.Module, dict[str, nn.Parameter]]]:
    """(module, its adapters under our names), all on the same weights and adapters; the baseline first."""
    source = source_experts()
    holder = Holder(copy.deepcopy(source))
    quantize_(holder, MXWeightOnlyConfig(), filter_fn=is_experts)
    packed, ours = holder.experts, {}
    for name, options in OURS.items():
        config = MXWeightOnlyLoRAConfig(r=RANK, lora_alpha=ALPHA, **options)
        ours[name] = MXLoRAExperts.from_experts(packed, config)
    first = ours["MXLoRAExperts"]
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(source, name).copy_(getattr(packed, name).dequantize())
            getattr(first, f"{name}_lora_B").normal_(std=0.1)
        for module in ours.values():
            for name, p in adapters_of(module).items():
                p.copy_(getattr(first, name))
    own = {name: nn.Parameter(p.detach().clone()) for name, p in adapters_of(first).items()}
    baseline = BaselineExperts(source, nn.ParameterDict(own), ALPHA / RANK)
    found = {BASELINE: (baseline, own)}
    if with_peft:
        found[PEFT] = (_with_peft(source, first), {})
    return found | {name: (module, adapters_of(module)) for name, module in ours.items()}


def _with_peft(source: nn.Module, ours: MXLoRAExperts) -> nn.Module:
    import peft

    from torchao_mx.hf import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Holder(ours), folder)
        return peft.PeftModel.from_pretrained(
            Holder(source), folder, is_trainable=True, autocast_adapter_dtype=False
        )


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, ids, weights and the output's gradient."""
    options = dict(device=DEVICE, dtype=torch.bfloat16)
    logits = torch.randn(tokens, EXPERTS, device=DEVICE) + 0.5 * torch.randn(EXPERTS, device=DEVICE)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    weights = weights.to(torch.bfloat16).requires_grad_()
    hidden = torch.randn(tokens, HIDDEN, **options).requires_grad_()
    return hidden, ids, weights, torch.randn(tokens, HIDDEN, **options)


def step_of(
    module: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    dout: torch.Tensor,
) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        hidden.grad = weights.grad = None
        module.zero_grad(set_to_none=True)
        out = module(hidden, ids, weights)
        out.backward(dout)
        return out

    return step


def results(
    step: Callable[[], torch.Tensor], hidden: torch.Tensor, weights: torch.Tensor, adapters: dict
) -> dict[str, torch.Tensor]:
    found = {"y": step().detach(), "dX": hidden.grad, "dweights": weights.grad}
    found |= {f"d{name}": p.grad for name, p in adapters.items()}
    return {name: t.float().clone() for name, t in found.items()}


def bench(tokens: int, layers: dict[str, tuple[nn.Module, dict]]) -> list[harness.Row]:
    hidden, ids, weights, dout = inputs(tokens)
    steps = {
        name: step_of(module, hidden, ids, weights, dout) for name, (module, _) in layers.items()
    }
    first = {name: harness.first_call_s(step) for name, step in steps.items()}
    want = results(steps[BASELINE], hidden, weights, layers[BASELINE][1])
    for name, (_, adapters) in layers.items():
        for what, got in results(steps[name], hidden, weights, adapters).items():
            error = harness.relative_error(got, want[what])
            harness.gate(
                f"{tokens} tokens, {name} {what}: {error:.3g}", error <= TOLERANCE.get(name, 8e-2)
            )
    for module, _ in layers.values():
        module.zero_grad(set_to_none=True)
    del want
    rows = []
    ratios = {name: harness.paired_ms(step, steps[BASELINE]) for name, step in steps.items()}
    for name, (ms, ratio) in ratios.items():
        hidden.grad = weights.grad = None
        peak = harness.peak_mb(steps[name])
        to_peft = ms / ratios[PEFT][0] if PEFT in ratios else None
        row = dict(
            tokens=tokens, variant=name, ms=ms, ratio=ratio, ratio_to_peft=to_peft, peak_mb=peak,
            first_s=first[name],
        )  # fmt: skip
        if name == "MXLoRAExperts":
            row |= dict(ratio_target=TARGETS[BASELINE], ratio_to_peft_target=TARGETS[PEFT])
        rows.append(row)
        print(f"{tokens} {name}: {ms:.2f} ms, {ratio:.2f}", flush=True)
        for module, _ in layers.values():
            module.zero_grad(set_to_none=True)
    return rows


def plot(rows: list[harness.Row], path: pathlib.Path) -> None:
    plt = harness.pyplot()

    sizes = sorted({row["tokens"] for row in rows})
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(6.5 * len(sizes), 3.6), sharey=True, squeeze=False
    )
    for ax, tokens in zip(axes[0], sizes, strict=True):
        mine = [row for row in rows if row["tokens"] == tokens]
        labels, ms = zip(*((row["variant"], row["ms"]) for row in mine), strict=True)
        colors = [harness.OURS_COLOR if "MX" in n else harness.BASELINE_COLOR for n in labels]
        harness.bars(ax, labels, ms, "forward + backward, ms", "%.1f", colors)
        ax.set_title(f"{tokens} tokens")
    axes[0][0].invert_yaxis()
    harness.save_figure(
        figure,
        path,
        f"{torch.cuda.get_device_name()}, a gpt-oss-20b layer of experts, LoRA r={RANK}",
    )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--no-peft", action="store_true")
    args = parser.parse_args()
    harness.require_gpu()
    torch.manual_seed(0)
    layers = variants(not args.no_peft)
    rows = [row for tokens in args.tokens for row in bench(tokens, layers)]
    meta = dict(experts=EXPERTS, hidden=HIDDEN, inner=INNER, top_k=TOP_K, rank=RANK)
    plot(rows, harness.save("moe_layer", meta, rows))
    columns = dict(
        tokens="tokens", variant="variant", ms="fwd + bwd ms", ratio="ratio to bf16",
        ratio_to_peft="to PEFT", peak_mb="peak MB", first_s="first step s",
    )  # fmt: skip
    print(harness.markdown(rows, columns))


if __name__ == "__main__":
    main()
