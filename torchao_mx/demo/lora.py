"""``--method lora``: LoRA on a tiny gpt-oss whose experts are in MXFP4, and on the same dequantized.

The model is pretrained on program text, packed, and saved as gpt-oss is published. Adapters then learn
other text, in two ways that start from the same adapters and see the same batches. Beside the files of
every run, its folder gets::

    model/                  the packed checkpoint
    adapter/                arm 1's adapters, trained on the packed experts, in PEFT's format
    adapter-dequantized/    arm 2's, trained by PEFT on the experts dequantized
    expected.pt             the loss of arm 1, for --verify
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_mx import MXTensor, MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.demo import checkpoint, report
from torchao_mx.demo.checkpoint import CheckpointError
from torchao_mx.demo.data import VOCAB, Corpus, load_adaptation_corpus
from torchao_mx.demo.device import reproducible
from torchao_mx.demo.model import heldout_losses
from torchao_mx.demo.quant import stored_bytes
from torchao_mx.demo.report import BLUE, GREEN, RED, Endpoint
from torchao_mx.demo.run import (
    PRETRAIN,
    Run,
    VerificationError,
    check_corpus,
    heldout_windows,
    settings_of,
    verify_in_fresh_process,
)
from torchao_mx.demo.settings import LoRASettings, UsageError
from torchao_mx.demo.train import Phase

_LORA, _PEFT = "lora", "peft"
_MODEL, _EXPECTED = "model", "expected.pt"
_ADAPTERS = {_LORA: "adapter", _PEFT: "adapter-dequantized"}
_OF_EXPECTED = frozenset({"settings", "corpus_digest", "heldout_loss"})

#: Nats between the losses of two programs that compute the same in fp32 and round it differently.
TOLERANCE = 1e-5


class Logits(nn.Module):
    """A model of transformers as the demo calls one: token ids ``[B, T]`` to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


