"""save_adapter and load_adapter of models that are split over ranks."""

import pytest
import torch
from _experts import EXPERTS, HIDDEN, Titan
from _ranks import each_backend, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torchao.quantization import quantize_

from torchao_mx import MXWeightOnlyLoRAConfig, is_experts, is_linear
from torchao_mx.distributed import ExpertParallel

pytest.importorskip("transformers")

from safetensors import safe_open
from safetensors.torch import load_file

from torchao_mx.hf import load_adapter, save_adapter


def model_of(seed, device="cpu"):
    """A linear layer and experts, with adapters that depend on the seed."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(HIDDEN, 96), "experts": Titan()}).to(device)
    config = MXWeightOnlyLoRAConfig(r=4)
    quantize_(model, config, filter_fn=lambda m, name: is_experts(m) or is_linear(m))
    for i, p in enumerate(adapters_of(model).values()):
        generator = torch.Generator().manual_seed(100 * seed + i)
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return model


def adapters_of(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def split(model, kind, device, ranks):
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("all",))
    if kind == "ep":
        parallelize_module(model, mesh, {"experts": ExpertParallel()})
    else:
        fully_shard(model["experts"], mesh=mesh)
    fully_shard(model["linear"], mesh=mesh)
    return model


def save_and_load(device, kind, ranks, path):
    save_adapter(split(model_of(1, device), kind, device, ranks), path)
    other = split(model_of(2, device), kind, device, ranks)
    load_adapter(other, path)
    loaded = adapters_of(other)
    assert all(isinstance(p, DTensor) for p in loaded.values())
    return {name: p.detach().full_tensor().cpu() for name, p in loaded.items()}


def file_contents(folder):
    """An adapter's config, its metadata, which safetensors writes in any order, and its tensors' bytes."""
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: t.view(torch.uint8).tolist() for name, t in load_file(file).items()}
    return (folder / "adapter_config.json").read_text(), metadata, tensors


@each_backend
@pytest.mark.parametrize("kind", ["fsdp", "ep"])
def test_round_trip(kind, backend, tmp_path):
    ranks = 2
    assert EXPERTS % ranks == 0
    results = run_ranks(save_and_load, ranks, kind, ranks, str(tmp_path / "split"), backend=backend)
    source = model_of(1)
    for result in results:
        for name, p in adapters_of(source).items():
            assert torch.equal(result[name], p)
    save_adapter(source, tmp_path / "whole")
    split, whole = (file_contents(tmp_path / folder) for folder in ("split", "whole"))
    assert split == whole
    other = model_of(2)
    load_adapter(other, tmp_path / "split")
    for name, p in adapters_of(source).items():
        assert torch.equal(adapters_of(other)[name], p)
