"""``--method qat``: PTQ and QAT of a small transformer, from the same pretrained weights.

Beside the files of every run, its folder gets ``converted.pt``, the quantized weights of arm 2.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx.demo import report
from torchao_mx.demo.data import load_corpus  # noqa: F401  for Run
from torchao_mx.demo.model import build_model as build
from torchao_mx.demo.quant import FORMATS, is_quantized_linear, stored_bytes
from torchao_mx.demo.report import BLUE, GREEN, RED
from torchao_mx.demo.run import PRETRAIN, Run, save
from torchao_mx.demo.settings import DemoError, Settings

PHASES = (PRETRAIN, "finetune", "qat")
MADE = "converted.pt"
NEXT_PYTHON = """\
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao_mx import MXWeightOnlyConfig, is_experts
from torchao_mx.hf import save_pretrained
from transformers import AutoModelForCausalLM, Mxfp4Config

model = AutoModelForCausalLM.from_pretrained(
    "openai/gpt-oss-20b", quantization_config=Mxfp4Config(dequantize=True), dtype="auto"
)
mxfp4 = MXWeightOnlyConfig()
quantize_(model, QATConfig(mxfp4, step="prepare"), filter_fn=is_experts)
...  # train as ever
quantize_(model, QATConfig(mxfp4, step="convert"), filter_fn=is_experts)
save_pretrained(model, "tuned")  # in MXFP4, as gpt-oss is published; copy the tokenizer beside it
"""
NEXT_SHELL = "vllm serve tuned"

_VISIBLE = 0.005  # nats; a smaller cost of PTQ is not worth a percentage of


def compare(run: Run) -> dict[str, Any]:
    s, config = run.settings, FORMATS[run.settings.format]

    def arm(title: str, model: nn.Module) -> report.Arm:
        linears = (m.weight for n, m in model.named_modules() if is_quantized_linear(m, n))
        return title, run.measure(model), {"linear_bytes": sum(map(stored_bytes, linears))}

    model = run.train(PRETRAIN, "pretraining", build(s))
    qat = copy.deepcopy(model)

    run.train("finetune", "arm 0, fine-tune", model)
    arms = [arm("0  fine-tune", model)]
    quantize_(model, config, filter_fn=is_quantized_linear)
    arms.append(arm(f"1  fine-tune, then PTQ to {s.format}", model))

    quantize_(qat, QATConfig(config, step="prepare"), filter_fn=is_quantized_linear)
    run.train("qat", f"arm 2, QAT for {s.format}", qat)
    quantize_(qat, QATConfig(config, step="convert"), filter_fn=is_quantized_linear)
    arms.append(arm(f"2  QAT, then convert to {s.format}", qat))

    save(run.out / MADE, qat.state_dict())
    return {"table": report.table_rows(arms)}


def verify(settings: Settings, out: Path, losses: list[float]) -> str:
    """Load the converted weights into a model quantized as in PTQ."""
    model = build(settings)
    quantize_(model, FORMATS[settings.format], filter_fn=is_quantized_linear)
    model.load_state_dict(torch.load(out / MADE, weights_only=True), assign=True)
    loss = Run(settings, out).measure(model.to(settings.device)).mean().item()
    if loss != losses[2]:
        raise DemoError(f"{out / MADE}: held-out loss {loss!r} is not that of arm 2, {losses[2]!r}")
    return f"{MADE} has held-out loss {loss!r}, arm 2's to the last bit"


def conclude(run: Run, results: dict[str, Any]) -> str:
    s, rows, curves = run.settings, results["table"], run.curves
    report.plot(
        run.out,
        results,
        curves=(("finetune", "fine-tune", BLUE), ("qat", "QAT", GREEN)),
        ends=(("fine-tune", BLUE), ("fine-tune, then PTQ", RED), ("QAT, then convert", GREEN)),
        title=f"QAT against PTQ in {s.format}",
    )
    start, start_ptq = curves["finetune"][0][1], curves["qat"][0][1]  # fake-quantized is PTQ
    changed = rows[2]["heldout_loss"] - curves["qat"][-1][1]
    ptq, qat = rows[1]["gap"], rows[2]["gap"]
    if qat < ptq and ptq > _VISIBLE:
        verdict = f"QAT recovers {1 - qat / ptq:.0%} of what PTQ costs."
    else:
        verdict = "QAT shows no gain from so little training; raise --steps."
    return (
        f"{report.format_rows(rows, {'linear_bytes': 'linears'})}\n\n"
        f"Loss in nats a byte over {results['heldout_tokens']:,} held-out bytes, the same for all arms;\n"
        f"± is the standard error of the gap. The linears of the blocks are quantized; embedding, head\n"
        f"and norms stay in fp32. Where both arms start: {start:.4f}, and {start_ptq:.4f} after PTQ.\n"
        f"Converting arm 2 changed its loss by {changed:+.6f}.\n"
        f"PTQ costs {ptq:+.4f} nats, QAT {qat:+.4f}. {verdict}"
    )
