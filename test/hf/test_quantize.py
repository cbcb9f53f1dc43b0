"""from_pretrained of checkpoints in high precision, whose weights are packed while they are loaded.

The oracle loads in ``dtype`` with transformers and then calls ``quantize_``.
"""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import json
import os
import re
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
from _grids import generator
from safetensors.torch import load_file, save_file
from test_load import V5, WEIGHTS, contents, experts_of, inputs, moe_models, stock, v5_only
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoConfig, AutoModelForCausalLM

from torchao_mx import (
    MXDynamicActivationMXWeightConfig,
    MXExperts,
    MXFakeQuantizedLinear,
    MXLoRALinear,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    is_experts,
    is_linear,
)
from torchao_mx.hf import from_pretrained, load, save_pretrained

MXFP4 = MXWeightOnlyConfig()
CONFIGS = {
    "mxfp4": MXFP4,
    "mxfp8": MXWeightOnlyConfig(torch.float8_e4m3fn),
    "nvfp4": MXWeightOnlyConfig(block_size=16),
    "w4a8": MXDynamicActivationMXWeightConfig(torch.float8_e4m3fn, torch.float4_e2m1fn_x2),
}
DENSE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, max_position_embeddings=64,
)  # fmt: skip
MODELS = {"llama": DENSE, "qwen3": DENSE | {"head_dim": 16}, **moe_models()}
DOWN = "model.layers.1.mlp.experts.down_proj"  # of gpt-oss
LAYER = "model.layers.1.self_attn.q_proj.weight"


