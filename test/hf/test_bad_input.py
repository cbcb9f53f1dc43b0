"""Checkpoints that from_pretrained refuses: each problem named, before anything is built or changed."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from test_load import (
    LAYERS,
    QUANTIZATION,
    E,
    config_of,
    contents,
    tensors_of,
    write,
    write_llama,
)

from torchao_mx import MXWeightOnlyConfig
from torchao_mx.hf import from_pretrained

LAYER = "model.layers.1.mlp.experts."


def edit(name, change):
    """A mutation of a checkpoint's tensors: ``change`` of the one called ``name``; None removes it."""

    def mutate(tensors):
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new.contiguous()

    return mutate


def both(*mutations):
    def mutate(tensors):
        for mutation in mutations:
            mutation(tensors)

    return mutate


def add(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def poke(scales):
    scales = scales.clone()
    scales[2, 5, 1] = 255
    return scales


GATE, DOWN = f"{LAYER}gate_up_proj", f"{LAYER}down_proj"
BAD_TENSORS = {
    "no scales": (edit(f"{DOWN}_scales", lambda t: None), "down_proj_scales: missing, but .*_blocks is there"),
    "no blocks": (edit(f"{DOWN}_blocks", lambda t: None), "down_proj_blocks: missing, but .*_scales is there"),
    "neither": (
        both(edit(f"{GATE}_blocks", lambda t: None), edit(f"{GATE}_scales", lambda t: None)),
        "gate_up_proj_blocks: missing; download",
    ),
    "unpacked": (
        both(
            edit(f"{GATE}_blocks", lambda t: None),
            edit(f"{GATE}_scales", lambda t: None),
            add(GATE, torch.zeros(E, 64, 192, dtype=torch.bfloat16)),
        ),
        "gate_up_proj_blocks: missing, but .*gate_up_proj is there unpacked",
    ),
    "no bias": (edit(f"{DOWN}_bias", lambda t: None), "down_proj_bias: missing"),
    "no norm": (edit("model.norm.weight", lambda t: None), "model.norm.weight: missing"),
    "extra expert tensor": (add(f"{LAYER}up_proj_blocks", torch.zeros(1, dtype=torch.uint8)), "up_proj_blocks: .* no place"),
    "extra layer": (
        add("model.layers.2.mlp.experts.down_proj_scales", torch.zeros(1, dtype=torch.uint8)),
        r"layers.2.mlp.experts.down_proj_scales: .* no place",
    ),
    "half the experts": (
        both(edit(f"{GATE}_blocks", lambda t: t[:2]), edit(f"{GATE}_scales", lambda t: t[:2])),
        r"gate_up_proj_blocks: has shape \(2, .* asks for \(4, ",
    ),
    "transposed": (edit(f"{DOWN}_blocks", lambda t: t.mT), "down_proj_blocks: has shape"),
    "flat": (edit(f"{DOWN}_blocks", lambda t: t.flatten(-2)), "down_proj_blocks: has shape"),
    "blocks as int8": (edit(f"{DOWN}_blocks", lambda t: t.view(torch.int8)), "down_proj_blocks: has dtype I8"),
    "scales as bf16": (edit(f"{DOWN}_scales", lambda t: t.bfloat16()), "down_proj_scales: has dtype BF16"),
    "bias as uint8": (edit(f"{DOWN}_bias", lambda t: t.byte()), "down_proj_bias: has dtype U8"),
    "nan scale": (edit(f"{DOWN}_scales", poke), r"down_proj_scales: 1 of .* NaN \(byte 255\), the first at \(2, 5, 1\)"),
    "placeholders": (
        both(edit(f"{GATE}_blocks", torch.zeros_like), edit(f"{GATE}_scales", torch.zeros_like)),
        "gate_up_proj_blocks: it and gate_up_proj_scales are all zeros",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3], ids=["one_file", "sharded"])
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, shards, tmp_path):
    mutate, message = BAD_TENSORS[case]
    config = config_of()
    tensors = tensors_of(config)
    mutate(tensors)
    refused(write(tmp_path / "model", config, tensors, shards), message)


