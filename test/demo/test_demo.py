"""The demo: a full tiny run, stopping and going on, what it checks and what it refuses."""

from __future__ import annotations

import contextlib
import io
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _demo import results_of, stop_after
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import MXTensor
from torchao_mx.demo import qat
from torchao_mx.demo.cli import main
from torchao_mx.demo.data import load_corpus
from torchao_mx.demo.model import build_model, heldout_losses, token_losses
from torchao_mx.demo.quant import FORMATS, is_quantized_linear
from torchao_mx.demo.settings import DemoError, Settings

TINY = ["--quick", "--device", "cpu", "--pretrain-steps", "20", "--steps", "15"]
SETTINGS = Settings(layers=1, dim=32, seq=32, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """A run sets them for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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
def finished_and_shown(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nothing interrupted, and what it printed."""
    out, shown = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main([*TINY, "--data", str(text), "--out", str(out)]) == 0
    return out, shown.getvalue()


@pytest.fixture
def finished(finished_and_shown: tuple[Path, str]) -> Path:
    return finished_and_shown[0]


@pytest.fixture
def shown(finished_and_shown: tuple[Path, str]) -> str:
    return finished_and_shown[1]


class TestRun:
    def test_leaves_its_files(self, finished: Path) -> None:
        assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
        names = {path.name for path in finished.iterdir()}
        assert names == {"settings.json", "results.json", "curves.png", "converted.pt"}

    def test_table(self, finished: Path) -> None:
        results = results_of(finished)
        high, ptq, qat = results["table"]
        curves = results["curves"]
        assert high["heldout_loss"] == curves["finetune"][-1][1]
        assert qat["heldout_loss"] == curves["qat"][-1][1], "converting changed the loss"
        assert curves["finetune"][0] == [0, curves["pretrain"][-1][1]]
        assert high["linear_bytes"] * 4.25 / 32 == ptq["linear_bytes"] == qat["linear_bytes"]

    def test_the_checkpoint_holds_packed_weights(self, finished: Path) -> None:
        state = torch.load(finished / "converted.pt", weights_only=True)
        packed = {name for name, value in state.items() if isinstance(value, MXTensor)}
        linears = ("qkv", "out", "mlp.gate_up", "mlp.down")
        assert packed == {f"blocks.{i}.{name}.weight" for i in range(2) for name in linears}

    def test_learns(self, finished: Path) -> None:
        curve = results_of(finished)["curves"]["pretrain"]
        # Untrained logits have unit variance, which costs half a nat over chance.
        assert curve[0][1] == pytest.approx(math.log(256) + 0.5, abs=0.15)
        assert curve[-1][1] < 4

    def test_says_what_comes_next(self, shown: str) -> None:
        assert "2  QAT, then convert to mxfp4" in shown
        assert "In a fresh process: converted.pt has held-out loss " in shown
        assert 'quantize_(model, QATConfig(mxfp4, step="convert"), filter_fn=is_experts)' in shown
        assert shown.rstrip().endswith("vllm serve tuned")


class TestInterrupt:
    def test_resumed_equals_uninterrupted(
        self,
        text: Path,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        start = [*TINY, "--data", str(text), "--out", str(tmp_path)]
        for steps in (
            17,
            10 + 5,
            15 + 13,
        ):  # in pretraining, in arm 0, in arm 2; saved each 10 steps
            with monkeypatch.context() as ctrl_c:
                stop_after(steps, ctrl_c)
                assert main(start) == 130
            assert "the same command goes on from there" in capsys.readouterr().err
        assert main(start) == 0
        assert "arm 2, QAT for mxfp4: 15 steps, from 10" in capsys.readouterr().out
        whole, pieces = results_of(finished), results_of(tmp_path)
        assert pieces["curves"] == whole["curves"]
        assert pieces["table"] == whole["table"]

    @pytest.mark.parametrize("change", ["text", "options"])
    def test_an_unfinished_run_is_not_mixed_with_another(
        self,
        change: str,
        text: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        copy = shutil.copytree(text, tmp_path / "text")
        start = [*TINY, "--data", str(copy), "--out", str(tmp_path / "run")]
        stop_after(12, monkeypatch)
        assert main(start) == 130
        if change == "text":
            (copy / "0.txt").write_text("something else")
        else:
            start += ["--seed", "1"]
        assert main(start) == 1
        assert "holds an unfinished run of other options or text" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed equals uninterrupted, and the checkpoint verifies: the bits are the same again."""
    start = [*TINY, "--device", "cuda", "--data", str(text)]
    try:
        assert main([*start, "--out", str(tmp_path / "whole")]) == 0
        with monkeypatch.context() as ctrl_c:
            stop_after(20 + 15 + 12, ctrl_c)
            assert main([*start, "--out", str(tmp_path / "pieces")]) == 130
        assert main([*start, "--out", str(tmp_path / "pieces")]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    whole, pieces = results_of(tmp_path / "whole"), results_of(tmp_path / "pieces")
    assert pieces["curves"] == whole["curves"]
    assert whole["table"][2]["heldout_loss"] == whole["curves"]["qat"][-1][1]


class TestVerify:
    def verify(self, out: Path) -> str:
        results = results_of(out)
        losses = [row["heldout_loss"] for row in results["table"]]
        return qat.verify(Settings(**results["settings"]), out, losses)

    def test_accepts_its_own(self, finished: Path) -> None:
        assert "to the last bit" in self.verify(finished)

    def test_rejects_a_tampered_one(self, finished: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(finished, tmp_path / "copy")
        state = torch.load(copy / "converted.pt", weights_only=True)
        state["blocks.0.mlp.down.weight"].qdata[0] ^= 0x11
        torch.save(state, copy / "converted.pt")
        with pytest.raises(DemoError, match="is not that of arm 2"):
            self.verify(copy)


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
            (["--format", "int3"], "invalid choice: 'int3' (choose from"),
            (["--dim", "100"], "not a multiple of 32"),
            (["--dim", "64", "--heads", "3"], "must divide into heads"),
            (["--steps", "-5"], "--steps: -5: must be at least 1"),
            (["--pretrain-steps", "0"], "--pretrain-steps: 0: must be at least 1"),
            (["--threads", "-2"], "--threads: -2: must be at least 1"),
            (["--batch", "two"], "invalid _count value: 'two'"),
            (["--device", "tpu"], "--device: tpu: "),
            (["--data", "/nowhere/at/all"], "no such file or folder"),
            (["--rank", "8"], "--method qat takes no --rank"),
            (["--colour"], "unrecognized arguments: --colour"),
        ],
    )
    def test_says_what_is_wrong(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err

    def test_too_little_text(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "short.txt").write_text("just a line\n")
        assert main(["--data", str(tmp_path / "short.txt")]) == 1
        assert "12 bytes of text are too few" in capsys.readouterr().err

    def test_no_text(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "blob").write_bytes(bytes(range(256)) * 99)
        assert main(["--data", str(tmp_path)]) == 1
        assert "no UTF-8 text found" in capsys.readouterr().err

    def test_out_inside_data(self, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main([*TINY, "--data", str(text), "--out", str(text / "run")])
        assert "lies in --data" in capsys.readouterr().err
        assert not (text / "run").exists()

    def test_diverging(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lr = ["--pretrain-lr", "1e30"]
        assert main([*TINY, *lr, "--data", str(text), "--out", str(tmp_path)]) == 1
        assert "give a lower --lr" in capsys.readouterr().err

    def test_out_is_a_file(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        out = str(tmp_path / "file")
        assert main([*TINY, "--data", str(text), "--out", out]) == 1
        assert f"File exists: '{out}'" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["--device", "cuda"])
        assert "argument --device: cuda: " in capsys.readouterr().err

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        shown = capsys.readouterr().out
        assert "--out OUT" in shown
        assert "(default: mxfp4)" in shown
        assert max(map(len, shown.splitlines())) <= 110


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
        with pytest.raises(DemoError, match="are too few"):
            load_corpus(str(text), 10_000)


class TestModel:
    def test_is_causal(self) -> None:
        model = build_model(SETTINGS)
        tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[:, 20:] = 7
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("name", FORMATS)
    def test_converted_equals_fake_quantized(
        self, name: str, dtype: torch.dtype, text: Path
    ) -> None:
        settings, config = replace(SETTINGS, format=name), FORMATS[name]
        windows = load_corpus(str(text), 32).heldout_windows(16, 32)
        model = build_model(settings).to(dtype)
        quantize_(model, QATConfig(config, step="prepare"), filter_fn=is_quantized_linear)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(2):
            token_losses(model, windows).mean().backward()
            optimizer.step()
        trained = heldout_losses(model, windows, 8)
        reloaded = build_model(settings).to(dtype)
        quantize_(reloaded, config, filter_fn=is_quantized_linear)
        quantize_(model, QATConfig(config, step="convert"), filter_fn=is_quantized_linear)
        reloaded.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(trained, heldout_losses(reloaded, windows, 8))
