"""What the scripts that train share: when to stop, and where results go."""

from __future__ import annotations

import json
import pathlib
import time

from benchmarks.shared import harness


class Deadline:
    """Seconds after which a run stops between two steps; None for never."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def __bool__(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def save_results(
    name: str, rows: list[harness.Row], meta: harness.Row, folder: pathlib.Path | None
) -> pathlib.Path:
    """Write the JSON, in results/ if no ``folder`` is given; returns where the PNG belongs."""
    if folder is None:
        return harness.save(name, meta, rows)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    return path.with_suffix(".png")
