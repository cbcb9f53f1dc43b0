"""A gpt-oss checkpoint on the GPU: loaded, trained by our adapters and by PEFT's, saved."""

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file
from test_load import config_of, inputs, tensors_of, write
from torchao.quantization import quantize_

from torchao_mx import MXTensor, MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.hf import from_pretrained, load_adapter, save_adapter, save_pretrained

pytestmark = pytest.mark.gpu
LORA = MXWeightOnlyLoRAConfig(r=8, lora_alpha=16)
WEIGHTS_FILE = "model.safetensors"


@pytest.fixture(params=[96, 64], ids=["I96", "square"])
def folder(request, tmp_path):
    config = config_of(request.param)
    return write(tmp_path / "model", config, tensors_of(config))


def packed_bytes(model):
    return {n: p.qdata.cpu() for n, p in model.named_parameters() if isinstance(p, MXTensor)}


def train(model, parameters, steps=12):
    """The losses of a batch that is learned by heart."""
    ids = inputs().cuda()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_logits_are_those_of_the_cpu(folder):
    ids = inputs()
    with torch.no_grad():
        want = from_pretrained(folder)(ids).logits.double()
        got = from_pretrained(folder).cuda()(ids.cuda()).logits.cpu().double()
    # Tokens that rounding sends to another expert differ wholly, hence the median over tokens.
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors.median() < 2e-2


def test_adapters_train_and_load_again(folder, tmp_path):
    model = from_pretrained(folder).cuda()
    quantize_(model.requires_grad_(False), LORA, filter_fn=is_experts)
    before = packed_bytes(model)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 4 and len(adapters) == 8
    losses = train(model, adapters.values())
    assert losses[-1] < losses[0] - 0.1
    after = packed_bytes(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())

    save_adapter(model, tmp_path / "adapter")
    fresh = from_pretrained(folder)
    quantize_(fresh.requires_grad_(False), LORA, filter_fn=is_experts)
    load_adapter(fresh, tmp_path / "adapter")
    loaded = dict(fresh.named_parameters())
    assert all(torch.equal(loaded[name], p.detach().cpu()) for name, p in adapters.items())


def test_pefts_adapters_train(folder):
    peft = pytest.importorskip("peft")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_parameters=targets, r=8, lora_alpha=16, target_modules=[])
    model = peft.get_peft_model(from_pretrained(folder).cuda(), config)
    losses = train(model, [p for p in model.parameters() if p.requires_grad])
    assert losses[-1] < losses[0] - 0.1


def test_what_the_gpu_saves_is_the_checkpoint(folder, tmp_path):
    save_pretrained(from_pretrained(folder).cuda(), tmp_path / "copy")
    want, got = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "copy" / WEIGHTS_FILE)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_loading_to_the_gpu_needs_no_copy_of_the_experts(tmp_path):
    """Above the model: one shard at most, here the smallest a checkpoint can have, a tensor's size."""
    pytest.importorskip("accelerate")
    config = config_of(1024)
    folder = write(tmp_path / "model", config, tensors_of(config), shards=3)
    from_pretrained(folder, device_map="cuda")  # what the first one of a process allocates
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = from_pretrained(folder, device_map="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    result = torch.cuda.memory_allocated() - before
    shards = [file.stat().st_size for file in folder.glob("*.safetensors")]
    packed = sum(value.nbytes for value in packed_bytes(model).values())
    assert packed > 0.5 * result  # experts are what this is about
    assert (
        peak <= result + max(shards) < result + 3.5 * packed
    )  # their bf16 copies are 3.8 times as large


def dense(folder):
    """The model with its experts' values in plain bfloat16."""
    model = from_pretrained(folder)
    for module in filter(is_experts, model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if isinstance(p, MXTensor):
                module.register_parameter(name, torch.nn.Parameter(p.dequantize()))
    return model


def test_experts_quantized_on_the_gpu_are_the_cpus(folder):
    got, want = dense(folder).cuda(), dense(folder)
    for model in (got, want):
        quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
    got, want = packed_bytes(got), packed_bytes(want)
    assert len(want) == 4
    assert all(torch.equal(got[name], value) for name, value in want.items())
