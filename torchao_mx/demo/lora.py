"""``--method lora``: LoRA on a tiny gpt-oss whose experts are in MXFP4, and on the same dequantized.

The model is pretrained on program text, packed, and saved as gpt-oss is published. Adapters then learn
other text, in two ways that start from the same adapters and see the same batches. Beside the files of
every run, its folder gets ``model/``, the packed checkpoint, and ``adapter/``, arm 1's in PEFT's format.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_mx import MXTensor, MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.demo import report
from torchao_mx.demo.data import VOCAB, Corpus, load_adaptation_corpus
from torchao_mx.demo.quant import stored_bytes
from torchao_mx.demo.report import BLUE, GREEN, RED
from torchao_mx.demo.run import PRETRAIN, Run
from torchao_mx.demo.settings import DemoError, Settings

#: Nats between the losses of two programs that compute the same in fp32 and round it differently.
TOLERANCE = 1e-5

PHASES = (PRETRAIN, "lora", "peft")
MADE = "model and adapter"
NEXT_PYTHON = """\
from torchao.quantization import quantize_
from torchao_mx import MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.hf import from_pretrained, save_adapter

model = from_pretrained("openai/gpt-oss-20b", device_map="auto")  # experts stay in MXFP4
model.requires_grad_(False)
quantize_(model, MXWeightOnlyLoRAConfig(r=16), filter_fn=is_experts)  # adapters beside them
...  # train as ever, or with TRL's SFTTrainer
save_adapter(model, "tuned")  # in PEFT's format
"""
NEXT_SHELL = (
    "vllm serve openai/gpt-oss-20b --enable-lora --max-lora-rank 16 --lora-modules tuned=tuned"
)


def compare(run: Run) -> dict[str, Any]:
    from torchao_mx.hf import from_pretrained, save_adapter, save_pretrained

    s, path = run.settings, run.out / "model"
    pretrained = run.train(PRETRAIN, "pretraining", build(s))
    quantize_(pretrained, MXWeightOnlyConfig(), filter_fn=is_experts)
    save_pretrained(pretrained, path)

    packed, lora = (from_pretrained(path, dtype=torch.float32).to(s.device) for _ in range(2))
    lora.requires_grad_(False)
    config = MXWeightOnlyLoRAConfig(r=s.rank, lora_alpha=2 * s.rank)
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)
        quantize_(lora, config, filter_fn=is_experts)
    with tempfile.TemporaryDirectory() as start:
        save_adapter(lora, start)
        peft = _load_in_peft(path, start, s.device, train=True)
    save_adapter(run.train("lora", "arm 1, LoRA on MXFP4", lora), run.out / "adapter")
    run.train("peft", "arm 2, LoRA on fp32", peft)

    weights = [p for p in packed.parameters() if isinstance(p, MXTensor)]
    experts, dequantized = sum(map(stored_bytes, weights)), sum(4 * p.numel() for p in weights)
    adapters = sum(stored_bytes(p) for p in lora.parameters() if p.requires_grad)
    arms = [
        (title, run.measure(model), {"experts_bytes": frozen, "adapter_bytes": trained})
        for title, model, frozen, trained in (
            ("0  the packed checkpoint as it is", packed, experts, 0),
            ("1  LoRA on it, its experts in MXFP4", lora, experts, adapters),
            ("2  LoRA on it dequantized to fp32 (PEFT)", peft, dequantized, adapters),
        )
    ]
    return {"table": report.table_rows(arms), "apart": report.difference(arms[2][1], arms[1][1])}


def conclude(run: Run, results: dict[str, Any]) -> str:
    rows, curves = results["table"], run.curves
    ours, theirs = ("LoRA on MXFP4", BLUE), ("LoRA on fp32", GREEN)
    report.plot(
        run.out,
        results,
        curves=(("lora", *ours), ("peft", *theirs)),
        ends=(("no training", RED), ours, theirs),
        title="LoRA on the experts of a tiny gpt-oss, adapting to other text",
    )
    apart, error = results["apart"]
    gain, share = -rows[1]["gap"], rows[1]["experts_bytes"] / rows[2]["experts_bytes"]
    return (
        f"{report.format_rows(rows, {'experts_bytes': 'experts', 'adapter_bytes': 'adapters'})}\n\n"
        f"Loss in nats a byte over {results['heldout_tokens']:,} held-out bytes of the new text, computed\n"
        f"in fp32; ± is the standard error of the gap. Bytes are those of the experts' weights, which are\n"
        f"frozen, and of the adapters in training. All else is frozen, in fp32.\n"
        f"The pretrained model: {curves[PRETRAIN][-1][1]:.4f}, and {curves['lora'][0][1]:.4f} packed.\n"
        f"From the same adapters over the same batches, arm 2 ends {apart:+.4f} ± {error:.4f} from arm 1.\n"
        f"LoRA on MXFP4 gains {gain:.4f} nats, with {share:.0%} of arm 2's bytes for experts."
    )


def verify(settings: Settings, out: Path, losses: list[float]) -> str:
    """Load the checkpoint and the adapter in stock transformers and PEFT."""
    run = Run(settings, out)
    loss = run.measure(_load_in_peft(out / "model", out / "adapter", settings.device)).mean().item()
    apart = abs(loss - losses[1])
    programs = " and ".join(f"{name} {version(name)}" for name in ("transformers", "peft"))
    found = f"{MADE}, loaded by {programs}, have held-out loss {loss:.7f}, {apart:.0e} from arm 1's"
    if not apart <= TOLERANCE:
        raise DemoError(f"{out}: {found}, more than {TOLERANCE:g}")
    return f"{found} (at most {TOLERANCE:g})"


def load_corpus(data: str | None, seq: int) -> Corpus:
    """Program text to pretrain on, and prose to adapt to; before that, whether the packages are there."""
    try:
        installed, _ = version("transformers"), version("peft")
    except PackageNotFoundError as error:
        text = f"--method lora needs {error.name}: pip install 'torchao_mx[hf]'"
        raise DemoError(text) from error
    if tuple(map(int, installed.split(".")[:2])) < (5, 8):
        raise DemoError(
            f"--method lora needs transformers 5.8 or later, and {installed} is installed, under which "
            f"PEFT takes the axes of gpt-oss's experts for each other: pip install 'transformers>=5.8'"
        )
    from transformers.utils import logging

    logging.disable_progress_bar()  # files of a megabyte
    return load_adaptation_corpus(data, seq)


def build(settings: Settings) -> nn.Module:
    """A freshly initialised gpt-oss, a function of the settings."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCAB,
        num_hidden_layers=settings.layers,
        hidden_size=settings.dim,
        intermediate_size=settings.dim,
        head_dim=settings.dim // settings.heads,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_local_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        max_position_embeddings=settings.seq,
        sliding_window=settings.seq // 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=settings.dim**-0.5,  # keeps the variance of what goes through
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = GptOssForCausalLM(config)
    return model.to(settings.device)


def _load_in_peft(model: Path, adapter: str | Path, device: str, train: bool = False) -> nn.Module:
    """The checkpoint and the adapter in transformers, which dequantizes, and PEFT; nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Mxfp4Config

    plain = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    return PeftModel.from_pretrained(plain, adapter, is_trainable=train).to(device)
