"""The scripts that need transformers run on a CPU, in small: what they check of themselves passes there."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
ROOT = pathlib.Path(__file__).parents[2]


def output_of(*command):
    found = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return found.stdout


def test_every_script_finds_what_it_imports():
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    assert len(modules) > 15
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    output_of("-c", program, *modules)


def test_soak():
    """Repeats, resumes and skips, bit for bit; a step of each poison."""
    printed = output_of(
        "-m", "benchmarks.distributed.soak", "--tiny", "--device", "cpu", "--steps", 32
    )
    for name in ("a second run", "a run from a checkpoint", "a run without poison"):
        assert f"{name}: the same, bit for bit, to step 32" in printed
    assert "| 32 | 3 |" in printed  # steps, skipped


def test_ablation():
    """Whole models and blocks in every mode; times need a GPU."""
    printed = output_of(
        "-m", "benchmarks.models.ablation", "--tiny", "--device", "cpu", "--layers", 1
    )
    for name in ("gpt-oss-20b", "Qwen3-30B-A3B"):
        assert (
            f"{name}, 1 layers, MXLoRAExperts, 32 tokens: the same in today, no recorder" in printed
        )
    assert "Llama blocks, LoRA, 8 tokens: the same in today, unpack" in printed


def test_train_distributed():
    """FSDP2 over both ranks, experts split between them."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    options = ("--model", "tiny", "--device", "cpu", "--steps", 2, "--ep", 2)
    printed = output_of(*torchrun, "-m", "benchmarks.distributed.train_distributed", *options)
    row = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert (row["ranks"], row["ep"], row["tokens"]) == (2, 2, 128)
    assert row["all_gather_mb"] > 0 and row["all_to_all_mb"] > 0