def checkpoint(folder, name="gpt_oss", dtype=torch.bfloat16, shards="5GB", **fields):
    """A folder as transformers saves it, of tensors that all differ from what a model is made with."""
    config = AutoConfig.for_model(name, **(MODELS.get(name, {}) | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    g = generator(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def selected(module, name):
    """What from_pretrained promises to quantize."""
    leaf = name.rpartition(".")[2]
    return is_experts(module) or (is_linear(module) and leaf not in ("lm_head", "gate", "router"))


def oracle(folder, config=MXFP4, dtype=torch.bfloat16, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    quantize_(model, config, filter_fn=selected)
    return model


def assert_same(got, want):
    """Modules, and parameters and buffers in every field."""
    assert repr(got) == repr(want)
    tensors = [list(model.state_dict(keep_vars=True).items()) for model in (got, want)]
    for (name, a), (other, b) in zip(*tensors, strict=True):
        assert name == other and type(a) is type(b), (name, other)
        assert a.requires_grad == b.requires_grad, name
        assert isinstance(a, nn.Parameter) == isinstance(b, nn.Parameter), name
        fields = [(a, b)]
        if isinstance(a, MXTensor):
            data = a.tensor_data_names + a.optional_tensor_data_names
            attributes = a.tensor_attribute_names + a.optional_tensor_attribute_names
            fields = [(getattr(a, f), getattr(b, f)) for f in data]
            assert all(getattr(a, f) == getattr(b, f) for f in attributes), name
        for x, y in fields:
            assert (x is None) == (y is None), name
            if x is not None:
                assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride()), name
                assert torch.equal(bytes_of(x), bytes_of(y)), name


def bytes_of(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def packed_names(model):
    return {n for n, p in model.named_parameters() if isinstance(p, MXTensor)}


@pytest.fixture
def late(monkeypatch):
    """The names of the modules that are quantized once the model is loaded."""
    names = []

    def spy(model, config, filter_fn):
        names.extend(name for name, module in model.named_modules() if filter_fn(module, name))
        quantize_(model, config, filter_fn=filter_fn)

    monkeypatch.setattr(load, "quantize_", spy)
    return names


# --- what is made of the weights ------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_loading_and_then_quantizing(name, config, tmp_path, late):
    folder = checkpoint(tmp_path, name, shards="30kB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    got, want = from_pretrained(folder, config=CONFIGS[config]), oracle(folder, CONFIGS[config])
    assert_same(got, want)
    assert not late
    with torch.no_grad():
        assert torch.equal(got(inputs()).logits, want(inputs()).logits)


def test_what_is_packed(tmp_path):
    """Spelled out, for the oracle selects as much as is promised."""
    model = from_pretrained(checkpoint(tmp_path / "a"), config=MXFP4)
    layers = [f"model.layers.{i}." for i in range(2)]
    attention = {f"{a}self_attn.{p}_proj.weight" for a in layers for p in "qkvo"}
    assert packed_names(model) == attention | {
        f"{a}mlp.experts.{w}" for a in layers for w in WEIGHTS
    }
    for module in experts_of(model):
        assert isinstance(module, MXExperts)
        assert module.source_class.__name__ == "GptOssExperts"
        assert module.down_proj.packed_axis == -2 and not module.down_proj.requires_grad
        assert module.down_proj_bias.requires_grad
    model = from_pretrained(checkpoint(tmp_path / "b", "mixtral"), config=MXFP4)
    assert not any(
        "gate.weight" in n or "lm_head" in n or "embed" in n for n in packed_names(model)
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(stored, dtype, tmp_path):
    folder = checkpoint(tmp_path, dtype=stored)
    got = from_pretrained(folder, config=MXFP4, dtype=dtype)
    assert_same(got, oracle(folder, dtype=dtype))
    packed = [p for p in got.parameters() if isinstance(p, MXTensor)]
    assert packed and {p.orig_dtype for p in packed} == {dtype}


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_tied_embeddings(name, tmp_path):
    folder = checkpoint(tmp_path, name, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = from_pretrained(folder, config=MXFP4)
    assert_same(model, oracle(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_biases_of_linear_layers(tmp_path):
    folder = checkpoint(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    assert_same(from_pretrained(folder, config=MXFP4), oracle(folder))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_device_maps(name, device_map, tmp_path):
    pytest.importorskip("accelerate")
    folder = checkpoint(tmp_path, name, shards="30kB")
    model = from_pretrained(folder, config=MXFP4, device_map=device_map)
    want = oracle(folder).to(model.device)
    assert_same(model, want)
    ids = inputs().to(model.device)
    assert torch.equal(model(ids).logits, want(ids).logits)


@pytest.mark.parametrize("config", CONFIGS)
def test_device_maps_count_packed_bytes(config, tmp_path):
    """What fits packed is not spread over further places."""
    pytest.importorskip("accelerate")
    folder = checkpoint(
        tmp_path, "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4
    )
    model = from_pretrained(folder, config=CONFIGS[config])
    parts = [(p.qdata, p.scale) if isinstance(p, MXTensor) else (p,) for p in model.parameters()]
    size = sum(t.nbytes for tensors in parts for t in tensors)
    unpacked = sum(2 * p.numel() for p in model.parameters())
    assert 1.4 * size < unpacked
    options = {
        "config": CONFIGS[config],
        "device_map": "auto",
        "offload_folder": tmp_path / "offload",
    }
    for memory, fits in {int(1.3 * size): True, size // 2: False}.items():
        places = {"max_memory": {"cpu": memory}}
        if fits:
            assert_same(from_pretrained(folder, **options, **places), model)
        else:
            with pytest.raises(ValueError, match="packed weights are not offloaded"):
                from_pretrained(folder, **options, **places)


# --- what cannot be packed weight by weight --------------------------------------------------------


def linear_names(model):
    return [name for name, module in model.named_modules() if selected(module, name)]


def test_other_configs_are_given_to_quantize(tmp_path, late):
    folder = checkpoint(tmp_path, "llama")
    config = QATConfig(MXFP4, step="prepare")
    model = from_pretrained(folder, config=config)
    assert_same(model, oracle(folder, config))
    assert isinstance(model.model.layers[0].mlp.up_proj, MXFakeQuantizedLinear)
    lora = MXWeightOnlyLoRAConfig(r=4)
    model = from_pretrained(folder, config=lora)
    assert isinstance(model.model.layers[0].mlp.up_proj, MXLoRALinear)
    assert late == 2 * linear_names(model)
    packed = from_pretrained(folder, config=MXFP4)  # as the docstring advises
    quantize_(packed, lora, filter_fn=selected)
    assert repr(packed) == repr(model)
    assert torch.equal(packed(inputs()).logits, model(inputs()).logits)  # adapters are zero


def test_tensors_with_a_dtype_of_their_own_keep_it(tmp_path, late):
    """Mamba's A_log, which transformers 4 has in fp32 and would cast to bf16."""
    fields = dict(
        hidden_size=64, num_hidden_layers=1, vocab_size=128, state_size=16, time_step_rank=32
    )
    folder = checkpoint(tmp_path, "mamba", **fields)
    model = from_pretrained(folder, config=MXFP4, filter_fn=selected)
    assert_same(model, oracle(folder))
    assert len(packed_names(model)) == 4
    own = model.backbone.layers[0].mixer.A_log.dtype != torch.bfloat16
    assert late == (linear_names(model) if own else [])


def test_weights_with_a_dtype_of_their_own_are_packed_from_it(tmp_path, late):
    """The routers of this model, which only a filter_fn selects."""
    fields = dict(num_experts=4, num_experts_per_tok=2, head_dim=16)
    folder = checkpoint(tmp_path, "hunyuan_v1_moe", **DENSE, **fields, dtype=torch.float32)
    model = from_pretrained(folder, config=MXFP4, filter_fn=selected)
    assert_same(model, oracle(folder))
    own = [n for n in linear_names(model) if n.endswith("mlp.gate.wg")]
    assert {model.get_submodule(n).weight.orig_dtype for n in own} == {torch.float32}
    assert late == (own if V5 else linear_names(model))


def test_ignored_sizes(tmp_path, late):
    """The weights of another shape are initialized, and packed as the others are."""
    folder = checkpoint(tmp_path, "llama")
    edit(folder, lambda tensors: tensors.update({LAYER: torch.ones(32, 64, dtype=torch.bfloat16)}))
    model = from_pretrained(folder, config=MXFP4, ignore_mismatched_sizes=True)
    assert packed_names(model) == packed_names(oracle(folder, ignore_mismatched_sizes=True))
    assert late == linear_names(model)


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import re, sys, threading, time
import torch
from torchao_mx import MXWeightOnlyConfig
from torchao_mx.hf import from_pretrained

torch.set_num_threads(1)  # others would spin

def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"RssAnon:\\s*(\\d+) kB", file.read())[1])

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(5e-4)

options = {"config": MXWeightOnlyConfig(), "dtype": getattr(torch, sys.argv[3])}
from_pretrained(sys.argv[1], **options)  # what a first use allocates for good
sys.setswitchinterval(1e-4)
before = peak = anonymous()
done = False
thread = threading.Thread(target=watch)
thread.start()
model = from_pretrained(sys.argv[2], **options)
done = True
thread.join()
print("peak", peak - before, "end", anonymous() - before)
"""
LARGE = {
    "llama": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=16),
    "gpt_oss": dict(
        hidden_size=512, intermediate_size=512, num_local_experts=8, num_hidden_layers=12
    ),
    "qwen3_moe": dict(
        hidden_size=512, moe_intermediate_size=512, num_experts=8, num_hidden_layers=12
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    # float16 is not the file's dtype, so that a tensor that is read is memory, not a view of the mapped file.
    [
        ("llama", "float16"),
        ("gpt_oss", "float16"),
        pytest.param("qwen3_moe", "bfloat16", marks=v5_only),
    ],
)
def test_the_model_is_never_in_memory_in_high_precision(name, dtype, tmp_path):
    """Peak memory, without the mapped files' pages, which the system can take back."""
    small = checkpoint(tmp_path / "small", name)
    large = checkpoint(tmp_path / "large", name, shards="30MB", **LARGE[name])
    assert len(list(large.glob("*.safetensors"))) > 3
    command = [sys.executable, "-c", PEAK, str(small), str(large), dtype]
    # So that malloc returns what is freed: its pools would be measured otherwise.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, end = (int(n) for n in re.search(r"peak (\d+) end (\d+)", result.stdout).groups())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(large))
    unpacked = sum(2 * p.numel() for p in skeleton.parameters())
    assert unpacked > 100e6
    packed = unpacked * (4 + 8 / 32) / 16  # all but a thousandth of the model
    assert packed <= end < 1.2 * packed  # the measure works
    assert peak < packed + unpacked / 4, (peak, packed, unpacked)


# --- damaged checkpoints ---------------------------------------------------------------------------


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, *messages, **options):
    before = contents(folder)
    with pytest.raises(ValueError, match=r"cannot be loaded|has shape") as info:
        from_pretrained(folder, config=MXFP4, **options)
    for message in messages:
        assert re.search(message, str(info.value)), (message, str(info.value))
    assert contents(folder) == before


@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_missing_weights_are_named_and_not_made_up(device_map, tmp_path):
    pytest.importorskip("accelerate")
    folder = checkpoint(tmp_path)
    edit(folder, lambda tensors: [tensors.pop(name) for name in (LAYER, DOWN)])
    refused(folder, f"{LAYER}: missing", f"{DOWN}: missing", device_map=device_map)


@pytest.mark.parametrize("name", [LAYER, DOWN])
def test_weights_of_another_shape(name, tmp_path):
    folder = checkpoint(tmp_path)
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:2].clone()}))
    refused(folder, rf"{name}: has shape \(2, .* config\.json asks for \(\d\d?, ")


@v5_only
def test_experts_that_do_not_merge(tmp_path):
    """One of four experts is missing."""
    folder = checkpoint(tmp_path, "qwen3_moe")
    edit(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.down_proj.weight"))
    name = r"model\.layers\.0\.mlp\.experts\.down_proj"
    refused(folder, rf"{name}: has shape \(3, 64, 32\), but .* \(4, 64, 32\)")


# --- afterwards -----------------------------------------------------------------------------------


def test_the_config_names_no_quantization(tmp_path):
    folder = checkpoint(tmp_path / "model")
    model = from_pretrained(folder, config=CONFIGS["w4a8"])
    assert model.config.to_dict() == oracle(folder, CONFIGS["w4a8"]).config.to_dict()
    assert not hasattr(model.config, "quantization_config")
    model.config.save_pretrained(tmp_path / "config")
    assert "torchao_mx" not in (tmp_path / "config" / "config.json").read_text()


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_transformers_save_pretrained_says_what_to_do(name, tmp_path):
    model = from_pretrained(checkpoint(tmp_path / "model", name), config=MXFP4)
    message = (
        r"ForCausalLM holds weights in mxfp4, .* no layout; use torchao_mx\.hf\.save_pretrained"
    )
    with pytest.raises(NotImplementedError, match=message):
        model.save_pretrained(tmp_path / "saved")
    assert not contents(tmp_path / "saved")


def test_a_state_dict_can_be_stored(tmp_path):
    folder = checkpoint(tmp_path / "model", "llama")
    model, again = (from_pretrained(folder, config=MXFP4) for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for parameter in again.parameters():
            if not isinstance(parameter, MXTensor):
                parameter.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt"), assign=True)
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)


def test_gpt_oss_is_saved_in_the_published_layout(tmp_path):
    """With the values of its attention's packed weights unpacked, as that layout packs experts only."""
    model = from_pretrained(checkpoint(tmp_path / "model"), config=MXFP4)
    query = model.model.layers[1].self_attn.q_proj
    assert isinstance(query.weight, MXTensor)
    save_pretrained(model, tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert record["quantization_config"]["quant_method"] == "mxfp4"
    blocks, scales = (
        load_file(tmp_path / "saved" / "model.safetensors")[DOWN + s]
        for s in ("_blocks", "_scales")
    )
    weight = experts_of(model)[1].down_proj
    assert all(map(torch.equal, weight.mT.to_blocks(), (blocks, scales)))
    again = from_pretrained(tmp_path / "saved")
    assert torch.equal(experts_of(again)[1].down_proj.qdata, weight.qdata)
    plain = stock(tmp_path / "saved")
    assert torch.equal(plain.get_parameter(DOWN), weight.dequantize().float())
    assert torch.equal(
        plain.model.layers[1].self_attn.q_proj.weight, query.weight.dequantize().float()
    )
    with torch.no_grad():
        assert torch.equal(again(inputs()).logits, model(inputs()).logits)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "bare"])
def test_trainer_and_peft_take_it(name, adapters, tmp_path):
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    folder = checkpoint(tmp_path / "model", name)
    model = from_pretrained(folder, config=MXFP4, dtype=torch.float32)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
    packed = {n: p.qdata.clone() for n, p in model.named_parameters() if isinstance(p, MXTensor)}
    if adapters:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) == adapters
    args = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="steps" if adapters else "no", save_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in inputs(4)]
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data)
    assert trainer.train().training_loss > 0
    changed = [
        n for n, p in model.named_parameters() if n in trained and not torch.equal(p, trained[n])
    ]
    assert changed
    base = model.unload() if adapters else model
    assert all(torch.equal(base.get_parameter(n).qdata, q) for n, q in packed.items())
    if adapters:
        files = {f.name for f in (tmp_path / "run" / "checkpoint-2").glob("*.safetensors")}
        assert files == {"adapter_model.safetensors"}


def test_adapters_that_transformers_adds_are_saved_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = from_pretrained(checkpoint(tmp_path / "model", "llama"), config=MXFP4)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    files = {f.name for f in (tmp_path / "adapter").glob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}
    again = from_pretrained(tmp_path / "model", config=MXFP4)
    again.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again(inputs()).logits, model(inputs()).logits)