def refused(folder, message, error=ValueError, **options):
    before = contents(folder)
    with pytest.raises(error, match=message) as info:
        from_pretrained(folder, **options)
    assert contents(folder) == before
    return str(info.value)


def test_a_model_of_broken_blocks(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    config.intermediate_size = 80
    refused(write(tmp_path / "model", config, tensors), "down_proj has shape .*80.* multiple of 32")


def test_a_folder_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", "~/nowhere"):
        with pytest.raises(ValueError, match="no such folder"):
            from_pretrained(path)


def test_every_bad_tensor_is_named_at_once(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    for layer in range(LAYERS):
        del tensors[f"model.layers.{layer}.mlp.experts.down_proj_scales"]
    text = refused(write(tmp_path / "model", config, tensors), "cannot be loaded")
    assert "layers.0.mlp" in text and "layers.1.mlp" in text


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.001], ids=["tail", "half", "header"])
def test_a_file_cut_short(keep, tmp_path):
    config = config_of()
    folder = write(tmp_path / "model", config, tensors_of(config))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(keep * len(data))])
    refused(folder, "cut short")


def test_shards(tmp_path):
    config = config_of()

    def fresh(name):
        return write(tmp_path / name, config, tensors_of(config), 3)

    folder = fresh("missing")
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors: .* missing")
    folder = fresh("elsewhere")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{DOWN}_scales"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "down_proj_scales: in model-00002.*different checkpoints")
    folder = fresh("lost")
    index["weight_map"][f"{DOWN}_scales"] = "model-00002-of-00003.safetensors"
    index["weight_map"]["model.ghost"] = "model-00003-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.ghost: .* which does not contain it")
    folder = fresh("no_index")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "a JSON list, not a JSON object")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "not an index of shards")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "neither model.safetensors nor")


def test_configs(tmp_path):
    llama = write_llama(tmp_path / "llama")
    config = config_of()
    tensors = tensors_of(config)
    folder = write(tmp_path / "a", config, tensors, quantization={"quant_method": "fp8"})
    refused(folder, "quant_method='fp8'; only 'mxfp4' is read here")
    folder = write(tmp_path / "b", config, tensors, quantization={"bits": 4})
    refused(folder, "names no quant_method")
    folder = write(tmp_path / "c", config, tensors, quantization=None)
    refused(folder, "_blocks: packed, but .* no quantization_config")
    folder = write(tmp_path / "d", config, tensors)
    refused(folder, "packed in mxfp4 already", config=MXWeightOnlyConfig())
    refused(folder, "give a config of quantize_", TypeError, config=config)
    refused(folder, "quantization_config: not supported", TypeError, quantization_config={})
    refused(folder, "tp_plan: not supported", TypeError, tp_plan="auto")
    refused(folder, "bfloat16, float16 or float32", TypeError, dtype=torch.int8)
    refused(llama, "high precision; say how", ValueError)
    record = json.loads((llama / "config.json").read_text())
    record["quantization_config"] = QUANTIZATION
    (llama / "config.json").write_text(json.dumps(record))
    refused(llama, "no tensor is called.* Remove quantization_config")
    packed = {"model.norm_blocks": torch.zeros(1, dtype=torch.uint8)}
    save_file(load_file(llama / "model.safetensors") | packed, llama / "model.safetensors")
    refused(llama, "LlamaForCausalLM has no experts", NotImplementedError)


def test_layers_that_cannot_be_quantized_are_named_before_loading(tmp_path):
    write_llama(tmp_path, hidden_size=48)
    save_file({"x": torch.zeros(8)}, tmp_path / "model.safetensors")
    config = MXWeightOnlyConfig()
    message = r"layers\.0\.self_attn\.q_proj: .*48"
    refused(tmp_path, message, config=config, filter_fn=lambda m, name: name.endswith("q_proj"))
