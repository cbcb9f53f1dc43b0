"""The demo: a full tiny run, stopping and going on, verification, and what it refuses."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from torchao_mx import MXTensor
from torchao_mx.demo import main
from torchao_mx.demo.data import load_corpus
from torchao_mx.demo.model import build_model, heldout_losses, token_losses
from torchao_mx.demo.quant import (
    FORMATS,
    convert_qat,
    prepare_qat,
    quantize_after_training,
    weight_bytes,
)
from torchao_mx.demo.settings import Settings, UsageError
from torchao_mx.demo.train import MasterAdam, learning_rate

TINY = ["--quick", "--dtype", "bf16", "--device", "cpu", "--pretrain-steps", "20", "--steps", "15"]


def tiny_settings(**changes: object) -> Settings:
    values = {"layers": 1, "dim": 32, "heads": 1, "seq": 32, "dtype": "bf16"}
    values |= {"device": "cpu", "threads": 1}
    return Settings(**{**values, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six files of made-up sentences."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(50)]
    for index in range(6):
        (folder / f"{index}.txt").write_text(" ".join(rng.choices(words, k=3000)))
    return folder


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    assert main([*TINY, "--data", str(text), "--out", str(out)]) == 0
    return out


def results_of(out: Path) -> dict[str, object]:
    return json.loads((out / "results.json").read_text())


class TestRun:
    def test_leaves_its_files(self, finished: Path) -> None:
        assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
        for name in ("checkpoint", "pretrained", "finetuned", "qat", "converted"):
            assert "settings" in torch.load(finished / f"{name}.pt", weights_only=True)
        assert not [p for p in finished.iterdir() if p.name.startswith(".")]

    def test_table(self, finished: Path) -> None:
        results = results_of(finished)
        high, ptq, qat = results["table"]
        curves = results["curves"]
        assert high["heldout_loss"] == curves["finetune"][-1][1]
        assert qat["heldout_loss"] == curves["qat"][-1][1], "converting changed the loss"
        assert curves["finetune"][0] == [0, curves["pretrain"][-1][1]]
        assert high["linear_bytes"] * 4.25 / 16 == ptq["linear_bytes"] == qat["linear_bytes"]
        assert high["bytes"] - ptq["bytes"] == high["linear_bytes"] - ptq["linear_bytes"]

    def test_the_checkpoint_holds_packed_weights(self, finished: Path) -> None:
        state = torch.load(finished / "converted.pt", weights_only=True)["model"]
        packed = {name for name, value in state.items() if isinstance(value, MXTensor)}
        linears = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
        assert packed == {f"blocks.{i}.{name}.weight" for i in range(2) for name in linears}

    def test_learns(self, finished: Path) -> None:
        curve = results_of(finished)["curves"]["pretrain"]
        # Untrained logits have unit variance, which costs half a nat over chance.
        assert curve[0][1] == pytest.approx(math.log(256) + 0.5, abs=0.15)
        assert curve[-1][1] < 4

    def test_resuming_a_finished_run_repeats_its_end(
        self, finished: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = results_of(finished)
        assert main(["--resume", str(finished)]) == 0
        assert results_of(finished)["table"] == before["table"]
        assert "2  QAT, then convert to mxfp4" in capsys.readouterr().out


class TestInterrupt:
    def test_resumed_equals_uninterrupted(
        self, text: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop_at(phase: str, step: int, how: object):
            def on_step(name: str, done: int) -> None:
                if (name, done) == (phase, step):
                    how()

            return on_step

        def raise_interrupt() -> None:
            raise KeyboardInterrupt

        def send_interrupt() -> None:
            signal.raise_signal(signal.SIGINT)

        out = str(tmp_path / "run")
        start = [*TINY, "--data", str(text), "--out", out]
        assert main(start, stop_at("pretrain", 7, raise_interrupt)) == 130
        assert f"--resume {out}" in capsys.readouterr().err
        assert main(["--resume", out], stop_at("finetune", 15, send_interrupt)) == 130
        assert main(["--resume", out], stop_at("qat", 13, send_interrupt)) == 130
        assert main(["--resume", out]) == 0
        whole, pieces = results_of(finished), results_of(Path(out))
        assert pieces["curves"] == whole["curves"]
        assert pieces["table"] == whole["table"]

    def test_an_unfinished_run_is_not_overwritten_by_accident(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(name: str, done: int) -> None:
            raise KeyboardInterrupt

        start = [*TINY, "--data", str(text), "--out", str(tmp_path)]
        assert main(start, stop) == 130
        assert main(start, stop) == 2
        assert "holds an unfinished run" in capsys.readouterr().err
        assert main([*start, "--overwrite"], stop) == 130

    def test_resume_refuses_other_text(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(name: str, done: int) -> None:
            raise KeyboardInterrupt

        copy = shutil.copytree(text, tmp_path / "text")
        out = tmp_path / "run"
        assert main([*TINY, "--data", str(copy), "--out", str(out)], stop) == 130
        (copy / "0.txt").write_text("something else")
        assert main(["--resume", str(out)]) == 1
        assert "is not the one this run was made with" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed equals uninterrupted, and the checkpoint verifies: the bits are the same again."""

    def stop(name: str, done: int) -> None:
        if (name, done) == ("qat", 7):
            raise KeyboardInterrupt

    start = [*TINY, "--device", "cuda", "--data", str(text)]
    assert main([*start, "--out", str(tmp_path / "whole")]) == 0
    assert main([*start, "--out", str(tmp_path / "pieces")], stop) == 130
    assert main(["--resume", str(tmp_path / "pieces")]) == 0
    whole, pieces = results_of(tmp_path / "whole"), results_of(tmp_path / "pieces")
    assert pieces["curves"] == whole["curves"]
    assert whole["table"][2]["heldout_loss"] == whole["curves"]["qat"][-1][1]


