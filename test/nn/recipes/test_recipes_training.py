"""benchmarks/quality/train_recipes.py, small and on the CPU: it runs to the end, and resumes without a trace."""

import json
import sys

import pytest

ARMS = ("--arm", "bf16", "--arm", "recipe-stochastic")


@pytest.fixture
def script(monkeypatch):
    """``main`` with arguments."""
    from benchmarks.quality import train_recipes as module

    def main(state, *args):
        command = [
            "train_recipes.py",
            "--tiny",
            "--steps",
            "6",
            "--state",
            str(state),
            *ARMS,
            *args,
        ]
        monkeypatch.setattr(sys, "argv", command)
        module.main()

    return main


def results(state):
    """Of a complete run, times left out."""
    rows = json.loads((state / "train_recipes.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("step_ms", "minutes")} for row in rows]


def test_runs_stops_and_goes_on(script, tmp_path, capsys):
    script(tmp_path / "whole")
    assert "| the same, dY rounded stochastically |" in capsys.readouterr().out
    rows = results(tmp_path / "whole")
    assert rows[0]["ratio"] == 1 and 0.9 < rows[1]["ratio"] < 1.1
    assert rows[1]["final"] == rows[1]["final_nvfp4"] and rows[0]["final"] != rows[0]["final_nvfp4"]
    for row in rows:
        assert len(row["losses"]) == 6 and row["losses"][-1] < row["losses"][0]
        assert [step for step, _ in row["heldout"]] == [0, 5, 6]
    assert (tmp_path / "whole" / "train_recipes.png").stat().st_size > 10_000
    for _ in range(12):  # a step at a time, of two arms
        with pytest.raises(SystemExit, match="the same command goes on from there"):
            script(tmp_path / "parts", "--minutes", "0")
    script(tmp_path / "parts", "--minutes", "0")
    assert results(tmp_path / "parts") == rows
    with pytest.raises(SystemExit, match="of other settings or text"):
        script(tmp_path / "parts", "--seed", "1")
