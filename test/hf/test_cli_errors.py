"""torchao-mx on files and arguments that make no sense: one message, an exit code, no traceback, nothing written."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import save_file
from test_load import config_of, contents, tensors_of, write, write_llama

from torchao_mx.hf import cli

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("packed"), config_of(), tensors_of(config_of()))


@pytest.fixture(autouse=True)
def in_time():
    signal.alarm(60)  # a hang ends the run
    yield
    signal.alarm(0)


def damaged(packed, tmp_path, name, data):
    folder = tmp_path / "bad"
    shutil.copytree(packed, folder)
    (folder / name).unlink(missing_ok=True)
    if data is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(data)
    return folder


def fails(capsys, *arguments, code=1, part=""):
    try:
        found = cli.main([str(a) for a in arguments])
    except SystemExit as error:
        found = error.code
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert found == code and not out, (arguments, err)
    assert "Traceback" not in err and any(line.startswith("torchao-mx") for line in lines), err
    assert part in err, err


DAMAGES = {
    "no json": (b"nonsense", "config.json"),
    "list": (b"[]", "config.json"),
    "empty": (b"", "config.json"),
    "pipe": (None, "config.json"),
    "nested": (b"[" * 100_000, "config.json"),
    "bytes": (b"\xff\xfe\x00", "config.json"),
    "no type": (b"{}", "config.json"),
    "model_type": (b'{"model_type": 1}', "config.json"),
    "unknown": (b'{"model_type": "nothing"}', "config.json"),
    "fields": (b'{"model_type": "llama", "hidden_size": "x"}', "config.json"),
    "layers": (b'{"model_type": "llama", "num_hidden_layers": 1000000000}', "config.json"),
    "generation": (b"{", "generation_config.json"),
    "generation's fields": (b'{"max_length": {"a": 1}, "num_beams": -1, "early_stopping": []}', "generation_config.json"),
    "weights": (b"\0" * 50, FILE),
    "weights pipe": (None, FILE),
    "index": (b"{}", INDEX),
    "index pipe": (None, INDEX),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files(case, packed, tmp_path, capsys):
    data, name = DAMAGES[case]
    folder = damaged(packed, tmp_path, name, data)
    target = tmp_path / "out"
    fails(capsys, "quantize", folder, target, part=str(folder / name))
    fails(capsys, "merge", folder, tmp_path, target, part=str(folder / name))
    if name in (FILE, INDEX):
        fails(capsys, "inspect", folder, part=str(folder / name))
        fails(capsys, "inspect", packed, "--compare", folder, part=str(folder / name))
    assert not target.exists()


def test_adapters(packed, tmp_path, capsys):
    adapter, target = tmp_path / "adapter", tmp_path / "out"
    adapter.mkdir()
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    save_file({"x": torch.ones(2)}, weights)
    for text in (
        "", "[]", "nonsense", "{}", "[" * 100_000, '{"peft_type": "LORA", "r": "8", "lora_alpha": 1}',
        '{"peft_type": "LORA", "r": true, "lora_alpha": 1}', '{"peft_type": "LORA", "r": 1, "lora_alpha": []}',
        '{"peft_type": "LORA", "r": 1, "lora_alpha": NaN}',
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": 5}',
    ):  # fmt: skip
        config.write_text(text)
        fails(capsys, "merge", packed, adapter, target, part="adapter_config.json")
    config.write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    for data in (b"", b"\0" * 40, None):
        weights.unlink()
        os.mkfifo(weights) if data is None else weights.write_bytes(data)
        fails(capsys, "merge", packed, adapter, target, part=str(weights))
    weights.unlink()
    weights.mkdir()
    fails(capsys, "merge", packed, adapter, target, part=str(weights))
    assert not target.exists()


def test_arguments(packed, tmp_path, capsys):
    before = contents(packed)
    file, pipe, target = tmp_path / "file", tmp_path / "pipe", tmp_path / "out"
    file.write_text("x")
    os.mkfifo(pipe)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for source in (
        tmp_path / "nowhere",
        file,
        pipe,
        loop,
        "x" * 5000,
        "",
        "a\0b",
        "\udcff",
        "~nobody/x",
    ):
        fails(capsys, "inspect", source)
        fails(capsys, "quantize", source, target)
        fails(capsys, "merge", source, tmp_path, target)
        fails(capsys, "inspect", packed, "--compare", source) if source else None
    for size in ("0", "-1", "1e9GB", "nan", "inf", "9" * 400, "5PB", "", "½GB", "GB"):
        fails(capsys, "quantize", packed, target, f"--max-shard-size={size}", code=2)
    for config in ("mxfp8", "mxfp4:", "mxfp4:up", ""):
        fails(capsys, "quantize", packed, target, f"--config={config}", code=2)
    for arguments in (
        [],
        ["nothing"],
        ["inspect"],
        ["quantize", packed],
        ["inspect", packed, "--nothing"],
    ):
        fails(capsys, *arguments, code=2)
    fails(capsys, "quantize", packed, packed, code=2, part="the folder to read from")
    fails(capsys, "quantize", packed, packed / ".." / packed.name, code=2)
    fails(capsys, "quantize", packed, file, part=str(file))
    assert contents(packed) == before and not target.exists()


def test_high_precision_that_config_json_calls_packed(tmp_path, capsys):
    """Every command has the same answer."""
    folder = write_llama(tmp_path / "model")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(record | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    for arguments in (
        ("quantize", folder, tmp_path / "out"),
        ("merge", folder, tmp_path, tmp_path / "out"),
    ):
        fails(capsys, *arguments, part="Remove quantization_config from config.json")


def test_tensors_of_odd_shapes(tmp_path, capsys):
    for blocks, scales in (
        ((), ()),
        ((0,), (0,)),
        ((16,), ()),
        ((1, 16), (1,)),
        ((2, 2, 16), (2, 3)),
        ((0, 1, 16), (0, 1)),
    ):
        made = {"w_blocks": torch.zeros(blocks).byte(), "w_scales": torch.zeros(scales).byte()}
        save_file(made, tmp_path / FILE)
        fails(capsys, "inspect", tmp_path, part="w: ")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("full"), RuntimeError("odd"), KeyError("k"), ImportError("no")])  # fmt: skip
def test_what_nobody_expects(error, packed, tmp_path, capsys, monkeypatch):
    def stop(*args):
        raise error

    monkeypatch.setattr(cli, "quantize_checkpoint", stop)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    fails(capsys, "quantize", packed, tmp_path / "out", code=code, part=str(error))


def test_a_reader_that_stops(packed, monkeypatch, capsys):
    """As `head` does: no complaint about the pipe."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["inspect", str(packed)]) == 1
        monkeypatch.undo()
    assert "pipe" not in capsys.readouterr().err.lower()
