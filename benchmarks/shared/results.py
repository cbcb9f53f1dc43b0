"""Where results are: ``results/NAME-GPU.json``, or ``NAME.json`` of what needs no GPU. Imports no torch."""

from __future__ import annotations

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def path_of(name: str, gpu: str = "", folder: pathlib.Path | None = None) -> pathlib.Path:
    return (folder or RESULTS) / (f"{name}-{gpu}.json" if gpu else f"{name}.json")


def read(name: str, gpu: str = "h200") -> Row:
    """``{"meta": .., "rows": [..]}``."""
    return json.loads(path_of(name, gpu).read_text())


def write(path: pathlib.Path, meta: Row, rows: list[Row], **more: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "rows": rows, **more}, indent=1) + "\n")