class TestVerify:
    def test_accepts_its_own(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--verify", str(finished / "converted.pt")]) == 0
        assert "equal to the recorded one" in capsys.readouterr().out

    def test_rejects_a_tampered_one(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = torch.load(finished / "converted.pt", weights_only=True)
        record["model"]["blocks.0.mlp.down.weight"].qdata[0] ^= 0x11
        torch.save(record, tmp_path / "tampered.pt")
        assert main(["--verify", str(tmp_path / "tampered.pt")]) == 1
        assert "is not the recorded" in capsys.readouterr().err

    def test_rejects_a_truncated_one(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = (finished / "converted.pt").read_bytes()
        (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
        assert main(["--verify", str(tmp_path / "half.pt")]) == 1
        assert "damaged or not a checkpoint" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["pretrained.pt", "checkpoint.pt"])
    def test_rejects_other_files(
        self, finished: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--verify", str(finished / name)]) == 1
        assert "not a converted checkpoint" in capsys.readouterr().err

    def test_rejects_weights_of_another_shape(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = torch.load(finished / "converted.pt", weights_only=True)
        record["settings"]["dim"] = 64
        torch.save(record, tmp_path / "other.pt")
        assert main(["--verify", str(tmp_path / "other.pt")]) == 1
        assert "do not fit its settings" in capsys.readouterr().err


class TestUsage:
    @pytest.fixture(autouse=True)
    def _elsewhere(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not where a run of the reader's own may lie in demo_runs."""
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--format", "int3"], "unknown format; choose one of mxfp4, mxfp8, w4a8, nvfp4"),
            (["--dim", "100"], "not a multiple of 32"),
            (["--dim", "64", "--heads", "3"], "must divide into heads"),
            (["--steps", "-5"], "--steps -5: must be at least 1"),
            (["--pretrain-steps", "0"], "--pretrain-steps 0: must be at least 1"),
            (["--threads", "-2"], "--threads -2: must be at least 1"),
            (["--batch", "two"], "invalid int value: 'two'"),
            (["--lr", "nan"], "must be a positive number"),
            (["--seed", "-1"], "--seed -1: must be from 0"),
            (["--dtype", "fp8"], "choose one of auto, bf16, fp32"),
            (["--device", "tpu"], "--device tpu: not a device"),
            (["--device", "meta"], "only cpu and cuda"),
            (["--data", "/nowhere/at/all"], "no such file or folder"),
            (["--resume", "/nowhere"], "--resume /nowhere: no such folder"),
            (["--resume", ".", "--steps", "3"], "--resume takes no --steps"),
            (["--verify", "x.pt", "--quick"], "--verify takes no --quick"),
            (["--colour"], "unrecognized arguments: --colour"),
        ],
    )
    def test_says_what_is_wrong(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err

    def test_too_little_text(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "short.txt").write_text("just a line\n")
        assert main(["--data", str(tmp_path / "short.txt"), "--dtype", "bf16"]) == 2
        assert "12 bytes of text are too few" in capsys.readouterr().err

    def test_no_text(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "blob").write_bytes(bytes(range(256)) * 99)
        assert main(["--data", str(tmp_path), "--dtype", "bf16"]) == 2
        assert "no UTF-8 text found" in capsys.readouterr().err

    def test_out_inside_data(self, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*TINY, "--data", str(text), "--out", str(text / "run")]) == 2
        assert "lies in --data" in capsys.readouterr().err
        assert not (text / "run").exists()

    def test_diverging(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lr = ["--pretrain-lr", "1e30", "--dtype", "fp32"]
        assert main([*TINY, *lr, "--data", str(text), "--out", str(tmp_path)]) == 1
        assert "start again with a lower" in capsys.readouterr().err

    def test_out_is_a_file(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        out = str(tmp_path / "file")
        assert main([*TINY, "--data", str(text), "--out", out]) == 2
        assert "cannot write there" in capsys.readouterr().err

    def test_resume_of_an_empty_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--resume", str(tmp_path)]) == 1
        assert "no such checkpoint" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--device", "cuda"]) == 2
        assert "sees no CUDA device" in capsys.readouterr().err

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        shown = capsys.readouterr().out
        assert "--resume DIR" in shown
        assert "(default mxfp4)" in shown
        assert max(map(len, shown.splitlines())) <= 100


class TestCorpus:
    def test_the_standard_library_by_default(self) -> None:
        corpus = load_corpus(None, 256)
        assert corpus.n_files > 100
        assert corpus.pretrain.numel() > 2 * corpus.finetune.numel() > 2 * corpus.heldout.numel()
        assert corpus.digest == load_corpus(None, 256).digest

    def test_parts_are_whole_files(self, text: Path) -> None:
        corpus = load_corpus(str(text), 32)
        parts = [bytes(p.tolist()) for p in (corpus.pretrain, corpus.finetune, corpus.heldout)]
        files = [p.read_bytes() for p in text.iterdir()]
        assert sum(map(len, parts)) == sum(map(len, files))
        assert all(sum(file in part for part in parts) <= 1 for file in files)

    def test_copies_and_hidden_files_are_left_out(self, text: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(text, tmp_path / "text")
        shutil.copy(copy / "0.txt", copy / "again.txt")
        (copy / ".hidden").write_text("not read " * 100)
        assert load_corpus(str(copy), 32).n_files == 6

    def test_batches_depend_on_seed_phase_and_step_alone(self, text: Path) -> None:
        corpus = load_corpus(str(text), 32)
        first = corpus.batch("finetune", 3, seed=0, batch=4, seq=32)
        torch.manual_seed(9)
        assert torch.equal(first, corpus.batch("finetune", 3, seed=0, batch=4, seq=32))
        for other in (("finetune", 4, 0), ("finetune", 3, 1), ("pretrain", 3, 0)):
            assert not torch.equal(first, corpus.batch(*other, batch=4, seq=32))

    def test_heldout_windows_do_not_overlap(self, text: Path) -> None:
        corpus = load_corpus(str(text), 32)
        windows = corpus.heldout_windows(10**9, 32)
        n = corpus.heldout.numel() // 33
        assert torch.equal(windows.flatten(), corpus.heldout[: n * 33].long())
        assert corpus.heldout_windows(20, 32).shape == (20, 33)

    def test_needs_text_for_the_windows(self, text: Path) -> None:
        with pytest.raises(UsageError, match="are too few"):
            load_corpus(str(text), 10_000)


class TestModel:
    def test_is_causal(self) -> None:
        model = build_model(tiny_settings(dtype="fp32"))
        tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[:, 20:] = 7
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20])

    @pytest.mark.parametrize("name", FORMATS)
    def test_converted_equals_fake_quantized(self, name: str, text: Path) -> None:
        settings = tiny_settings(format=name)
        windows = load_corpus(str(text), 32).heldout_windows(16, 32)
        model = build_model(settings)
        before, _ = weight_bytes(model)
        prepare_qat(model, name)
        optimizer = MasterAdam(model)
        for _ in range(2):
            token_losses(model, windows).mean().backward()
            optimizer.step(1e-2)
        trained = heldout_losses(model, windows, 8)
        reloaded = build_model(settings)
        quantize_after_training(reloaded, name)
        convert_qat(model, name)
        reloaded.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(trained, heldout_losses(reloaded, windows, 8))
        assert weight_bytes(reloaded)[0] < before

    def test_small_updates_add_up_in_bf16(self) -> None:
        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        torch.nn.init.ones_(model.weight)
        optimizer = MasterAdam(model)
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step(1e-4)  # a 78th of the distance from 1 to the next bf16 below, a step
        assert model.weight.item() == pytest.approx(0.99, abs=2e-3)

    def test_learning_rate(self) -> None:
        rates = [learning_rate(step, 100, 1.0, 0.0) for step in range(101)]
        assert rates[4] == max(rates) == 1.0
        assert rates[100] == pytest.approx(0.0, abs=1e-12)
