"""benchmarks/quality/quality.py in small, on the CPU: its gates, its verdicts, and that it stops and goes on."""

import copy
import json
import os
import signal
import sys

import pytest
import torch
from torchao.quantization import quantize_

from torchao_mx import MXWeightOnlyConfig

ARGS = ("--tiny", "--model", "moe", "--format", "mxfp4", "--pretrain-steps", "3", "--steps", "2")


@pytest.fixture
def quality(monkeypatch):
    """The module, reading its text once."""
    from benchmarks.quality import quality as module

    texts, load = {}, module.load_adaptation_corpus

    def load_once(*key):
        if key not in texts:
            texts[key] = load(*key)
        return texts[key]

    monkeypatch.setattr(module, "load_adaptation_corpus", load_once)
    return module


@pytest.fixture
def script(quality, monkeypatch):
    """``main`` with arguments."""

    def main(state, *args):
        command = ["quality.py", "--state", str(state), "--seeds", "1", *ARGS, *args]
        monkeypatch.setattr(sys, "argv", command)
        quality.main()

    return main


def phases(state):
    """What a complete run recorded, times left out."""
    record = json.loads((state / "moe-seed0.json").read_text())
    return {name: phase | {"seconds": None} for name, phase in record["phases"].items()}


def test_runs_stops_and_goes_on(quality, script, tmp_path, capsys, monkeypatch):
    script(tmp_path / "whole")
    out = capsys.readouterr().out
    assert "| moe | W4A4 | 2  QAT, converted |" in out and "moe, W4A4: PTQ costs +" in out
    found = json.loads((tmp_path / "whole" / "quality.json").read_text())
    rows = found["rows"]
    assert [row["arm"][0] for row in rows] == ["0", "1", "2"]
    assert len({row["loss"] for row in rows}) == 3
    assert rows[1]["gap"] == pytest.approx(rows[1]["loss"] - rows[0]["loss"], rel=1e-9)
    assert [v["format"] for v in found["meta"]["verdicts"]] == ["mxfp4"]
    assert (tmp_path / "whole" / "quality.png").stat().st_size > 10_000

    draw = quality.HashedCorpus.batch

    def interrupted(corpus, *which):
        os.kill(os.getpid(), signal.SIGINT)
        return draw(corpus, *which)

    again = pytest.raises(SystemExit, match="the same command goes on from there")
    with monkeypatch.context() as ctrl_c:
        ctrl_c.setattr(quality.HashedCorpus, "batch", interrupted)
        for _ in range(3):
            with again:
                script(tmp_path / "parts")
    for _ in range(4):  # a step at a time, of two arms
        with again:
            script(tmp_path / "parts", "--minutes", "0")
    script(tmp_path / "parts", "--minutes", "0")
    assert phases(tmp_path / "parts") == phases(tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "quality.json").read_text())["rows"] == rows
    assert not list((tmp_path / "parts").glob("*unfinished*"))
    with pytest.raises(SystemExit, match="of other settings or text"):
        script(tmp_path / "parts", "--batch", "3")


def test_arms_must_have_seen_the_same(script, tmp_path):
    script(tmp_path)
    path = tmp_path / "moe-seed0.json"
    for what in ("start", "batches"):
        record = json.loads(path.read_text())
        record["phases"]["mxfp4"][what] = "another"
        path.with_name("other").mkdir(exist_ok=True)
        (path.with_name("other") / path.name).write_text(json.dumps(record))
        with pytest.raises(SystemExit, match="first weights and batches"):
            script(path.with_name("other"))


def test_tells_logits_apart(quality):
    model = quality.build(
        quality.replace(quality.MODELS["moe"], **quality.TINY, **quality.TINY_EXPERTS)
    )
    windows = torch.randint(256, (3, 17))
    other = copy.deepcopy(model)
    assert quality.has_same_logits(model, other, windows, 2)
    quantize_(other, MXWeightOnlyConfig(), filter_fn=quality.is_quantized)
    kinds = [type(p).__name__ for n, p in other.named_parameters() if p.ndim > 1 and "blocks" in n]
    assert kinds.count("MXTensor") == 4 and kinds.count("Parameter") == 1  # all but the router
    assert not quality.has_same_logits(model, other, windows, 2)


def test_balance_loss_and_its_gradient(quality):
    from benchmarks.quality.model import _AddLoss, balance_loss

    even = torch.full((4, 2), 0.5)
    assert balance_loss(even, torch.tensor([[0], [1], [0], [1]])) == 1
    uneven = torch.tensor([[0.75, 0.25]] * 4)
    assert balance_loss(uneven, torch.zeros(4, 1, dtype=torch.int64)) == 1.5
    x, loss = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    _AddLoss.apply(x, 3 * loss).sum().backward()
    assert torch.equal(x.grad, torch.ones(3)) and loss.grad == 3


@pytest.mark.parametrize(
    ("ptq", "qat", "holds", "reason"),
    [
        ([0.2, 0.3], [0.1, 0.1], True, "holds; QAT recovers 60% of the cost"),
        ([0.2, 0.1], [0.1, 0.1], False, "not clearly ahead of PTQ in seed 1."),
        ([0.1, 0.1], [0.2, 0.2], False, "not clearly ahead of PTQ in seeds 0, 1."),
        ([0.2, 0.2], [0.1, -0.1], False, "clearly ahead of bf16 in seed 1."),
        ([0.2, 0.2], [0.1, -0.001], True, "holds"),
        ([0.2, 0.001], [0.1, 0.0], False, "not clearly ahead of PTQ in seed 1."),
    ],
)
def test_verdicts(quality, ptq, qat, holds, reason):
    g = torch.Generator().manual_seed(0)

    base = torch.rand(64, generator=g, dtype=torch.float64)
    losses = []
    for gaps in ([0.0, 0.0], ptq, qat):
        noise = 0.02 * torch.randn(2, 64, generator=g, dtype=torch.float64)
        noise -= noise.mean(1, keepdim=True)
        losses.append([base + gap + n for gap, n in zip(gaps, noise, strict=True)])
    verdict = quality.Comparison("dense", "w4a8", *losses).verdict()
    assert verdict["holds"] is holds and reason in verdict["text"]
    assert ("DOES NOT HOLD" in verdict["text"]) is not holds


class TestTrainLoop:
    @pytest.fixture
    def train_loop(self, quality):
        return quality.train_loop

    def test_small_updates_add_up_in_bf16(self, train_loop) -> None:
        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        torch.nn.init.ones_(model.weight)
        optimizer = train_loop.MasterAdam(model)
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step(1e-4)  # a 78th of the distance from 1 to the next bf16 below, a step
        assert model.weight.item() == pytest.approx(0.99, abs=2e-3)

    def test_learning_rate(self, train_loop) -> None:
        rates = [train_loop.learning_rate(step, 100, 1.0, 0.0) for step in range(101)]
        assert rates[4] == max(rates) == 1.0
        assert rates[100] == pytest.approx(0.0, abs=1e-12)