class LoRARun(Run):
    """Three arms: the packed checkpoint as it is, LoRA on it, and LoRA on it dequantized."""

    settings: LoRASettings
    files = (_EXPECTED,)
    made = (_MODEL, _ADAPTERS[_LORA])

    @staticmethod
    def check_installed() -> None:
        Run.check_installed()
        missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
        if missing:
            raise UsageError(
                f"--method lora needs {' and '.join(missing)}: pip install 'torchao_mx[hf]', or in a clone "
                f"pip install '.[hf]'"
            )
        installed = version("transformers")
        if tuple(map(int, re.findall(r"\d+", installed)[:2])) < (5, 8):
            raise UsageError(
                f"--method lora needs transformers 5.8 or later, and {installed} is installed, under which "
                f"PEFT takes the axes of gpt-oss's experts for each other: pip install 'transformers>=5.8'"
            )

    @staticmethod
    def load_corpus(settings: LoRASettings) -> Corpus:
        return load_adaptation_corpus(settings.data, settings.seq)

    @staticmethod
    def build(settings: LoRASettings) -> nn.Module:
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
        )
        with _seeded(settings):
            model = GptOssForCausalLM(config)
        return Logits(model.to(device=settings.device, dtype=settings.torch_dtype))

    def describe(self) -> dict[str, str]:
        s = self.settings
        count = sum(p.numel() for p in self.build(s).parameters())
        return {
            "model": f"gpt-oss of {count / 1e6:.2f} M parameters: {s.layers} layers of {s.dim}, {s.experts} "
            f"experts, {s.top_k} a token, windows of {s.seq} bytes",
            "adapters": f"of rank {s.rank}, on the experts",
        }

    def arms(self) -> list[Phase]:
        s = self.settings
        return [
            Phase(_LORA, "arm 1, LoRA on MXFP4", "finetune", s.steps, s.lr, 0.0),
            Phase(_PEFT, f"arm 2, LoRA on {s.dtype}", "finetune", s.steps, s.lr, 0.0),
        ]

    def model_of(self, phase: Phase) -> nn.Module:
        dtype = self.settings.torch_dtype
        if phase.name == PRETRAIN:
            return self.build(self.settings)
        if phase.name == _LORA:
            return self._adapted(dtype)
        from torchao_mx.hf import save_adapter

        with tempfile.TemporaryDirectory() as start:
            save_adapter(self._adapted(dtype).model, start)
            return load_in_peft(self.out / _MODEL, start, self.settings, dtype, train=True)

    def keep(self, phase: Phase, model: nn.Module) -> None:
        from torchao_mx.hf import save_adapter, save_pretrained

        if phase.name == PRETRAIN:
            quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
            save_pretrained(model.model, self.out / _MODEL)
        elif phase.name == _LORA:
            save_adapter(model.model, self.out / _ADAPTERS[_LORA])
        else:
            model.model.save_pretrained(self.out / _ADAPTERS[_PEFT])

    def _packed(self, dtype: torch.dtype) -> Logits:
        """The checkpoint, its experts in 4 bits, frozen."""
        from torchao_mx.hf import from_pretrained

        with _quiet():
            model = from_pretrained(self.out / _MODEL, dtype=dtype)
        return Logits(model.to(self.settings.device).requires_grad_(False))

    def _adapted(self, dtype: torch.dtype) -> Logits:
        """The same with new adapters, a function of the settings."""
        s, model = self.settings, self._packed(dtype)
        config = MXWeightOnlyLoRAConfig(
            r=s.rank, lora_alpha=2 * s.rank, adapter_dtype=torch.float32
        )
        with _seeded(s):
            quantize_(model, config, filter_fn=is_experts)
        return model

    def finish(self) -> dict[str, Any]:
        endpoints = self._endpoints()
        _, lora, peft = endpoints.values()
        record = {
            "settings": self.settings.to_dict(),
            "corpus_digest": self.corpus.digest,
            "heldout_loss": lora.losses.mean().item(),
        }
        checkpoint.save(self.out / _EXPECTED, record)
        curves = self.curves
        apart, apart_error = report.difference(peft.losses, lora.losses)
        return {
            "table": report.table_rows(endpoints),
            "losses": {
                "pretrained": curves[PRETRAIN][-1][1],
                "packed": curves[_LORA][0][1],
                "apart": apart,
                "apart_error": apart_error,
            },
            "verification": verify_in_fresh_process(self.out),
        }

    def _endpoints(self) -> dict[str, Endpoint]:
        """The three arms, computed in fp32 whatever they were trained in."""
        from torchao_mx.hf import load_adapter

        s, dtype = self.settings, torch.float32
        packed, lora = self._packed(dtype), self._adapted(dtype)
        load_adapter(lora.model, self.out / _ADAPTERS[_LORA])
        peft = load_in_peft(self.out / _MODEL, self.out / _ADAPTERS[_PEFT], s, dtype)
        weights = [p for p in packed.parameters() if isinstance(p, MXTensor)]
        experts = sum(map(stored_bytes, weights))
        dequantized = sum(p.numel() for p in weights) * s.torch_dtype.itemsize
        adapters = sum(stored_bytes(p) for p in lora.parameters() if p.requires_grad)
        return {
            title: Endpoint(
                self.measure(model), {"experts_bytes": frozen, "adapter_bytes": trained}
            )
            for title, model, frozen, trained in (
                ("0  the packed checkpoint as it is", packed, experts, 0),
                ("1  LoRA on it, its experts in MXFP4", lora, experts, adapters),
                (f"2  LoRA on it dequantized to {s.dtype} (PEFT)", peft, dequantized, adapters),
            )
        }

    @staticmethod
    def plot(results: dict[str, Any], path: Path) -> None:
        dtype = results["settings"]["dtype"]
        report.plot(
            results,
            path,
            arms=((_LORA, "LoRA on MXFP4", BLUE), (_PEFT, f"LoRA on {dtype}", GREEN)),
            ends=(("no training", RED), ("LoRA on MXFP4", BLUE), (f"LoRA on {dtype}", GREEN)),
            title="LoRA on the experts of a tiny gpt-oss",
            zoom_title=f"Adapting to other text, on experts in MXFP4 and in {dtype}",
        )

    @staticmethod
    def format_table(results: dict[str, Any]) -> str:
        rows, losses, dtype = results["table"], results["losses"], results["settings"]["dtype"]
        lines = report.format_rows(rows, {"experts_bytes": "experts", "adapter_bytes": "adapters"})
        apart = f"{losses['apart']:+.4f} ± {losses['apart_error']:.4f}"
        notes = (
            f"Loss in nats a byte over {results['heldout_tokens']:,} held-out bytes of the new text,\n"
            f"computed in fp32; ± is the standard error of the gap. Bytes are those of the experts'\n"
            f"weights, which are frozen, and of the adapters in training. All else is frozen, in {dtype}.\n"
            f"The pretrained model: {losses['pretrained']:.4f}, and {losses['packed']:.4f} packed.\n"
            f"From the same adapters over the same batches, arm 2 ends {apart} from arm 1.\n"
        )
        return "\n".join([*lines, "", notes + _verdict(rows)])


