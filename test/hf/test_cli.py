"""torchao-mx: what its commands count, write and say, and how they exit."""

import errno
import json
import math
import shutil

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from test_load import (
    QUANTIZATION,
    config_of,
    contents,
    experts_of,
    stock,
    tensors_of,
    write,
    write_llama,
)
from test_save import assert_same, saved_tensors
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from torchao_mx import (
    MXFP4,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    ScaleCalculationMode,
    is_experts,
)
from torchao_mx.hf import (
    cli,
    from_pretrained,
    merge_adapter,
    publish,
    save_adapter,
    save_pretrained,
    staging,
)
from torchao_mx.hf import write as writer

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
    assert "4.25 bits per element" in lines[-1] and "relative error" not in lines[0]


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
    assert "nothing to inspect" in run(capsys, "inspect", plain)[2]
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


# --- quantize -------------------------------------------------------------------------------------

OTHERS = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "Apache"}


@pytest.fixture(params=[(96, "5GB"), (64, "50KB")], ids=["I96", "square_sharded"])
def unpacked(request, tmp_path):
    """A checkpoint in bf16 as transformers writes it, and what lies beside others on the Hub."""
    inner, shard = request.param
    return write_unpacked(tmp_path / "unpacked", config_of(inner), shard)


def write_unpacked(folder, config, shard="5GB", dtype=torch.bfloat16):
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name, text in OTHERS.items():
        (folder / name).write_text(text)
    (folder / "consolidated.pth").write_text("weights")
    (folder / "metal").mkdir()
    (folder / "metal" / "model.bin").write_text("weights")
    return folder


