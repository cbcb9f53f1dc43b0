"""What ``quality.py`` found: the comparison of the three arms, a verdict, the table and the picture."""

from __future__ import annotations

import itertools
import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shared import harness
from torchao_mx.demo.report import BLUE, GREEN, RED, difference

NAMES = {"mxfp4-weight-only": "MXFP4 weights", "w4a8": "W4A8", "mxfp4": "W4A4"}
BF16 = "bf16"
ARMS = {"0": "bf16 fine-tune", "1": "PTQ", "2": "QAT, converted"}
CLEAR = 2.0  # standard errors, over windows, by which two losses are told apart
ORDER = "(0) >= (2) > (1)"


@dataclass
class Comparison:
    """The three arms of a model in a format; of each seed the losses of the held-out windows, ``[W]``."""

    model: str
    format: str
    bf16: Sequence[torch.Tensor]
    ptq: Sequence[torch.Tensor]
    qat: Sequence[torch.Tensor]

    @classmethod
    def of(cls, model: str, fmt: str, seeds: list[dict[str, Any]]) -> Comparison:
        """From what ``quality.Unit`` records of the phases of each seed."""
        phase_and_arm = ((BF16, BF16), (BF16, fmt), (fmt, fmt))
        losses = [
            [torch.tensor(s[phase]["losses"][arm], dtype=torch.float64) for s in seeds]
            for phase, arm in phase_and_arm
        ]
        return cls(model, fmt, *losses)

    def row(self, arm: str) -> harness.Row:
        losses = {"0": self.bf16, "1": self.ptq, "2": self.qat}[arm]
        means = [seed.mean().item() for seed in losses]
        row = dict(
            model=self.model, format=None if arm == "0" else self.format, arm=f"{arm}  {ARMS[arm]}",
            loss=statistics.mean(means), loss_std=_std(means), losses=means,
        )  # fmt: skip
        if arm != "0":
            gaps, errors = _differences(losses, self.bf16)
            row |= dict(gap=statistics.mean(gaps), gap_std=_std(gaps), gaps=gaps, gap_errors=errors)
        return row

    def verdict(self) -> harness.Row:
        """Whether quality is (0) >= (2) > (1), ``holds``, with the figures and the reasons in ``text``.

        (2) > (1): QAT's loss is lower in every seed, by more than two standard errors. (0) >= (2): in no
        seed is it lower than bf16's by as much.
        """
        costs, _ = _differences(self.ptq, self.bf16)
        gaps, gap_errors = _differences(self.qat, self.bf16)
        gains, gain_errors = _differences(self.ptq, self.qat)
        not_ahead = [i for i in range(len(gains)) if not gains[i] > CLEAR * gain_errors[i]]
        too_good = [i for i in range(len(gaps)) if gaps[i] < -CLEAR * gap_errors[i]]
        reasons = []
        if not_ahead:
            reasons.append(f"QAT is not clearly ahead of PTQ in {_listed(not_ahead)}")
        if too_good:
            reasons.append(f"QAT is clearly ahead of bf16 in {_listed(too_good)}")
        text = (
            f"{self.model}, {NAMES[self.format]}: PTQ costs {_spread(costs)}, QAT {_spread(gaps)}; "
            f"PTQ - QAT = {_spread(gains)}. {ORDER} "
        )
        if reasons:
            text += f"DOES NOT HOLD: {'; '.join(reasons)}."
        else:
            text += f"holds; QAT recovers {sum(gains) / sum(costs):.0%} of the cost."
        return dict(model=self.model, format=self.format, holds=not reasons, text=text)


def _differences(
    losses: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Of each seed the mean difference, windows paired, and its standard error."""
    gaps = [difference(a, b) for a, b in zip(losses, others, strict=True)]
    return [gap for gap, _ in gaps], [error for _, error in gaps]


def _std(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _spread(values: list[float], sign: str = "+") -> str:
    std = _std(values)
    return f"{statistics.mean(values):{sign}.4f}" + ("" if std is None else f" ± {std:.4f}")


def _listed(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def rows_of(comparisons: list[Comparison]) -> list[harness.Row]:
    """Arm 0 of each model, then the others in each format."""
    rows = []
    for _, of_model in itertools.groupby(comparisons, lambda c: c.model):
        group = list(of_model)
        rows.append(group[0].row("0"))
        rows += [comparison.row(arm) for comparison in group for arm in "12"]
    return rows


def table(rows: list[harness.Row]) -> str:
    shown = []
    for row in rows:
        cells = dict(model=row["model"], arm=row["arm"], seeds=len(row["losses"]))
        cells["loss"] = _spread(row["losses"], "")
        if row["format"] is not None:
            cells |= dict(
                format=NAMES[row["format"]], gap=_spread(row["gaps"]), error=f"{max(row['gap_errors']):.4f}"
            )  # fmt: skip
        shown.append(cells)
    columns = dict(
        model="model", format="format", arm="arm", loss="held-out loss, nats a byte", gap="over arm 0",
        error="its standard error over windows, the largest", seeds="seeds",
    )  # fmt: skip
    return harness.markdown(shown, columns)


def plot(comparisons: list[Comparison], path: pathlib.Path, title: str) -> None:
    """A panel for each model: the gaps of arms 1 and 2 to arm 0 in each format."""
    plt = harness.pyplot()

    models = list(dict.fromkeys(c.model for c in comparisons))
    figure, panels = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for ax, model in zip(panels[0], models, strict=True):
        group = [c for c in comparisons if c.model == model]
        base = _spread(group[0].row("0")["losses"], "")
        ax.axhline(0.0, color=BLUE, label=f"0  {ARMS['0']}: {base}")
        for arm, offset, color in (("1", -0.12, RED), ("2", 0.12, GREEN)):
            rows = [c.row(arm) for c in group]
            at = [x + offset for x in range(len(rows))]
            gaps, stds = [row["gap"] for row in rows], [row["gap_std"] or 0.0 for row in rows]
            ax.errorbar(at, gaps, yerr=stds, fmt="D", capsize=5, color=color, label=rows[0]["arm"])
            for x, row in zip(at, rows, strict=True):
                ax.plot([x + 0.06] * len(row["gaps"]), row["gaps"], ".", color=color, alpha=0.6)
        ax.set_xticks(range(len(group)), [NAMES[c.format] for c in group])
        ax.set_xlim(-0.5, len(group) - 0.5)
        ax.set_ylabel("held-out loss over arm 0's, nats a byte")
        ax.set_title(model)
        ax.grid(alpha=0.3, axis="y")
        ax.legend()
    harness.save_figure(
        figure, path, f"{title}: mean and standard deviation over seeds, and each seed"
    )
