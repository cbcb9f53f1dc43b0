"""The scripts that need transformers run on a CPU, in small: what they check of themselves passes there."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def output_of(*command):
    found = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return found.stdout


def test_every_script_finds_what_it_imports():
    scripts = sorted(BENCHMARKS.rglob("*.py"))
    assert len(scripts) > 15
    program = "import runpy, sys\nsys.path[:0] = sys.argv[1:2]\nfor path in sys.argv[2:]: runpy.run_path(path)"
    output_of("-c", program, BENCHMARKS, *scripts)


def test_soak():
    """Repeats, resumes and skips, bit for bit; a step of each poison."""
    printed = output_of(BENCHMARKS / "soak.py", "--tiny", "--device", "cpu", "--steps", 32)
    for name in ("a second run", "a run from a checkpoint", "a run without poison"):
        assert f"{name}: the same, bit for bit, to step 32" in printed
    assert "| 32 | 3 |" in printed  # steps, skipped


def test_train_distributed():
    """FSDP2 over both ranks, experts split between them."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    options = ("--model", "tiny", "--device", "cpu", "--steps", 2, "--ep", 2)
    printed = output_of(*torchrun, BENCHMARKS / "train_distributed.py", *options)
    row = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert (row["ranks"], row["ep"], row["tokens"]) == (2, 2, 128)
    assert row["all_gather_mb"] > 0 and row["all_to_all_mb"] > 0
