"""Every tensor of a model comes from the checkpoint that is quantized while it loads: none is made up, none left."""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from test_load import write_llama
from test_quantize import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from torchao_mx import MXWeightOnlyConfig
from torchao_mx.hf import from_pretrained, load
from torchao_mx.hf.checkpoint import read_folder
from torchao_mx.hf.config import skeleton_of

PTQ = MXWeightOnlyConfig()
LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "layer's norm": "model.layers.1.input_layernorm.weight",
    "bias": "model.layers.0.self_attn.q_proj.bias",
    "linear": "model.layers.1.mlp.down_proj.weight",
}
MOE = {
    "router": "model.layers.0.mlp.gate.weight",
    "expert": "model.layers.1.mlp.experts.2.up_proj.weight",
    "expert's first": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "expert's last": "model.layers.1.mlp.experts.3.down_proj.weight",
    "attention": "model.layers.1.self_attn.o_proj.weight",
    "q_norm": "model.layers.1.self_attn.q_norm.weight",
}
CASES = [("llama", name) for name in LLAMA.values()] + [
    ("qwen3_moe", name) for name in MOE.values()
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    fields = {"llama": {"attention_bias": True}, "qwen3_moe": {}}
    root = tmp_path_factory.mktemp("complete")
    return {name: checkpoint(root / name, name, **f) for name, f in fields.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """A checkpoint whose tensors are changed."""

    def changed(name, change):
        tensors = load_file(folders[name] / "model.safetensors")
        change(tensors)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file in folders[name].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = {n: t.contiguous() for n, t in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return changed


@pytest.fixture
def unloaded(monkeypatch):
    """No refusal may wait for transformers to load the model."""
    pytest.importorskip("accelerate")  # without it the load itself reports
    monkeypatch.setattr(
        load, "load_whole", lambda *args, **options: pytest.fail("loaded"), raising=False
    )


def refused(folder, *parts, config=PTQ, **options):
    with pytest.raises(ValueError, match="cannot be loaded") as info:
        from_pretrained(folder, config=config, **options)
    for part in parts:
        assert part in str(info.value), info.value


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda x: str(x))
@pytest.mark.usefixtures("unloaded")
def test_missing_or_renamed(model, name, copy):
    refused(copy(model, lambda tensors: tensors.pop(name)), f"{name}: missing")
    refused(copy(model, rename(name, f"{name}s")), f"{name}: missing")


@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda x: str(x))
@pytest.mark.usefixtures("unloaded")
def test_of_another_shape_or_dtype(model, name, copy):
    def reshaped(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    stem = name if ".experts." not in name else name.split("experts.")[0]
    refused(copy(model, reshaped), stem, "has shape")

    def integers(tensors):
        tensors[name] = tensors[name].to(torch.int8)

    refused(copy(model, integers), f"{name}: has dtype I8")


@pytest.mark.usefixtures("unloaded")
def test_left_over(copy):
    """A bias that the config does without, a layer too many, one too few in the config."""
    bias = torch.ones(64, dtype=torch.bfloat16)
    for name in (
        "model.layers.0.mlp.down_proj.bias", "model.layers.2.mlp.up_proj.weight", "lm_head.bias",
        "model.norm.bias",
    ):  # fmt: skip
        refused(
            copy("llama", lambda tensors, name=name: tensors.update({name: bias})),
            f"{name}: the model",
        )
    folder = copy("llama", lambda tensors: None)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"num_hidden_layers": 1}))
    refused(folder, "model.layers.1.mlp.down_proj.weight: the model")
    refused(copy("llama", lambda tensors: None), "layers.1", num_hidden_layers=1)
    twice = copy(
        "llama", lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] + 1})
    )
    refused(twice, "norm.weight: present twice")


@pytest.mark.usefixtures("unloaded")
def test_experts_out_of_order(copy):
    """transformers 5 stacks them by their order, so that 0, 1, 3, 7 would be taken for 0 to 3."""

    def change(tensors):
        for name in list(tensors):
            if ".1.mlp.experts.2." in name:
                tensors[name.replace("experts.2.", "experts.7.")] = tensors.pop(name)

    folder = copy("qwen3_moe", change)
    refused(
        folder,
        "layers.1.mlp.experts.2.down_proj.weight: missing",
        "experts.7.up_proj.weight: there are only 4",
    )


def test_other_parts_stay_behind(copy):
    """What belongs to no module of the model: another head, an encoder of images, layers for further tokens."""
    names = [
        "score.weight",
        "vision_tower.layers.0.weight",
        "model.visual.blocks.0.weight",
        "mtp.layers.0.weight",
    ]
    folder = copy("llama", lambda tensors: tensors.update({n: torch.ones(2) for n in names}))
    model = from_pretrained(folder, config=PTQ)
    assert not [n for n, _ in model.named_parameters() if n in names]
    further = {"model.layers.2.mlp.up_proj.weight": torch.ones(2)}
    folder = copy("llama", lambda tensors: tensors.update(further))
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"num_nextn_predict_layers": 1}))
    from_pretrained(folder, config=PTQ)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_loads(tied, tmp_path):
    folder = checkpoint(tmp_path, "llama", tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from_pretrained(folder, config=PTQ)


def test_the_load_reports_what_the_dry_run_could_not(copy, monkeypatch):
    """As where Accelerate is missing."""
    from torchao_mx.hf import complete

    monkeypatch.setattr(complete, "_dry_run", lambda *args: None)
    refused(copy("llama", lambda tensors: tensors.pop("lm_head.weight")), "lm_head.weight: missing")


def test_a_new_head(folders):
    """A classifier of a language model's weights has to have a head of its own; nothing else may be new."""
    pytest.importorskip("accelerate")
    from torchao_mx.hf.complete import check_complete

    folder = folders["llama"]
    config = AutoModelForCausalLM.from_pretrained(folder).config
    skeleton = skeleton_of(AutoModelForSequenceClassification.from_config, config)
    entries = read_folder(folder)
    check_complete(entries, skeleton, folder, new_head=True)
    with pytest.raises(ValueError, match=r"score\.weight: missing"):
        check_complete(entries, skeleton, folder)
    del entries["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight: missing"):
        check_complete(entries, skeleton, folder, new_head=True)


def test_weights_in_high_precision_that_config_json_calls_packed(tmp_path):
    """One answer, whichever way it is asked."""
    folder = write_llama(tmp_path)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(record | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    for options in ({}, {"config": PTQ}):
        with pytest.raises(ValueError, match=r"Remove quantization_config from config\.json"):
            from_pretrained(folder, **options)


def test_options_that_read_other_files(folders):
    for options in (
        {"use_safetensors": False},
        {"from_tf": True},
        {"variant": "fp16"},
        {"subfolder": "x"},
    ):
        with pytest.raises(TypeError, match=f"{next(iter(options))}"):
            from_pretrained(folders["llama"], config=PTQ, **options)


def test_an_adapter_in_the_same_folder(copy):
    folder = copy("llama", lambda tensors: None)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: an adapter beside a whole model"):
        from_pretrained(folder, config=PTQ)