def _verdict(rows: list[dict[str, Any]]) -> str:
    gain = -rows[1]["gap"]
    if gain <= 0:
        return f"LoRA changed the loss by {-gain:+.4f} nats: no gain from so little training; raise --steps."
    share = rows[1]["experts_bytes"] / rows[2]["experts_bytes"]
    return f"LoRA on MXFP4 gains {gain:.4f} nats, with {share:.0%} of arm 2's bytes for experts."


def load_in_peft(
    model: Path,
    adapter: str | Path,
    settings: LoRASettings,
    dtype: torch.dtype,
    train: bool = False,
) -> Logits:
    """The checkpoint and the adapter in transformers, which dequantizes, and PEFT; nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Mxfp4Config

    with _quiet():
        plain = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype
        )
        adapted = PeftModel.from_pretrained(plain, adapter, is_trainable=train)
    return Logits(adapted.to(settings.device))


def verify(folder: Path) -> str:
    """Check that a run's checkpoint and adapter have arm 1's held-out loss in stock transformers and PEFT.

    Returns:
        What to print of it.

    Raises:
        CheckpointError: the folder is not such a run's, is damaged, or the text has changed since.
        VerificationError: the losses are more than :data:`TOLERANCE` apart.
    """
    LoRARun.check_installed()
    record = checkpoint.load(folder / _EXPECTED, "the expected loss of a LoRA run", _OF_EXPECTED)
    settings = settings_of(record, folder / _EXPECTED)
    corpus = LoRARun.load_corpus(settings)
    check_corpus(record, corpus, folder / _EXPECTED)
    try:
        model = load_in_peft(folder / _MODEL, folder / _ADAPTERS[_LORA], settings, torch.float32)
    except Exception as error:  # of many types, by what is damaged
        raise CheckpointError(
            f"{folder}: transformers and PEFT cannot load its model and adapter "
            f"({checkpoint.first_line(error)})"
        ) from error
    with reproducible(settings):
        windows = heldout_windows(corpus, settings)
        loss = heldout_losses(model, windows, settings.batch).mean().item()
    apart = abs(loss - record["heldout_loss"])
    if not apart <= TOLERANCE:
        raise VerificationError(
            f"{folder}: held-out loss {loss!r} in PEFT is {apart:.1e} from the expected "
            f"{record['heldout_loss']!r}, more than {TOLERANCE:g}; a file of its model or adapter was changed"
        )
    programs = " and ".join(f"{name} {version(name)}" for name in ("transformers", "peft"))
    return f"held-out loss {loss:.7f} in {programs}, {apart:.0e} from ours (at most {TOLERANCE:g})"


@contextmanager
def _seeded(settings: LoRASettings) -> Iterator[None]:
    """Random numbers that are a function of the seed; the global generator is as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars for files of a megabyte, and what it and PEFT say of their own insides."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
