"""``--method qat``: PTQ and QAT of a small transformer, from the same pretrained weights.

Beside the files of every run, its folder gets::

    pretrained.pt    weights that both arms start from
    finetuned.pt     weights of arm 0, which arm 1 quantizes
    qat.pt           weights of arm 2, in high precision
    converted.pt     arm 2's quantized weights, for --verify
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from torchao_mx.demo import checkpoint, report
from torchao_mx.demo.checkpoint import CheckpointError
from torchao_mx.demo.data import Corpus, load_corpus
from torchao_mx.demo.device import reproducible
from torchao_mx.demo.model import build_model, heldout_losses
from torchao_mx.demo.quant import (
    FORMATS,
    convert_qat,
    prepare_qat,
    quantize_after_training,
    weight_bytes,
)
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
from torchao_mx.demo.settings import Settings
from torchao_mx.demo.train import Phase

_FINETUNE, _QAT = "finetune", "qat"
_WEIGHTS = {PRETRAIN: "pretrained.pt", _FINETUNE: "finetuned.pt", _QAT: "qat.pt"}
_CONVERTED = "converted.pt"

# What the records in these files hold.
_OF_CONVERTED = frozenset({"settings", "corpus_digest", "heldout_loss", "model"})
_OF_WEIGHTS = frozenset({"settings", "model"})

# A cost of PTQ under this many nats is not worth a percentage of.
_VISIBLE = 0.005


class QATRun(Run):
    """Three arms: a fine-tune in high precision, the same quantized afterwards, and QAT."""

    settings: Settings
    files = (_CONVERTED, *_WEIGHTS.values())
    made = (_CONVERTED,)

    @staticmethod
    def load_corpus(settings: Settings) -> Corpus:
        return load_corpus(settings.data, settings.seq)

    @staticmethod
    def build(settings: Settings) -> nn.Module:
        return build_model(settings)

    def describe(self) -> dict[str, str]:
        s = self.settings
        count = sum(p.numel() for p in build_model(s).parameters())
        return {
            "format": f"{s.format}: {FORMATS[s.format].what}",
            "model": f"{count / 1e6:.2f} M parameters: {s.layers} layers of {s.dim}, MLP {s.hidden}, "
            f"heads of {s.dim // s.heads}, windows of {s.seq} bytes",
        }

    def arms(self) -> list[Phase]:
        s = self.settings
        return [
            Phase(_FINETUNE, f"arm 0, {s.dtype} fine-tune", "finetune", s.steps, s.lr, 0.0),
            Phase(_QAT, f"arm 2, QAT for {s.format}", "finetune", s.steps, s.lr, 0.0),
        ]

    def model_of(self, phase: Phase) -> nn.Module:
        if phase.name == PRETRAIN:
            return build_model(self.settings)
        model = self._model(PRETRAIN)
        if phase.name == _QAT:
            prepare_qat(model, self.settings.format)
        return model

    def keep(self, phase: Phase, model: nn.Module) -> None:
        weights = {"model": model.state_dict(), "settings": self.settings.to_dict()}
        checkpoint.save(self.out / _WEIGHTS[phase.name], weights)

    def finish(self) -> dict[str, Any]:
        table = report.table_rows(self._endpoints())
        curves = self.curves
        return {
            "table": table,
            "losses": {
                "start": curves[_FINETUNE][0][1],
                "start_ptq": curves[_QAT][0][1],  # fake quantization before any step is PTQ
                "qat_before_convert": curves[_QAT][-1][1],
            },
            "verification": verify_in_fresh_process(self.out / _CONVERTED),
        }

    def _endpoints(self) -> dict[str, Endpoint]:
        """Measure the three arms; save arm 2 converted."""
        fmt, dtype = self.settings.format, self.settings.dtype
        finetuned = self._model(_FINETUNE)
        endpoints = {f"0  {dtype} fine-tune": self._endpoint(finetuned)}
        quantize_after_training(finetuned, fmt)
        endpoints[f"1  {dtype} fine-tune, then PTQ to {fmt}"] = self._endpoint(finetuned)

        qat = self._model(_QAT)
        prepare_qat(qat, fmt)
        convert_qat(qat, fmt)
        end = endpoints[f"2  QAT, then convert to {fmt}"] = self._endpoint(qat)
        record = {
            "settings": self.settings.to_dict(),
            "corpus_digest": self.corpus.digest,
            "heldout_loss": end.losses.mean().item(),
            "model": qat.state_dict(),
        }
        checkpoint.save(self.out / _CONVERTED, record)
        return endpoints

    def _endpoint(self, model: nn.Module) -> Endpoint:
        total, linears = weight_bytes(model)
        return Endpoint(self.measure(model), {"bytes": total, "linear_bytes": linears})

    def _model(self, phase: str) -> nn.Module:
        """With the weights that ``phase`` left."""
        path = self.out / _WEIGHTS[phase]
        model = build_model(self.settings)
        model.load_state_dict(checkpoint.load(path, "weights", _OF_WEIGHTS)["model"])
        return model

    @staticmethod
    def plot(results: dict[str, Any], path: Path) -> None:
        settings = results["settings"]
        report.plot(
            results,
            path,
            arms=((_FINETUNE, f"{settings['dtype']} fine-tune", BLUE), (_QAT, "QAT", GREEN)),
            ends=(("fine-tune", BLUE), ("fine-tune, then PTQ", RED), ("QAT, then convert", GREEN)),
            title=f"QAT against PTQ in {settings['format']}",
            zoom_title=f"Fine-tuning, and {settings['format']} at its end",
        )

    @staticmethod
    def format_table(results: dict[str, Any]) -> str:
        rows, losses = results["table"], results["losses"]
        lines = report.format_rows(rows, {"bytes": "weights", "linear_bytes": "linears only"})
        converted = rows[2]["heldout_loss"] - losses["qat_before_convert"]
        notes = (
            f"Loss in nats a byte over {results['heldout_tokens']:,} held-out bytes, the same for all\n"
            f"arms; ± is the standard error of the gap. Bytes are those of the tensors. Quantized are the\n"
            f"linears of the blocks; embedding, head and norms stay in {results['settings']['dtype']}.\n"
            f"Where both arms start: {losses['start']:.4f}, and {losses['start_ptq']:.4f} after PTQ. "
            f"Converting arm 2 changed its\nloss by {converted:+.6f}.\n"
        )
        return "\n".join([*lines, "", notes + _verdict(rows)])


def _verdict(rows: list[dict[str, Any]]) -> str:
    ptq, qat = rows[1]["gap"], rows[2]["gap"]
    if ptq < _VISIBLE:
        return f"PTQ costs {ptq:+.4f} nats here: too little for QAT to show a gain ({qat:+.4f})."
    if qat >= ptq:
        return f"PTQ costs {ptq:+.4f} nats, QAT {qat:+.4f}: no gain from so little training; raise --steps."
    return (
        f"PTQ costs {ptq:+.4f} nats, QAT {qat:+.4f}: it recovers {1 - qat / ptq:.0%} of the cost."
    )


def verify(path: Path) -> str:
    """Check that a converted checkpoint has the held-out loss recorded in it; what to print of it.

    Raises:
        CheckpointError: the file is not such a checkpoint, or the text has changed since.
        VerificationError: the two differ in any bit.
    """
    record = checkpoint.load(path, "a converted checkpoint", _OF_CONVERTED)
    settings = settings_of(record, path)
    corpus = QATRun.load_corpus(settings)
    check_corpus(record, corpus, path)
    model = build_model(settings)
    quantize_after_training(model, settings.format)
    try:
        model.load_state_dict(record["model"], assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its weights do not fit its settings: {error}") from error
    model.to(settings.device)
    with reproducible(settings):
        windows = heldout_windows(corpus, settings)
        loss = heldout_losses(model, windows, settings.batch).mean().item()
    if loss != record["heldout_loss"]:
        raise VerificationError(
            f"{path}: held-out loss {loss!r} is not the recorded {record['heldout_loss']!r}; the "
            f"file was changed, or it comes from another machine or another version of torch"
        )
    return f"held-out loss {loss!r}, equal to the recorded one"
