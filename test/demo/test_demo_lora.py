"""``--method lora`` of the demo: a full tiny run, stopping and going on, what it checks and refuses."""

from __future__ import annotations

import json
import random
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
from _demo import results_of, stop_after  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from torchao_mx.demo import lora, qat  # noqa: E402
from torchao_mx.demo.cli import main  # noqa: E402
from torchao_mx.demo.data import load_adaptation_corpus, load_corpus  # noqa: E402
from torchao_mx.demo.settings import DemoError, Settings  # noqa: E402

V5 = int(transformers.__version__.split(".")[0]) >= 5
v5_only = pytest.mark.skipif(not V5, reason="--method lora needs transformers 5")
METHOD = ["--method", "lora"]
TINY = [*METHOD, "--quick", "--device", "cpu", "--experts", "4", "--steps", "12"]
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


@v5_only
class TestRun:
    def test_leaves_its_files(self, finished: Path) -> None:
        assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
        config = json.loads((finished / "model" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "mxfp4"
        names = load_file(finished / "model" / "model.safetensors")
        assert "model.layers.1.mlp.experts.down_proj_blocks" in names
        assert (finished / "adapter" / "adapter_config.json").is_file()
        assert not list(finished.glob("*.pt"))

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
        assert packed["gap"] < -0.05, "nothing was learned"
        assert dequantized["heldout_loss"] == pytest.approx(packed["heldout_loss"], abs=1e-4)
        assert packed["experts_bytes"] * 32 / 4.25 == dequantized["experts_bytes"]
        assert packed["adapter_bytes"] == dequantized["adapter_bytes"] > plain["adapter_bytes"] == 0

    def test_resumed_equals_uninterrupted(
        self,
        text: Path,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        start = [*TINY, "--data", str(text), "--out", str(tmp_path)]
        # Checkpoints are at each tenth step: in arm 1, in arm 2, of which the last steps remain.
        for steps in (40 + 11, 2 + 11):
            with monkeypatch.context() as ctrl_c:
                stop_after(steps, ctrl_c)
                assert main(start) == 130
        assert main(start) == 0
        shown = capsys.readouterr().out
        assert "arm 1, LoRA on MXFP4: 12 steps, from 12" in shown
        assert "arm 2, LoRA on fp32: 12 steps, from 10" in shown
        assert "1  LoRA on it, its experts in MXFP4" in shown
        assert "In a fresh process: model and adapter, loaded by transformers 5" in shown
        assert "quantize_(model, MXWeightOnlyLoRAConfig(r=16), filter_fn=is_experts)" in shown
        whole, pieces = results_of(finished), results_of(tmp_path)
        assert pieces["curves"] == whole["curves"]
        assert pieces["table"] == whole["table"]

    @pytest.mark.parametrize("method", [lora, qat])
    def test_what_comes_next_runs(
        self, method: ModuleType, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The lines printed at the end, on the tiny gpt-oss."""
        monkeypatch.chdir(tmp_path)
        code = method.NEXT_PYTHON.replace("openai/gpt-oss-20b", str(finished / "model"))
        exec(code.replace("r=16", "r=4"), {})
        names = {path.name for path in (tmp_path / "tuned").iterdir()}
        adapter = {"adapter_config.json", "adapter_model.safetensors"}
        assert names >= (adapter if method is lora else {"config.json", "model.safetensors"})


@v5_only
class TestVerify:
    @pytest.fixture
    def copy(self, finished: Path, tmp_path: Path) -> Path:
        return shutil.copytree(finished, tmp_path / "copy")

    def test_rejects_a_tampered_adapter(self, copy: Path) -> None:
        results = results_of(copy)
        settings = Settings(**results["settings"])
        losses = [row["heldout_loss"] for row in results["table"]]
        assert "(at most 1e-05)" in lora.verify(settings, copy, losses)
        tensors = load_file(copy / ADAPTER)
        name = next(name for name in tensors if name.endswith("lora_B.weight"))
        tensors[name] *= 1.5
        save_file(tensors, copy / ADAPTER, metadata={"format": "pt"})
        with pytest.raises(DemoError, match="more than 1e-05"):
            lora.verify(settings, copy, losses)


class TestUsage:
    @v5_only
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([*METHOD, "--format", "mxfp8"], "--method lora takes no --format"),
            (["--top-k", "1", "--experts", "4"], "--method qat takes no --experts"),
            ([*METHOD, "--top-k", "9"], "--top-k 9: there are --experts 8"),
            ([*METHOD, "--rank", "65"], "--rank 65: more than the weights' smaller side, --dim 64"),
            ([*METHOD, "--experts", "0"], "--experts: 0: must be at least 1"),
            ([*METHOD, "--dim", "100"], "not a multiple of 32"),
            (["--method", "dora"], "invalid choice: 'dora'"),
        ],
    )
    def test_says_what_is_wrong(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err

    @pytest.mark.skipif(V5, reason="of older transformers")
    def test_older_transformers(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(METHOD) == 1
        assert "--method lora needs transformers 5.8 or later, and 4" in capsys.readouterr().err

    @pytest.mark.parametrize("missing", ["peft", "transformers"])
    def test_missing_packages(
        self, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def version_of(name: str) -> str:
            if name == missing:
                raise PackageNotFoundError(name)
            return "5.8"

        monkeypatch.setattr(lora, "version", version_of)
        assert main(METHOD) == 1
        needed = f"--method lora needs {missing}: pip install 'torchao_mx[hf]'"
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
