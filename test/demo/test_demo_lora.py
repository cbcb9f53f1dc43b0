"""``--method lora`` of the demo: a full tiny run, stopping and going on, verification, what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
from safetensors.torch import load_file, save_file  # noqa: E402

from torchao_mx.demo import main  # noqa: E402
from torchao_mx.demo.data import load_adaptation_corpus, load_corpus  # noqa: E402

V5 = int(transformers.__version__.split(".")[0]) >= 5
v5_only = pytest.mark.skipif(not V5, reason="--method lora needs transformers 5")
METHOD = ["--method", "lora"]
TINY = [*METHOD, "--quick", "--dtype", "fp32", "--device", "cpu", "--experts", "4", "--steps", "12"]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of made-up sentences."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(50)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(rng.choices(words, k=6000)))
    return file


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    assert main([*TINY, "--data", str(text), "--out", str(out)]) == 0
    return out


def results_of(out: Path) -> dict[str, object]:
    return json.loads((out / "results.json").read_text())


@v5_only
class TestRun:
    def test_leaves_its_files(self, finished: Path) -> None:
        assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
        config = json.loads((finished / "model" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "mxfp4"
        names = load_file(finished / "model" / "model.safetensors")
        assert "model.layers.1.mlp.experts.down_proj_blocks" in names
        for folder in ("adapter", "adapter-dequantized"):
            assert (finished / folder / "adapter_config.json").is_file()

    def test_table(self, finished: Path) -> None:
        results = results_of(finished)
        plain, packed, dequantized = results["table"]
        curves = results["curves"]
        for row, loss in (
            (plain, curves["lora"][0][1]),
            (packed, curves["lora"][-1][1]),
            (dequantized, curves["peft"][-1][1]),
        ):
            assert row["heldout_loss"] == pytest.approx(loss, abs=1e-6)
        assert packed["gap"] < -0.1, "nothing was learned"
        assert dequantized["heldout_loss"] == pytest.approx(packed["heldout_loss"], abs=1e-4)
        assert packed["experts_bytes"] * 32 / 4.25 == dequantized["experts_bytes"]
        assert packed["adapter_bytes"] == dequantized["adapter_bytes"] > plain["adapter_bytes"] == 0

    def test_both_adapters_are_the_same_but_for_rounding(self, finished: Path) -> None:
        ours, theirs = (
            load_file(finished / folder / "adapter_model.safetensors")
            for folder in ("adapter", "adapter-dequantized")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3)
            assert tensor.any()

    def test_resumed_equals_uninterrupted(
        self, text: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop_at(phase: str, step: int):
            def on_step(name: str, done: int) -> None:
                if (name, done) == (phase, step):
                    raise KeyboardInterrupt

            return on_step

        out = str(tmp_path / "run")
        assert main([*TINY, "--data", str(text), "--out", out], stop_at("pretrain", 40)) == 130
        assert f"--resume {out}" in capsys.readouterr().err
        assert main(["--resume", out], stop_at("lora", 7)) == 130
        assert main(["--resume", out], stop_at("peft", 5)) == 130
        assert main(["--resume", out]) == 0
        shown = capsys.readouterr().out
        assert "1  LoRA on it, its experts in MXFP4" in shown
        assert "model and adapter, loaded in a fresh process: held-out loss" in shown
        whole, pieces = results_of(finished), results_of(Path(out))
        assert pieces["curves"] == whole["curves"]
        assert pieces["table"] == whole["table"]


@v5_only
class TestVerify:
    @pytest.fixture
    def copy(self, finished: Path, tmp_path: Path) -> Path:
        return shutil.copytree(finished, tmp_path / "copy")

    def test_needs_nothing_of_ours(self, finished: Path) -> None:
        code = (
            "import sys; from torchao_mx.demo import main; code = main(['--verify', sys.argv[1]]); "
            "sys.exit(code or any(name.startswith('torchao_mx.hf') for name in sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(finished)], check=True, stdout=-1)
        assert b"(at most 1e-05)" in done.stdout

    def test_rejects_a_tampered_adapter(
        self, copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tensors = load_file(copy / ADAPTER)
        name = next(name for name in tensors if name.endswith("lora_B.weight"))
        tensors[name] *= 1.5
        save_file(tensors, copy / ADAPTER, metadata={"format": "pt"})
        assert main(["--verify", str(copy)]) == 1
        assert "a file of its model or adapter was changed" in capsys.readouterr().err

    @pytest.mark.parametrize("name", [ADAPTER, "model/model.safetensors"])
    def test_rejects_a_truncated_file(
        self, copy: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        assert main(["--verify", str(copy)]) == 1
        assert "cannot load its model and adapter" in capsys.readouterr().err

    def test_rejects_another_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--verify", str(tmp_path)]) == 1
        assert "no such checkpoint" in capsys.readouterr().err


class TestUsage:
    @v5_only
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([*METHOD, "--format", "mxfp8"], "--method lora takes no --format"),
            (["--rank", "8"], "--method qat takes no --rank"),
            (["--top-k", "2", "--experts", "4"], "--method qat takes no --top-k, --experts"),
            ([*METHOD, "--top-k", "9"], "--top-k 9: there are --experts 8"),
            ([*METHOD, "--rank", "65"], "--rank 65: more than the weights' smaller side, --dim 64"),
            ([*METHOD, "--experts", "0"], "--experts 0: must be at least 1"),
            ([*METHOD, "--dim", "100"], "not a multiple of 32"),
            (["--method", "dora"], "invalid choice: 'dora'"),
            (["--resume", ".", *METHOD], "--resume takes no --method"),
        ],
    )
    def test_says_what_is_wrong(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.skipif(V5, reason="of older transformers")
    def test_older_transformers(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(METHOD) == 2
        assert "--method lora needs transformers 5.8 or later, and 4" in capsys.readouterr().err

    @pytest.mark.parametrize("missing", [["peft"], ["transformers", "peft"]])
    def test_missing_packages(
        self,
        missing: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from torchao_mx.demo import lora

        monkeypatch.setattr(lora, "find_spec", lambda name: None if name in missing else name)
        assert main(METHOD) == 2
        needed = f"--method lora needs {' and '.join(missing)}: pip install 'torchao_mx[hf]'"
        assert needed in capsys.readouterr().err


class TestCorpus:
    def test_the_other_text_is_not_pretrained_on(self, text: Path) -> None:
        corpus = load_adaptation_corpus(str(text), 32)
        whole = text.read_bytes()
        assert bytes(torch.cat([corpus.finetune, corpus.heldout]).tolist()) == whole
        assert corpus.finetune.numel() == pytest.approx(0.8 * len(whole), abs=1)
        code = load_corpus(None, 32)
        assert torch.equal(corpus.pretrain, torch.cat([code.pretrain, code.finetune, code.heldout]))

    def test_prose_by_default(self) -> None:
        corpus = load_adaptation_corpus(None, 128)
        assert corpus.finetune.numel() > 3 * corpus.heldout.numel() > 100_000
        assert corpus.digest == load_adaptation_corpus(None, 128).digest
