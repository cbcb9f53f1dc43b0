"""What a run found: the table, and the picture of its curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchao_mx.demo.settings import Settings

if TYPE_CHECKING:
    from torchao_mx.demo.run import Endpoint

# A cost of PTQ under this many nats is not worth a percentage of.
_VISIBLE = 0.005


def table_rows(endpoints: dict[str, Endpoint], settings: Settings) -> list[dict[str, Any]]:
    """The three arms. ``gap`` is to arm 0 on the same windows, ``gap_error`` its standard error."""
    titles = {
        "high_precision": f"0  {settings.dtype} fine-tune",
        "ptq": f"1  {settings.dtype} fine-tune, then PTQ to {settings.format}",
        "qat": f"2  QAT, then convert to {settings.format}",
    }
    reference = endpoints["high_precision"].losses
    rows = []
    for name, title in titles.items():
        end = endpoints[name]
        loss = end.losses.mean().item()
        gap = end.losses - reference
        rows.append(
            {
                "arm": title,
                "heldout_loss": loss,
                "perplexity": math.exp(loss),
                "gap": gap.mean().item(),
                "gap_error": (gap.std() / math.sqrt(len(gap))).item(),
                "bytes": end.total_bytes,
                "linear_bytes": end.linear_bytes,
            }
        )
    return rows


def format_table(results: dict[str, Any]) -> str:
    """The last thing a run prints."""
    rows, losses = results["table"], results["losses"]
    dtype = results["settings"]["dtype"]
    width = max(len(row["arm"]) for row in rows)
    head = (
        f"{'':{width}}  {'held-out loss':>13}  {'perplexity':>10}  {'gap to arm 0':>18}"
        f"  {'weights':>12}  {'linears only':>12}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        gap = f"{row['gap']:+.4f} ± {row['gap_error']:.4f}" if row is not rows[0] else ""
        lines.append(
            f"{row['arm']:{width}}  {row['heldout_loss']:>13.4f}  {row['perplexity']:>10.4f}"
            f"  {gap:>18}  {row['bytes']:>10,} B  {row['linear_bytes']:>10,} B"
        )
    converted = rows[2]["heldout_loss"] - losses["qat_before_convert"]
    notes = (
        f"Loss in nats a byte over {results['heldout_tokens']:,} held-out bytes, the same for all\n"
        f"arms; ± is the standard error of the gap. Bytes are those of the tensors. Quantized are the\n"
        f"linears of the blocks; embedding, head and norms stay in {dtype}.\n"
        f"Where both arms start: {losses['start']:.4f}, and {losses['start_ptq']:.4f} after PTQ. "
        f"Converting arm 2 changed its\nloss by {converted:+.6f}.\n"
    )
    lines += ["", notes + _verdict(rows)]
    return "\n".join(lines)


def _verdict(rows: list[dict[str, Any]]) -> str:
    ptq, qat = rows[1]["gap"], rows[2]["gap"]
    if ptq < _VISIBLE:
        return f"PTQ costs {ptq:+.4f} nats here: too little for QAT to show a gain ({qat:+.4f})."
    if qat >= ptq:
        return f"PTQ costs {ptq:+.4f} nats, QAT {qat:+.4f}: no gain from so little training; raise --steps."
    return (
        f"PTQ costs {ptq:+.4f} nats, QAT {qat:+.4f}: it recovers {1 - qat / ptq:.0%} of the cost."
    )


_GREY, _BLUE, _RED, _GREEN = "#8a8a8a", "#2a6fbb", "#c8372d", "#2e8b57"


def plot(results: dict[str, Any], path: Path) -> None:
    """Two panels: the whole run, and the fine-tuning with its three endpoints."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings, curves, rows = results["settings"], results["curves"], results["table"]
    arms = [("finetune", f"{settings['dtype']} fine-tune", _BLUE), ("qat", "QAT", _GREEN)]
    figure, (whole, zoom) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1, 1.5))

    whole.plot(*_xy(curves["pretrain"]), color=_GREY, label="pretraining")
    for name, label, color in arms:
        whole.plot(*_xy(curves[name], settings["pretrain_steps"]), color=color, label=label)
        zoom.plot(*_xy(curves[name]), color=color, marker="o", markersize=3, label=label)
    whole.set_title("The whole run")
    whole.set_xlabel("step")

    last, names = settings["steps"], ("fine-tune", "fine-tune, then PTQ", "QAT, then convert")
    zoom.plot([last, last], [rows[0]["heldout_loss"], rows[1]["heldout_loss"]], ":", color=_RED)
    shown = [row["heldout_loss"] for row in rows]
    heights = _spread(shown, curves)
    for loss, height, name, color in zip(shown, heights, names, (_BLUE, _RED, _GREEN), strict=True):
        zoom.plot(last, loss, marker="D", markersize=7, color=color, zorder=5)
        zoom.annotate(
            f"{name}\n{loss:.4f}",
            (last, loss),
            xytext=(last * 1.05, height),
            color=color,
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8},
        )
    zoom.set_xticks([tick for tick in zoom.get_xticks() if 0 <= tick <= last])
    zoom.set_xlim(-0.02 * last, last * 1.34)
    zoom.set_title(f"Fine-tuning, and {settings['format']} at its end")
    zoom.set_xlabel("fine-tuning step")
    for axes in (whole, zoom):
        axes.set_ylabel("held-out loss (nats per byte)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right" if axes is whole else "upper center")
    figure.suptitle(
        f"{settings['layers']} layers of {settings['dim']}, seed {settings['seed']}: "
        f"QAT against PTQ in {settings['format']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _xy(history: list[list[float]], offset: int = 0) -> tuple[list[float], list[float]]:
    return [step + offset for step, _ in history], [loss for _, loss in history]


def _spread(losses: list[float], curves: dict[str, Any]) -> list[float]:
    """Heights for the labels of ``losses``, at least a tenth of the panel apart."""
    visible = losses + [loss for name in ("finetune", "qat") for _, loss in curves[name]]
    apart = 0.11 * (max(visible) - min(visible) or 1.0)
    heights, floor = [0.0] * len(losses), -math.inf
    for index in sorted(range(len(losses)), key=losses.__getitem__):
        floor = heights[index] = max(losses[index], floor + apart)
    return heights


def describe_model(model: torch.nn.Module, settings: Settings) -> str:
    count = sum(p.numel() for p in model.parameters())
    return (
        f"{count / 1e6:.2f} M parameters: {settings.layers} layers of {settings.dim}, "
        f"MLP {settings.hidden}, heads of {settings.dim // settings.heads}, windows of {settings.seq} bytes"
    )
