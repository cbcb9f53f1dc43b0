"""What a run found: the table, and the picture of its curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

GREY, BLUE, RED, GREEN = "#8a8a8a", "#2a6fbb", "#c8372d", "#2e8b57"


#: A title, the losses of the held-out windows, and sizes in bytes.
Arm = tuple[str, torch.Tensor, dict[str, int]]


def table_rows(arms: list[Arm]) -> list[dict[str, Any]]:
    """A row for each arm; ``gap`` is to the first on the same windows, ``gap_error`` its standard error."""
    rows = []
    for title, losses, sizes in arms:
        loss, (gap, error) = losses.mean().item(), difference(losses, arms[0][1])
        figures = {"heldout_loss": loss, "perplexity": math.exp(loss)}
        rows.append({"arm": title, **figures, "gap": gap, "gap_error": error, **sizes})
    return rows


def difference(losses: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """The mean of the losses' differences, window by window, and its standard error."""
    gap = losses - others
    return gap.mean().item(), (gap.std() / math.sqrt(len(gap))).item()


def format_rows(rows: list[dict[str, Any]], sizes: dict[str, str]) -> str:
    """The table; ``sizes`` are the headings of the columns of bytes."""
    width = max(len(row["arm"]) for row in rows)
    head = f"{'':{width}}  {'held-out loss':>13}  {'perplexity':>10}  {'gap to arm 0':>18}"
    head += "".join(f"  {heading:>12}" for heading in sizes.values())
    lines = [head, "-" * len(head)]
    for row in rows:
        gap = f"{row['gap']:+.4f} ± {row['gap_error']:.4f}" if row is not rows[0] else ""
        line = f"{row['arm']:{width}}  {row['heldout_loss']:>13.4f}  {row['perplexity']:>10.4f}  {gap:>18}"
        lines.append(line + "".join(f"  {row[size]:>10,} B" for size in sizes))
    return "\n".join(lines)


def plot(
    out: Path,
    results: dict[str, Any],
    curves: Sequence[tuple[str, str, str]],
    ends: Sequence[tuple[str, str]],
    title: str,
) -> None:
    """Draw ``curves.png``: the whole run, and beside it the fine-tuning with its endpoints.

    ``curves`` are name, label and color of each phase after pretraining, ``ends`` label and color of
    each row of the table.
    """
    settings, histories = results["settings"], results["curves"]
    figure = Figure(figsize=(12, 4.8), layout="tight")
    whole, zoom = figure.subplots(1, 2, width_ratios=(1, 1.5))
    whole.plot(*zip(*histories["pretrain"], strict=True), color=GREY, label="pretraining")
    for (name, label, color), style in zip(curves, ("-", "--"), strict=True):
        steps, losses = zip(*histories[name], strict=True)
        later = [settings["pretrain_steps"] + step for step in steps]
        whole.plot(later, losses, style, color=color, label=label)
        zoom.plot(steps, losses, style, color=color, marker=".", label=label)
    for row, (label, color) in zip(results["table"], ends, strict=True):
        loss = row["heldout_loss"]
        zoom.plot(settings["steps"], loss, "D", color=color, label=f"{label}: {loss:.4f}")
    whole.set(title="The whole run", xlabel="step")
    zoom.set(title="Fine-tuning, and where it ends", xlabel="fine-tuning step")
    for axes in (whole, zoom):
        axes.set_ylabel("held-out loss (nats per byte)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out / "curves.png", dpi=150)
