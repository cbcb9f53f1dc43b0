"""What a run found: the table, and the picture of its curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GREY, BLUE, RED, GREEN = "#8a8a8a", "#2a6fbb", "#c8372d", "#2e8b57"


@dataclass
class Endpoint:
    """A finished model: the mean loss of each held-out window, and bytes of its weights by name."""

    losses: torch.Tensor
    sizes: dict[str, int]


def table_rows(arms: dict[str, Endpoint]) -> list[dict[str, Any]]:
    """A row for each arm, by its title.

    ``gap`` is to the first one on the same windows, ``gap_error`` its standard error.
    """
    reference = next(iter(arms.values())).losses
    rows = []
    for title, end in arms.items():
        loss = end.losses.mean().item()
        gap, gap_error = difference(end.losses, reference)
        rows.append(
            {
                "arm": title,
                "heldout_loss": loss,
                "perplexity": math.exp(loss),
                "gap": gap,
                "gap_error": gap_error,
                **end.sizes,
            }
        )
    return rows


def difference(losses: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """The mean of the losses' differences, window by window, and its standard error."""
    gap = losses - others
    return gap.mean().item(), (gap.std() / math.sqrt(len(gap))).item()


def format_rows(rows: list[dict[str, Any]], sizes: dict[str, str]) -> list[str]:
    """The table's lines; ``sizes`` are the headings of the columns of bytes."""
    width = max(len(row["arm"]) for row in rows)
    head = (
        f"{'':{width}}  {'held-out loss':>13}  {'perplexity':>10}  {'gap to arm 0':>18}"
    ) + "".join(f"  {heading:>12}" for heading in sizes.values())
    lines = [head, "-" * len(head)]
    for row in rows:
        gap = f"{row['gap']:+.4f} ± {row['gap_error']:.4f}" if row is not rows[0] else ""
        line = f"{row['arm']:{width}}  {row['heldout_loss']:>13.4f}  {row['perplexity']:>10.4f}  {gap:>18}"
        lines.append(line + "".join(f"  {row[size]:>10,} B" for size in sizes))
    return lines


def plot(
    results: dict[str, Any],
    path: Path,
    arms: Sequence[tuple[str, str, str]],
    ends: Sequence[tuple[str, str]],
    title: str,
    zoom_title: str,
) -> None:
    """Two panels: the whole run, and the fine-tuning with its endpoints.

    Args:
        results: what ``results.json`` holds.
        path: of the PNG.
        arms: curve, label and color of each phase after pretraining.
        ends: label and color of each row of the table.
        title: of the figure.
        zoom_title: of the second panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings, curves, rows = results["settings"], results["curves"], results["table"]
    figure, (whole, zoom) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1, 1.5))

    whole.plot(*_xy(curves["pretrain"]), color=GREY, label="pretraining")
    for name, label, color in arms:
        whole.plot(*_xy(curves[name], settings["pretrain_steps"]), color=color, label=label)
        zoom.plot(*_xy(curves[name]), color=color, marker="o", markersize=3, label=label)
    whole.set_title("The whole run")
    whole.set_xlabel("step")

    last = settings["steps"]
    shown = [row["heldout_loss"] for row in rows]
    zoom.plot([last, last], shown[:2], ":", color=RED)
    visible = shown + [loss for name, _, _ in arms for _, loss in curves[name]]
    heights = _spread(shown, max(visible) - min(visible))
    for loss, height, (name, color) in zip(shown, heights, ends, strict=True):
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
    zoom.set_title(zoom_title)
    zoom.set_xlabel("fine-tuning step")
    for axes in (whole, zoom):
        axes.set_ylabel("held-out loss (nats per byte)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right" if axes is whole else "upper center")
    figure.suptitle(
        f"{settings['layers']} layers of {settings['dim']}, seed {settings['seed']}: {title}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _xy(history: list[list[float]], offset: int = 0) -> tuple[list[float], list[float]]:
    return [step + offset for step, _ in history], [loss for _, loss in history]


def _spread(losses: list[float], span: float) -> list[float]:
    """Heights for the labels of ``losses``, at least a tenth of the panel's ``span`` apart."""
    apart = 0.11 * (span or 1.0)
    heights, floor = [0.0] * len(losses), -math.inf
    for index in sorted(range(len(losses)), key=losses.__getitem__):
        floor = heights[index] = max(losses[index], floor + apart)
    return heights
