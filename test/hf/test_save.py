"""save_pretrained: back in stock transformers and here, bit for bit, or the folder as it was."""

import errno
import json

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file
from test_load import (
    QUANTIZATION,
    WEIGHTS,
    config_of,
    contents,
    experts_of,
    inputs,
    stock,
    tensors_of,
    write,
)
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM, GptOssForCausalLM, LlamaConfig

from torchao_mx import MXFP4, MXFP8_E4M3, MXTensor, MXWeightOnlyConfig, is_experts
from torchao_mx.hf import from_pretrained, publish, save_pretrained, staging
from torchao_mx.hf import write as writer


@pytest.fixture(params=[96, 64], ids=["I96", "square"])
def source(request, tmp_path):
    config = config_of(request.param)
    return write(tmp_path / "source", config, tensors_of(config))


@pytest.fixture
def model(tmp_path):
    config = config_of()
    return from_pretrained(write(tmp_path / "source", config, tensors_of(config)))


def saved_tensors(folder):
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "20kb"], ids=["one_file", "sharded"])
def test_files_hold_the_tensors_that_were_loaded(source, shard, tmp_path):
    target = tmp_path / "deep" / "target"
    save_pretrained(from_pretrained(source), target, max_shard_size=shard)
    assert_same(saved_tensors(target), load_file(source / "model.safetensors"))
    files = {f.name for f in target.iterdir()}
    configs = {"config.json", "generation_config.json"}
    if shard == "5GB":
        assert files == configs | {"model.safetensors"}
    else:
        assert "model.safetensors.index.json" in files and "model.safetensors" not in files
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert files == configs | {"model.safetensors.index.json"} | set(
            index["weight_map"].values()
        )
        assert index["weight_map"].keys() == saved_tensors(target).keys()
        sizes = [
            sum(t.nbytes for t in load_file(target / f).values()) for f in files if "-of-" in f
        ]
        assert sum(sizes) == index["metadata"]["total_size"]
        largest = max(t.nbytes for t in saved_tensors(target).values())
        assert max(sizes) <= max(20_000, largest)
    record = json.loads((target / "config.json").read_text())
    assert record["quantization_config"] == QUANTIZATION
    assert record["architectures"] == ["GptOssForCausalLM"]
    assert record.get("dtype", record.get("torch_dtype")) == "bfloat16"
    assert "torchao_mx" not in (target / "config.json").read_text()


@pytest.mark.parametrize("shard", ["5GB", 20_000], ids=["one_file", "sharded"])
def test_stock_reloads_it_bit_equal(source, shard, tmp_path):
    model = from_pretrained(source)
    with torch.no_grad():
        experts_of(model)[0].gate_up_proj_bias.add_(1)  # as training would
        model.lm_head.weight.mul_(2)
    save_pretrained(model, tmp_path / "target", max_shard_size=shard)
    reloaded = stock(tmp_path / "target", torch.bfloat16)
    want = {
        n: t.dequantize() if isinstance(t, MXTensor) else t for n, t in model.state_dict().items()
    }
    assert_same(reloaded.state_dict(), want)


def test_ours_reloads_it_byte_equal(source, tmp_path):
    model = from_pretrained(source)
    save_pretrained(model, tmp_path / "target", max_shard_size="20KB")
    again = from_pretrained(tmp_path / "target")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        got = again.state_dict()[name]
        if isinstance(tensor, MXTensor):
            assert got.packed_axis == tensor.packed_axis == -2
            assert all(map(torch.equal, got.mT.to_blocks(), tensor.mT.to_blocks()))
        else:
            assert torch.equal(got, tensor)
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)


def test_fp32_stays_fp32(source, tmp_path):
    model = from_pretrained(source, dtype=torch.float32)
    save_pretrained(model, tmp_path / "target")
    tensors = saved_tensors(tmp_path / "target")
    assert tensors["lm_head.weight"].dtype == torch.float32
    again = from_pretrained(tmp_path / "target", dtype=torch.float32)
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)


def test_transformers_own_save_pretrained_writes_the_same(source, tmp_path):
    model = from_pretrained(source)
    model.save_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    assert_same(saved_tensors(tmp_path / "theirs"), saved_tensors(tmp_path / "ours"))
    again = from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)


def test_tied_embeddings_are_written_once(tmp_path):
    config = config_of(tie_word_embeddings=True)
    tensors = tensors_of(config)
    del tensors["lm_head.weight"]
    model = from_pretrained(write(tmp_path / "source", config, tensors))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_pretrained(model, tmp_path / "target")
    assert_same(saved_tensors(tmp_path / "target"), tensors)
    again = from_pretrained(tmp_path / "target")
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)


def test_experts_quantized_here_can_be_saved(tmp_path):
    """As PTQ and quantization-aware training leave them, on a model that transformers loaded."""
    config = config_of()
    model = stock(write(tmp_path / "source", config, tensors_of(config)), torch.bfloat16)
    quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
    save_pretrained(model, tmp_path / "target")
    again = from_pretrained(tmp_path / "target")
    for ours, theirs in zip(experts_of(again), experts_of(model), strict=True):
        for name in WEIGHTS:
            want = getattr(theirs, name).dequantize()
            assert torch.equal(getattr(ours, name).dequantize(), want)
    assert stock(tmp_path / "target")(inputs()).logits.isfinite().all()


def test_the_model_is_left_as_it_was(model, tmp_path):
    before = model.config.to_dict(), {n: id(p) for n, p in model.named_parameters()}
    save_pretrained(model, tmp_path / "target")
    assert (model.config.to_dict(), {n: id(p) for n, p in model.named_parameters()}) == before


