"""torchao-mx inspect: what it counts, what it says, how it exits."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from test_hf_load import config_of, tensors_of, write

from torchao_mx import MXFP4, MXTensor
from torchao_mx.hf import cli

NAMES = [
    f"model.layers.{i}.mlp.experts.{w}" for i in range(2) for w in ("down_proj", "gate_up_proj")
]


@pytest.fixture(params=[1, 3], ids=["one_file", "sharded"])
def folder(request, tmp_path):
    config = config_of(96)
    return write(tmp_path / "model", config, tensors_of(config), request.param)


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def packed(folder, name):
    tensors = {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    return MXTensor.from_blocks(blocks, scales, torch.bfloat16)


def test_counts(folder, capsys):
    code, out, _ = run(capsys, "inspect", folder, "--json")
    found = json.loads(out)
    assert code == 0 and [row["name"] for row in found["weights"]] == NAMES
    for row in found["weights"]:
        w = packed(folder, row["name"])
        scale = w.scale.view(torch.uint8).int()
        assert row["shape"] == list(w.shape) and row["format"] == "mxfp4"
        assert row["bytes"] == w.numel() * 17 // 32
        assert (row["min_exponent"], row["max_exponent"]) == (scale.min() - 127, scale.max() - 127)
        values = w.dequantize(torch.float32)
        largest = 2.0 ** (scale.amax(-1, keepdim=True) - 127 - 6)  # a row's power of two
        exact = (values / largest).to(torch.float8_e4m3fn).float() * largest == values
        assert row["lossless_rows"] == exact.all(-1).sum() and row["rows"] == exact[..., 0].numel()
    assert found["total"]["packed_bytes"] == sum(row["bytes"] for row in found["weights"])


def test_table(folder, capsys):
    code, out, _ = run(capsys, "inspect", folder)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 + len(NAMES) and lines[1].split()[0] == NAMES[0]
    assert "4.25 bits an element" in lines[-1] and "relative error" not in lines[0]


def test_compare(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    originals = {}
    for name in NAMES:
        values = packed(folder, name).dequantize(torch.float32).mT
        originals[name] = values + 0.1 * values.norm() / values.numel() ** 0.5 * torch.randn(
            values.shape
        )
    save_file({n: t.contiguous() for n, t in originals.items()}, other / "model.safetensors")
    code, out, _ = run(capsys, "inspect", folder, "--compare", other, "--json")
    assert code == 0
    for row in json.loads(out)["weights"]:
        want = originals[row["name"]].double()
        values = packed(folder, row["name"]).dequantize(torch.float32).double().mT
        assert row["error"] == pytest.approx(
            ((values - want).norm() / want.norm()).item(), rel=1e-6
        )
        assert 0.08 < row["error"] < 0.12
    code, out, _ = run(capsys, "inspect", folder, "--compare", other)
    assert code == 0 and "relative error" in out


def test_exit_codes(folder, tmp_path, capsys):
    for arguments, message in (
        (("inspect", tmp_path), "neither model.safetensors"),
        (("inspect", folder, "--compare", folder), "no such tensor to compare with"),
    ):
        code, out, err = run(capsys, *arguments)
        assert code == 1 and message in err and not out
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"w": torch.ones(3)}, plain / "model.safetensors")
    assert "nothing packed to inspect" in run(capsys, "inspect", plain)[2]
    save_file({"w_blocks": torch.ones(1, 32, 1, 16).byte()}, plain / "model.safetensors")
    assert "w: " in run(capsys, "inspect", plain)[2]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["inspect"])
    assert exit_info.value.code == 2


def test_special_scales(tmp_path, capsys):
    w = MXTensor.from_hp(torch.randn(2, 32, 64), MXFP4)
    blocks, scales = w.to_blocks()
    scales = scales.view(torch.uint8).clone()
    scales[0, 0, 0], scales[1, 3, 1] = 255, 1  # NaN; far below its neighbour
    save_file({"w_blocks": blocks.contiguous(), "w_scales": scales}, tmp_path / "model.safetensors")
    code, out, _ = run(capsys, "inspect", tmp_path, "--json")
    (row,) = json.loads(out)["weights"]
    assert code == 0 and row["nan_scales"] == 1 and row["min_exponent"] == -126
    assert row["lossless_rows"] == row["rows"] - 2
    assert "1 NaN" in run(capsys, "inspect", tmp_path)[1]
