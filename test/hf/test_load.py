"""from_pretrained and the experts implementation, on tiny random gpt-oss checkpoints as they are published.

The oracle is transformers itself: the same checkpoint, dequantized, under eager experts.
"""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import json
import subprocess
import sys

import pytest
import torch
from _grids import generator, relative_error
from torch import nn
from torchao.quantization import quantize_

transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

from torchao_mx import MXFP4, MXTensor, MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.hf import from_pretrained
from torchao_mx.hf.versions import is_v5, is_v5_version

V5 = int(transformers.__version__.split(".")[0]) >= 5
v5_only = pytest.mark.skipif(not V5, reason="an interface of transformers v5")
E, LAYERS = 4, 2
WEIGHTS = ("gate_up_proj", "down_proj")
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


# --- checkpoints ----------------------------------------------------------------------------------


def config_of(intermediate=96, **fields):
    return GptOssConfig(
        num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=intermediate, num_local_experts=E,
        num_experts_per_tok=2, vocab_size=128, head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=8, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, **fields,
    )  # fmt: skip


def tensors_of(config, seed=0):
    """What a published checkpoint holds: every byte a block may have, scales around 1 / sqrt(K)."""
    g = generator(seed)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in GptOssForCausalLM(config).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(WEIGHTS):
            e, c, d = shape
            blocks = torch.randint(0, 256, (e, d, c // 32, 16), dtype=torch.uint8, generator=g)
            scales = torch.randint(120, 125, (e, d, c // 32), dtype=torch.uint8, generator=g)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        elif "norm" in name:
            tensors[name] = (1 + 0.1 * torch.randn(shape, generator=g)).bfloat16()
        else:
            scale = 1 if "embed" in name else 0.2
            tensors[name] = (scale * torch.randn(shape, generator=g)).bfloat16()
    return tensors


def write(folder, config, tensors, shards=1, quantization=QUANTIZATION):
    """A folder as the Hub has it. With 3 shards, blocks, scales and the rest are a file each."""
    folder.mkdir(exist_ok=True)
    record = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    if quantization is not None:
        record["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(record, default=str))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    suffixes = ("_blocks", "_scales", "")
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    places = {n: names[next(i for i, s in enumerate(suffixes) if n.endswith(s))] for n in tensors}
    for name in names:
        save_file({n: tensors[n] for n in tensors if places[n] == name}, folder / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_llama(folder, hidden_size=64):
    """A dense model in bf16."""
    config = transformers.LlamaConfig(
        hidden_size=hidden_size, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(params=[96, 64], ids=["I96", "square"])
def config(request):
    return config_of(request.param)


@pytest.fixture(params=[1, 3], ids=["one_file", "sharded"])
def folder(request, config, tmp_path):
    return write(tmp_path / "model", config, tensors_of(config), request.param)


def stock(folder, dtype=torch.float32):
    """transformers' own model, its experts dequantized, exact in fp32 as in bf16."""
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    return model.to(dtype)


def inputs(batch=2, length=13, seed=1):
    return torch.randint(0, 128, (batch, length), generator=generator(seed))


def experts_of(model):
    return [layer.mlp.experts for layer in model.model.layers]


# --- values ---------------------------------------------------------------------------------------


def test_bytes_and_shapes_are_the_checkpoints(folder, config):
    model = from_pretrained(folder)
    tensors = tensors_of(config)
    for i, module in enumerate(experts_of(model)):
        for name in WEIGHTS:
            weight = getattr(module, name)
            assert isinstance(weight, MXTensor) and isinstance(weight, nn.Parameter)
            assert not weight.requires_grad and weight.dtype == torch.bfloat16
            assert weight.format == MXFP4 and weight.packed_axis == -2
            blocks, scales = weight.mT.to_blocks()
            key = f"model.layers.{i}.mlp.experts.{name}"
            assert torch.equal(blocks, tensors[f"{key}_blocks"])
            assert torch.equal(scales, tensors[f"{key}_scales"])
        assert module.gate_up_proj.shape == (E, 64, 2 * config.intermediate_size)
        assert module.down_proj.shape == (E, config.intermediate_size, 64)


def test_logits_in_fp32_are_those_of_the_dequantized_model(folder):
    ours, theirs = from_pretrained(folder, dtype=torch.float32), stock(folder)
    with torch.no_grad():
        assert torch.equal(ours(inputs()).logits, theirs(inputs()).logits)


def test_logits_in_bf16(folder):
    ours, theirs = from_pretrained(folder), stock(folder)
    with torch.no_grad():
        got, want = ours(inputs()).logits, theirs(inputs()).logits
    assert got.dtype == torch.bfloat16
    # Of most tokens: rounding sends one or the other to another expert, in transformers' bf16 model as well.
    errors = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors.median() <= 2e-2


def gradients(model, seed=2):
    """By name, of a random projection of the logits."""
    model.train()
    logits = model(inputs()).logits
    (logits * torch.randn(logits.shape, generator=generator(seed))).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_those_of_the_dequantized_model(folder):
    got = gradients(from_pretrained(folder, dtype=torch.float32))
    want = gradients(stock(folder))
    trained = {n for n in want if not n.endswith(WEIGHTS)}
    assert got.keys() == trained
    assert {n for n in trained if "router" in n or "proj_bias" in n or "embed" in n}
    for name in trained:
        assert relative_error(got[name], want[name]) < 1e-5, name


def test_generates_what_the_dequantized_model_does(tmp_path):
    config = config_of()
    folder = write(tmp_path / "model", config, tensors_of(config))
    options = {"max_new_tokens": 6, "do_sample": False}
    mask = torch.ones(1, 5, dtype=torch.int64)
    got, want = (
        model.generate(inputs(1, 5), attention_mask=mask, **options)
        for model in (from_pretrained(folder, dtype=torch.float32), stock(folder))
    )
    assert torch.equal(got, want)


def test_trainer_would_take_it(folder):
    quantizer = from_pretrained(folder).hf_quantizer
    assert quantizer.is_trainable and quantizer.is_qat_trainable


def test_loading_twice_gives_the_same_and_leaves_the_folder_alone(folder):
    before = contents(folder)
    first, second = (from_pretrained(folder).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert contents(folder) == before


def contents(folder):
    """All that a refusal must leave alone."""
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map, tmp_path):
    pytest.importorskip("accelerate")
    config = config_of()
    folder = write(tmp_path / "model", config, tensors_of(config), 3)
    model = from_pretrained(folder, device_map=device_map)
    assert {p.device.type for p in experts_of(model)[0].parameters()} == {model.device.type}
    ids = inputs().to(model.device)
    assert model(ids).logits.isfinite().all()


def test_offloading_is_refused(tmp_path):
    pytest.importorskip("accelerate")
    config = config_of()
    folder = write(tmp_path / "model", config, tensors_of(config))
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="packed weights are not offloaded"):
        from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")


PEAK = """
import re, sys
from torchao_mx.hf import from_pretrained

def kilobytes(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s*(\\d+) kB", file.read())[1])

from_pretrained(sys.argv[1])  # what a first use allocates for good
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM, the peak, starts anew
before = kilobytes("VmRSS")
assert kilobytes("VmHWM") - before < 1000
model = from_pretrained(sys.argv[2])
print("peak", 1024 * (kilobytes("VmHWM") - before))
"""


def test_no_unpacked_copy_is_made_on_the_host(tmp_path):
    """Peak memory over the process before: the packed model and at most a shard of it."""
    small, large = config_of(), config_of(2048)
    large.hidden_size = 1024
    write(tmp_path / "small", small, tensors_of(small))
    tensors = tensors_of(large)
    write(tmp_path / "large", large, tensors, 3)
    files = [f.stat().st_size for f in (tmp_path / "large").glob("*.safetensors")]
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(result.stdout.split()[-1])
    unpacked = sum(4 * t.nbytes for n, t in tensors.items() if n.endswith("_blocks"))  # in bf16
    assert peak <= sum(files) + max(files) < unpacked


# --- the experts implementation, under v5 ---------------------------------------------------------


def moe_models():
    """Configs of classes that follow v5's interface: with their flags, and with gates of their own."""
    common = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        intermediate_size=96, max_position_embeddings=64,
    )  # fmt: skip
    return {
        "qwen3_moe": dict(
            common, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16
        ),
        "mixtral": dict(common, num_local_experts=4, num_experts_per_tok=2),
        "olmoe": dict(common, num_experts=4, num_experts_per_tok=2),
        "gpt_oss": dict(common, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    }


@v5_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", moe_models())
def test_implementation_equals_eager(name, dtype):
    config = transformers.AutoConfig.for_model(name, **moe_models()[name])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator(3)))
    results = {}
    for implementation in ("eager", "torchao_mx"):
        model.set_experts_implementation(implementation)
        model.zero_grad(set_to_none=True)
        grads = gradients(model)
        results[implementation] = model(inputs()).logits, grads
    (want, want_grads), (got, got_grads) = results.values()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert relative_error(got, want) < bound
    assert all(relative_error(got_grads[n], g) < bound for n, g in want_grads.items())


@v5_only
def test_implementation_refuses_what_it_does_not_compute():
    module = nn.Module()
    module.has_post_expert_norm = True
    from torchao_mx.hf.experts import experts_forward

    with pytest.raises(NotImplementedError, match=r"norms each expert's output.*'grouped_mm'"):
        experts_forward(module, None, None, None)


# --- our own configs on what was loaded -----------------------------------------------------------


def test_lora_config_on_the_loaded_experts(folder):
    """The packed bytes stay, and adapters that are zero change nothing."""
    model, plain = (from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    packed = experts_of(plain)[0].gate_up_proj.qdata
    quantize_(model, MXWeightOnlyLoRAConfig(r=4), filter_fn=is_experts)
    assert torch.equal(experts_of(model)[0].gate_up_proj.qdata, packed)
    with torch.no_grad():
        assert torch.equal(model(inputs()).logits, plain(inputs()).logits)
    grads = gradients(model)
    assert {n.rpartition(".")[2] for n in grads if "lora_B" in n} == {
        f"{w}_lora_B" for w in WEIGHTS
    }
    assert all(g.any() for n, g in grads.items() if "lora_B" in n)


# --- the Hub, versions -----------------------------------------------------------------------------


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    config = config_of()
    folder = write(tmp_path / "model", config, tensors_of(config))
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    from_pretrained("openai/gpt-oss-20b", revision="abc")
    assert (asked["name"], asked["revision"]) == ("openai/gpt-oss-20b", "abc")


@pytest.mark.parametrize("version", ["4.57.5", "4.46.0", "5.0.0", "5.7.3", "5.7.0.dev0"])
def test_other_versions_are_refused(version):
    with pytest.raises(ImportError, match=rf"4.57.6, or 5.8 – 5.23.*{version}"):
        is_v5_version(version)


def test_supported_versions():
    assert [is_v5_version(v) for v in ("4.57.6", "5.8.0", "5.23.0", "6.0.0.dev0")] == [False, True, True, True]  # fmt: skip


def test_import_of_the_package_leaves_transformers_alone():
    code = "import sys, torchao_mx; print('transformers' in sys.modules, 'peft' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-2:] == ["False", "False"]


def test_missing_transformers_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers is not installed; it works with"):
        is_v5()