# --- the folder -----------------------------------------------------------------------------------


def test_an_existing_folder_keeps_what_is_not_the_checkpoint(model, tmp_path):
    target = tmp_path / "target"
    save_pretrained(model, target, max_shard_size=20_000)
    (target / "tokenizer.json").write_text("{}")
    (target / "original").mkdir()
    (target / "original" / "model.safetensors").write_text("kept")
    (target / "pytorch_model-00001-of-00002.bin").write_text("stale")
    save_pretrained(model, target)
    names = {str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "original/model.safetensors",
    }  # fmt: skip
    assert (target / "original" / "model.safetensors").read_text() == "kept"
    assert {f.name for f in tmp_path.iterdir()} == {"source", "target"}


def test_a_model_can_replace_the_folder_it_was_loaded_from(source):
    model = from_pretrained(source)
    want = model(inputs()).logits
    save_pretrained(model, source)
    assert torch.equal(model(inputs()).logits, want)
    assert torch.equal(from_pretrained(source)(inputs()).logits, want)


STEPS = {
    "staging": publish, "_write_configs": writer, "save_file": staging, "sync": publish, "_pending_config": publish,
}  # fmt: skip
FAILURES = [
    (step, old) for step in STEPS for old in (True, False) if old or step != "_pending_config"
]


@pytest.mark.parametrize(("step", "existing"), FAILURES)
def test_a_failure_leaves_the_folder_as_it_was(model, step, existing, tmp_path, monkeypatch):
    target = tmp_path / "deep" / "target"
    if existing:
        save_pretrained(model, target)
        (target / "tokenizer.json").write_text("{}")
    before, names = contents(tmp_path), {f.name for f in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(STEPS[step], step, fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_pretrained(model, target)
    assert contents(tmp_path) == before
    assert {f.name for f in tmp_path.iterdir()} == names  # nor an empty folder
    monkeypatch.undo()
    save_pretrained(model, target)
    assert from_pretrained(target)(inputs()).logits.isfinite().all()


def refused(model, message, target, error=ValueError, **options):
    with pytest.raises(error, match=message) as info:
        save_pretrained(model, target, **options)
    assert not target.exists()
    return str(info.value)


def test_weights_that_the_layout_does_not_hold(model, tmp_path):
    target, module = tmp_path / "target", experts_of(model)[1]
    packed = module.down_proj
    values = packed.dequantize()
    name = r"model\.layers\.1\.mlp\.experts\.down_proj"
    for weight, message in {
        values: rf"{name}: a plain torch.bfloat16 tensor; .*mxfp4",
        MXTensor.from_hp(values.mT.contiguous(), MXFP8_E4M3).mT: rf"{name}: MXTensor.*mxfp8",
        MXTensor.from_hp(values, MXFP4): rf"{name}: MXTensor.*along the input axis",
    }.items():
        module.down_proj = nn.Parameter(weight, requires_grad=False)
        refused(model, message, target)
    module.down_proj = packed
    model.lora = nn.Linear(2, 2)
    refused(model, r"lora\.weight: .* no such tensor.*unload adapters", target)
    del model.lora
    model.model.norm.weight = None
    refused(model, r"model\.norm\.weight: missing", target)


def test_values_that_could_not_be_loaded_again(model, tmp_path):
    target, module = tmp_path / "target", experts_of(model)[0]
    scale = module.gate_up_proj.mT.scale.view(torch.uint8)
    scale[1, 2, 0] = 255
    refused(model, r"layers\.0\..*gate_up_proj_scales: 1 of .* NaN", target)
    scale.zero_()
    module.gate_up_proj.mT.qdata.view(torch.uint8).zero_()
    refused(model, r"gate_up_proj_blocks: .* all zeros", target)


def test_other_models_and_targets(model, tmp_path):
    target = tmp_path / "target"
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )  # fmt: skip
    llama = AutoModelForCausalLM.from_config(config)
    refused(llama, "LlamaForCausalLM has no experts", target, NotImplementedError)
    refused(GptOssForCausalLM(config_of()), "a plain torch.float32 tensor", target)
    for size in ("5 gallons", 0, -1, True, None):
        refused(model, "is not a size", target, max_shard_size=size)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(model, tmp_path / "file")
    refused(nn.Sequential(model), "model is a Sequential", target, TypeError)


def test_modes_are_the_users(model, tmp_path):
    target = tmp_path / "target"
    save_pretrained(model, target)
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    target.chmod(0o750)
    save_pretrained(model, target)
    assert target.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("inner", [96, 64], ids=["I96", "square"])
def test_experts_trained_for_mxfp4_are_saved_as_converted(inner, tmp_path):
    """From high precision, through QAT, to a checkpoint that computes what was trained."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(config_of(inner)).float()
    quantize_(model, QATConfig(MXWeightOnlyConfig(), step="prepare"), filter_fn=is_experts)
    model(inputs(), labels=inputs()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        trained = model(inputs()).logits
    quantize_(model, QATConfig(MXWeightOnlyConfig(), step="convert"), filter_fn=is_experts)
    save_pretrained(model, tmp_path / "model")
    with torch.no_grad():
        ours = from_pretrained(tmp_path / "model", dtype=torch.float32)
        assert torch.equal(ours(inputs()).logits, trained)
    theirs = stock(tmp_path / "model")
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, MXTensor)}
    assert len(packed) == 4
    for name, p in packed.items():
        assert torch.equal(theirs.get_parameter(name), p.dequantize()), name
