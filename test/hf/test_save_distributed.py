"""save_distributed: what ranks saved, as a folder that stock transformers loads, a file's tensors at a time."""

import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("transformers")
from _ranks import run_ranks
from _sharded import mesh_of
from test_load import WEIGHTS, config_of, contents, experts_of, inputs, stock, tensors_of, write
from test_save import assert_same, saved_tensors
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torchao.quantization import quantize_
from transformers import GptOssForCausalLM, LlamaConfig

from torchao_mx import MXFP8_E4M3, MXTensor, MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.hf import from_pretrained, save_pretrained
from torchao_mx.hf.save_sharded import save_distributed


def sharded(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _save(device, source, folder):
    model = from_pretrained(source).to(device)
    x = inputs().to(device)
    expected = model(x).logits
    model = sharded(model, mesh_of(device))
    assert torch.equal(model(x).logits, expected)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


@pytest.fixture
def source(tmp_path):
    config = config_of()
    return write(tmp_path / "source", config, tensors_of(config))


@pytest.fixture
def checkpoint(source, tmp_path):
    run_ranks(_save, 2, source, tmp_path / "dcp")
    return tmp_path / "dcp"


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one_file", "sharded"])
def test_from_ranks_to_stock_transformers(source, checkpoint, shard, tmp_path):
    target = tmp_path / "target"
    save_distributed(checkpoint, target, config_of(), prefix="model.", max_shard_size=shard)
    assert_same(saved_tensors(target), saved_tensors(source))
    assert len(list(target.glob("*.safetensors"))) > 1 or shard == "5GB"
    want = stock(source, torch.bfloat16).state_dict()
    assert_same(stock(target, torch.bfloat16).state_dict(), want)
    save_pretrained(from_pretrained(source), tmp_path / "whole", max_shard_size=shard)
    for name in ("config.json", "generation_config.json"):
        assert (target / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_tied_embeddings(tmp_path):
    config = config_of(tie_word_embeddings=True)
    tensors = tensors_of(config)
    del tensors["lm_head.weight"]
    model = from_pretrained(write(tmp_path / "source", config, tensors))
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    save_distributed(tmp_path / "dcp", tmp_path / "target", config)
    assert_same(saved_tensors(tmp_path / "target"), tensors)


def test_masters_are_quantized_as_conversion_would(tmp_path):
    torch.manual_seed(0)
    model = GptOssForCausalLM(config_of()).bfloat16()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    config = MXWeightOnlyConfig()
    save_distributed(tmp_path / "dcp", tmp_path / "target", config_of(), quantize=config)
    quantize_(model, config, filter_fn=is_experts)
    save_pretrained(model, tmp_path / "whole")
    assert_same(saved_tensors(tmp_path / "target"), saved_tensors(tmp_path / "whole"))


def test_refusals_leave_the_target(source, tmp_path):
    target = tmp_path / "target"
    save_pretrained(from_pretrained(source), target)
    before = contents(target)

    def refused(state, match, config=None, error=ValueError, folder="dcp", **options):
        if state is not None:
            dcp.save(state, checkpoint_id=tmp_path / folder, no_dist=True)
        with pytest.raises(error, match=match):
            save_distributed(tmp_path / folder, target, config or config_of(), **options)
        assert contents(target) == before

    def state_with(change):
        model = from_pretrained(source)
        change(model)
        return model.state_dict()

    whole = state_with(lambda model: None)
    refused(None, "has no .metadata", folder="absent")
    refused(whole, "no name begins with prefix='x.'", prefix="x.")
    refused(None, "has shape .*, but config asks for", config=config_of(64))
    refused(
        None, "has no experts", config=LlamaConfig(num_hidden_layers=1), error=NotImplementedError
    )
    refused(None, "not a size", max_shard_size="many")
    refused(None, r"both must be MXTensors", quantize=MXWeightOnlyConfig())
    refused(
        None, "the layout holds experts in mxfp4", quantize=MXWeightOnlyConfig(torch.float8_e4m3fn)
    )

    lora = MXWeightOnlyLoRAConfig(r=2)
    adapted = state_with(lambda m: quantize_(m, lora, filter_fn=is_experts))
    refused(adapted, r"gate_up_proj_lora_A: GptOss.* has no such tensor; .*save_adapter")

    def other_format(model):
        for experts in experts_of(model):
            for name in WEIGHTS:
                w = getattr(experts, name).dequantize()
                w = MXTensor.from_hp(w.mT.contiguous(), MXFP8_E4M3).mT
                setattr(experts, name, torch.nn.Parameter(w, requires_grad=False))

    refused(state_with(other_format), "they differ in format: mxfp4 and mxfp8_e4m3", folder="other")

    def damaged(model):
        experts_of(model)[1].down_proj.scale.view(torch.uint8)[2, 0, 3] = 255

    refused(
        state_with(damaged), r"layers\.1.*down_proj_scales: 1 of .* scales are NaN", folder="nan"
    )


_MEASURE = """
import sys, threading, time
import torch
torch.set_num_threads(1)
from torchao_mx.hf.save_sharded import save_distributed
from transformers import GptOssConfig

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

peak, done = [0], False
def watch():
    while not done:
        peak[0] = max(peak[0], resident())
        time.sleep(0.0005)

folder, target, limit = sys.argv[1:]
config = GptOssConfig.from_pretrained(folder + "/config")
small = GptOssConfig.from_pretrained(folder + "/small-config")
save_distributed(folder + "/small", target + "-small", small, max_shard_size=int(limit))  # imports, caches
before = resident()
thread = threading.Thread(target=watch)
thread.start()
save_distributed(folder + "/dcp", target, config, max_shard_size=int(limit))
done = True
thread.join()
print(peak[0] - before)
"""


def test_memory_is_that_of_a_file_not_of_the_model(tmp_path):
    """Of 12 layers, 86 MB in all, into files of 10 MB."""
    for name, fields in (
        ("dcp", dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12)),
        ("small", dict(num_hidden_layers=1)),
    ):
        config = config_of()
        config.update(fields | {"layer_types": ["full_attention"] * fields["num_hidden_layers"]})
        config.save_pretrained(tmp_path / ("config" if name == "dcp" else "small-config"))
        with torch.device("meta"):
            model = GptOssForCausalLM(config).bfloat16()
        state = {}
        for key, tensor in model.state_dict().items():
            value = torch.randn(tensor.shape).bfloat16()
            if key.endswith(WEIGHTS):
                value = MXTensor.from_hp(
                    value.mT.contiguous(), MXWeightOnlyConfig().weight_spec.format
                ).mT
            state[key] = value
        dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
    limit, target = 10_000_000, tmp_path / "target"
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path, target, str(limit)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    peak = int(run.stdout.split()[-1])
    written = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    # A file's tensors, and what DCP and its pickle hold of the one being read.
    assert written > 8 * limit and peak < 2.5 * limit, (written, peak)
    assert_same(
        {k: t for k, t in saved_tensors(target).items() if "norm" in k},
        {k: t for k, t in state_of(tmp_path / "dcp", target).items() if "norm" in k},
    )


def state_of(checkpoint, target):
    state = {k: torch.empty_like(t) for k, t in saved_tensors(target).items() if "norm" in k}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state