def quantized(folder, target, mode=ScaleCalculationMode.RCEIL, **options):
    """The same through a model in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    quantize_(model, MXWeightOnlyConfig(scaling_mode=mode), filter_fn=is_experts)
    save_pretrained(model, target, **options)
    return model


@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_quantize_writes_what_a_model_saves(unpacked, size, tmp_path, capsys):
    target, other = tmp_path / "deep" / "target", tmp_path / "other"
    before = contents(unpacked)
    code, out, _ = run(capsys, "quantize", unpacked, target, "--max-shard-size", size, "--json")
    assert code == 0 and contents(unpacked) == before
    model = quantized(unpacked, other, max_shard_size=size)
    files = {f.name for f in other.iterdir()}
    assert len(files) == (3 if size == "5GB" else len(list(target.glob("*.safetensors"))) + 3)
    assert {f.name for f in target.iterdir()} == files | OTHERS.keys()
    for name in files - {"config.json"}:
        assert (target / name).read_bytes() == (other / name).read_bytes(), name
    for name, text in OTHERS.items():
        assert (target / name).read_text() == text
    record = json.loads((target / "config.json").read_text())
    assert record == json.loads(before[(target / "config.json").relative_to(target)]) | {
        "quantization_config": QUANTIZATION
    }
    for name, p in stock(target).named_parameters():
        ours = model.get_parameter(name)
        assert torch.equal(p, (ours.dequantize() if name in NAMES else ours).float()), name

    found = json.loads(out)
    originals = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.bfloat16)
    rows = {row["name"]: row for row in found["weights"]}
    assert sorted(rows) == NAMES
    for name, row in rows.items():
        want, got = originals.get_parameter(name).double(), model.get_parameter(name)
        assert row["shape"] == list(got.mT.shape)
        assert (
            row["bytes_before"] == 2 * got.numel() and row["bytes_after"] == got.numel() * 17 // 32
        )
        error = (got.dequantize(torch.float32).double() - want).norm() / want.norm()
        assert row["error"] == pytest.approx(error.item(), rel=1e-6) and row["error"] > 0.05
    assert found["total"] == {
        "quantized_weights": 4,
        "bytes_before": sum(row["bytes_before"] for row in rows.values()),
        "bytes_after": sum(row["bytes_after"] for row in rows.values()),
        "other_tensors": len(originals.state_dict()) - 4,
    }


@pytest.mark.parametrize("mode", ScaleCalculationMode, ids=lambda m: m.value)
def test_quantize_by_mode(mode, tmp_path, capsys):
    folder = write_unpacked(tmp_path / "unpacked", config_of())
    code, out, _ = run(
        capsys, "quantize", folder, tmp_path / "a", "--config", f"mxfp4:{mode.value}"
    )
    lines = out.splitlines()
    assert code == 0 and len(lines) == 6 and lines[0].endswith("relative error")
    assert "4 weights quantized, 294,912 bytes to 78,336;" in lines[-1]
    quantized(folder, tmp_path / "b", mode)
    assert_same(saved_tensors(tmp_path / "a"), saved_tensors(tmp_path / "b"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_quantize_other_dtypes(dtype, tmp_path, capsys):
    folder = write_unpacked(tmp_path / "unpacked", config_of(), dtype=dtype)
    source = saved_tensors(folder)
    assert run(capsys, "quantize", folder, tmp_path / "target")[0] == 0
    tensors = saved_tensors(tmp_path / "target")
    for name in NAMES:
        want = MXTensor.from_hp(source.pop(name).mT.contiguous(), MXFP4).to_blocks()
        got = (tensors.pop(f"{name}{suffix}") for suffix in ("_blocks", "_scales"))
        assert all(map(torch.equal, got, want))
    assert_same(tensors, source)
    assert from_pretrained(tmp_path / "target", dtype=dtype).dtype == dtype


def test_quantize_tied_embeddings(tmp_path, capsys):
    folder = write_unpacked(tmp_path / "unpacked", config_of(tie_word_embeddings=True))
    assert run(capsys, "quantize", folder, tmp_path / "a")[0] == 0
    quantized(folder, tmp_path / "b")
    assert_same(saved_tensors(tmp_path / "a"), saved_tensors(tmp_path / "b"))
    assert "lm_head.weight" not in saved_tensors(tmp_path / "a")


def test_an_existing_folder_is_replaced_but_for_others(tmp_path, capsys):
    folder = write_unpacked(tmp_path / "unpacked", config_of())
    target = tmp_path / "target"
    run(capsys, "quantize", folder, target, "--max-shard-size", "30KB")
    (target / "tokenizer.json").write_text("stale")
    (target / "notes.md").write_text("kept")
    assert run(capsys, "quantize", folder, target)[0] == 0
    assert {f.name for f in target.iterdir()} == OTHERS.keys() | {
        "config.json", "generation_config.json", "model.safetensors", "notes.md",
    }  # fmt: skip
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (folder / "tokenizer.json").stat().st_nlink == 1  # not the same file


NAME = NAMES[3]


def changed(name, change):
    def mutate(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        tensors = {n: t.contiguous() for n, t in tensors.items() if t is not None}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return mutate


def poke(value):
    def mutate(t):
        t[1, 2, 3] = value
        return t

    return mutate


def shortened(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


BAD_CHECKPOINTS = {
    "missing": (changed(NAME, lambda t: None), f"{NAME}: missing; download"),
    "another missing": (changed("model.norm.weight", lambda t: None), "model.norm.weight: missing"),
    "transposed": (changed(NAME, lambda t: t.mT), f"{NAME}: has shape (4, 192, 64), but config.json asks for (4, 64, 192)"),
    "integers": (changed(NAME, torch.Tensor.int), f"{NAME}: has dtype I32"),
    "nan": (changed(NAME, poke(math.nan)), f"{NAME}: 1 of 49152 values are not finite"),
    "inf": (changed(NAME, poke(-math.inf)), f"{NAME}: 1 of 49152 values are not finite"),
    "zeros": (changed(NAME, torch.zeros_like), f"{NAME}_blocks: it and gate_up_proj_scales are all zeros"),
    "cut short": (shortened, "cut short"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
}  # fmt: skip


@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_quantize_refuses(case, existing, tmp_path, capsys):
    mutate, message = BAD_CHECKPOINTS[case]
    folder, target = write_unpacked(tmp_path / "unpacked", config_of()), tmp_path / "target"
    if existing:
        target.mkdir()
        (target / "model.safetensors").write_text("kept")
    mutate(folder)
    before = contents(tmp_path)
    code, out, err = run(capsys, "quantize", folder, target, "--json")
    assert code == 1 and not out and message in err
    assert contents(tmp_path) == before and target.exists() == existing
    assert len(list(tmp_path.iterdir())) == 1 + existing


def test_quantize_refuses_other_checkpoints(folder, tmp_path, capsys):
    llama, target = write_llama(tmp_path / "llama"), tmp_path / "target"
    name = NAMES[0]
    code, _, err = run(capsys, "quantize", folder, target)
    assert (
        code == 1 and f"quantized already, {name}_blocks; give the high-precision checkpoint" in err
    )
    record = json.loads((llama / "config.json").read_text())
    assert "LlamaForCausalLM has no experts" in run(capsys, "quantize", llama, target)[2]
    record["quantization_config"] = {"quant_method": "fp8"}
    (llama / "config.json").write_text(json.dumps(record))
    code, _, err = run(capsys, "quantize", llama, target)
    assert code == 1 and "quantized already, quant_method='fp8' in config.json" in err
    odd = write_unpacked(tmp_path / "odd", config_of(80))
    code, _, err = run(capsys, "quantize", odd, target)
    assert (
        code == 1 and "experts.down_proj has shape (4, 64, 80)" in err and "multiple of 32" in err
    )
    assert not target.exists()


@pytest.mark.parametrize("step", ["save_file", "_copy_others", "sync"])
def test_a_failing_disk_leaves_the_folder_as_it_was(step, tmp_path, monkeypatch, capsys):
    folder, target = write_unpacked(tmp_path / "unpacked", config_of()), tmp_path / "target"
    run(capsys, "quantize", folder, target)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    module = {"_copy_others": writer, "save_file": staging, "sync": publish}[step]
    monkeypatch.setattr(module, step, fail)
    code, _, err = run(capsys, "quantize", folder, target)
    assert code == 1 and "No space left on device" in err and contents(tmp_path) == before
    assert step != "save_file" or (str(target) in err and "model.safetensors (166,816 bytes" in err)


LOST = "rounding undoes the update of {} of 4 weights; serve the adapter beside the packed weights"


def test_a_merge_that_loses_the_update_is_not_written_unless_forced(tmp_path, capsys):
    folder = write(tmp_path / "model", config_of(96), tensors_of(config_of(96)))
    adapter, target = adapter_of(folder, tmp_path / "adapter", std=1e-5), tmp_path / "target"
    before = contents(tmp_path)
    code, out, err = run(capsys, "merge", folder, adapter, target)
    assert code == 1 and not out and contents(tmp_path) == before
    assert LOST.format(4) in err and "--force writes it anyway" in err
    assert all(f"{name}: 0.0 % is kept" in err for name in NAMES)
    with pytest.warns(UserWarning, match=LOST.format(4)):
        code, out, err = run(capsys, "merge", folder, adapter, target, "--force")
    assert code == 0 and out.endswith("at least 0.0000 of each update is kept\n")
    for name in NAMES:  # as if nothing had been added
        assert torch.equal(packed(target, name).dequantize(), packed(folder, name).dequantize())
    code, out, err = run(capsys, "merge", folder, adapter_of(folder, adapter), target)
    assert code == 0 and "rounding undoes" not in err


def test_arguments_that_make_no_sense(folder, tmp_path, capsys):
    target = tmp_path / "target"
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for arguments, message in (
        (("quantize", folder, target, "--config", "mxfp8"), "'mxfp8' is not one of mxfp4, mxfp4:ceil, mxfp4:even, mxfp4:floor, mxfp4:rceil"),
        (("quantize", folder, target, "--config", "mxfp4:nearest"), "'mxfp4:nearest' is not one of mxfp4, mxfp4:ceil"),
        (("quantize", folder, target, "--max-shard-size", "5 gallons"), "max_shard_size='5 gallons' is not a size"),
        (("quantize", folder, folder), "the folder to read from; give another"),
        (("quantize", folder, tmp_path / "link"), "the folder to read from; give another"),
        (("quantize", folder), "required: OUT"),
        (("merge", folder, folder, f"{folder}/../{folder.name}"), "the folder to read from; give another"),
        (("merge", folder, folder, target, "--max-shard-size", "0"), "max_shard_size='0' is not a size"),
        (("merge", folder, target), "required: OUT"),
        (("convert", folder), "invalid choice: 'convert'"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_info:
            cli.main([str(a) for a in arguments])
        assert exit_info.value.code == 2 and message in capsys.readouterr().err
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before
    (tmp_path / "file").write_text("")
    for arguments in (
        ("quantize", folder, tmp_path / "file"),
        ("merge", folder, folder, tmp_path / "file"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 1 and "is a file" in err


# --- merge ----------------------------------------------------------------------------------------


def adapter_of(folder, path, std=0.05):
    model = from_pretrained(folder)
    quantize_(model, MXWeightOnlyLoRAConfig(r=4), filter_fn=is_experts)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in experts_of(model):
            for name in ("gate_up_proj_lora_B", "down_proj_lora_B"):
                getattr(module, name).normal_(std=std)
    save_adapter(model, path)
    return path


@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize("mode", [None, ScaleCalculationMode.EVEN], ids=str)
def test_merge_writes_what_python_saves(folder, size, mode, tmp_path, capsys):
    adapter, target = adapter_of(folder, tmp_path / "adapter"), tmp_path / "target"
    for name, text in OTHERS.items():
        (folder / name).write_text(text)
    before = contents(folder)
    options = () if mode is None else ("--config", f"mxfp4:{mode.value}")
    code, out, _ = run(
        capsys, "merge", folder, adapter, target, "--max-shard-size", size, "--json", *options
    )
    assert code == 0 and contents(folder) == before

    model = from_pretrained(folder)
    options = {} if mode is None else {"scaling_mode": mode}
    errors = merge_adapter(model, adapter, **options)
    save_pretrained(model, tmp_path / "other", max_shard_size=size)
    other = contents(tmp_path / "other")
    merged = contents(target)
    assert {str(f) for f in merged.keys() - other.keys()} == OTHERS.keys()
    assert all(merged[f] == other[f] for f in other)
    found = json.loads(out)
    assert found["weights"] == [{"name": n, **e._asdict()} for n, e in errors.items()]
    assert sorted(errors) == NAMES
    assert found["total"] == {
        "merged_weights": 4,
        "weight_error": max(e.weight_error for e in errors.values()),
        "delta_error": max(e.delta_error for e in errors.values()),
        "kept": min(e.kept for e in errors.values()),
    }
    for name, p in stock(target).named_parameters():
        ours = model.get_parameter(name)
        assert torch.equal(p, (ours.dequantize() if name in NAMES else ours).float()), name


def test_merge_table(folder, tmp_path, capsys):
    adapter = adapter_of(folder, tmp_path / "adapter")
    code, out, _ = run(capsys, "merge", folder, adapter, tmp_path / "target")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 + len(NAMES)
    errors = merge_adapter(from_pretrained(folder), adapter)
    for line in lines[1:-1]:
        name, *figures = line.split()
        assert figures == [f"{figure:.4f}" for figure in errors[name]]
    assert lines[-1].startswith("4 weights merged, with errors of up to 0.")


def test_merge_keeps_the_dtype_of_the_rest(tmp_path, capsys):
    config = config_of()
    tensors = tensors_of(config)
    tensors = {n: t.float() * 1.001 if t.is_floating_point() else t for n, t in tensors.items()}
    folder = write(tmp_path / "model", config, tensors)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"dtype": "float32"}))
    adapter = adapter_of(folder, tmp_path / "adapter")
    assert run(capsys, "merge", folder, adapter, tmp_path / "target")[0] == 0
    merged = saved_tensors(tmp_path / "target")
    rest = {n: t for n, t in tensors.items() if t.is_floating_point()}
    assert_same({n: merged[n] for n in rest}, rest)


def test_merge_refuses(folder, tmp_path, capsys):
    adapter, target = adapter_of(folder, tmp_path / "adapter"), tmp_path / "target"
    llama = write_llama(tmp_path / "llama")
    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    lost = min(tensors)
    save_file({k: t for k, t in tensors.items() if k != lost}, broken / "adapter_model.safetensors")
    before = contents(tmp_path)
    for arguments, message in (
        ((folder, broken, target), f"{lost} is missing"),
        ((folder, tmp_path / "none", target), "adapter_config.json"),
        ((tmp_path / "none", adapter, target), "no such folder"),
        (
            (llama, adapter, target),
            "in high precision; merge with PEFT's merge_and_unload() instead",
        ),
        (
            (folder, adapter, adapter),
            "has an adapter_config.json, and transformers would add that adapter",
        ),
    ):
        code, out, err = run(capsys, "merge", *arguments)
        assert code == 1 and message in err and not out
        assert contents(tmp_path) == before and not target.exists()
