"""Modules of experts on several ranks, what each rank calls them with, and how results are compared."""

import torch
import torch.distributed as dist
from _experts import EXPERTS, HIDDEN, GptOss, GptOssV4, Titan
from _grids import BASES, as_bytes, generator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import MXTensor, MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.distributed import ExpertParallel

LORA = MXWeightOnlyLoRAConfig(r=4, lora_alpha=6)
KINDS = {
    "packed": BASES["w4a16"],
    "packed_nvfp4": BASES["nvfp4_weight_only"],
    "lora": LORA,
    "qat": QATConfig(BASES["w4a8"], step="prepare"),
    "qat_nvfp4": QATConfig(BASES["nvfp4_weight_only"], step="prepare"),
}
TOKENS = [9, 0, 5, 2]  # of each rank
TOP_K = 2


def mesh_of(*shape):
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return init_device_mesh(device, shape, mesh_dim_names=("dp", "ep")[-len(shape) :])


def module_of(family, config):
    """Ours, with adapters and biases that are not zero; the same on every rank."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": family()})
    quantize_(model, config, filter_fn=is_experts)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
    return model


def split(model, mesh=None, sync_free=False, **kwargs):
    mesh = mesh_of(dist.get_world_size()) if mesh is None else mesh
    return parallelize_module(model, mesh, {"experts": ExpertParallel(sync_free)}, **kwargs)


def batch(tokens, seed, low=0, high=EXPERTS, strangers=False):
    """(hidden, ids from low to high, unevenly, weights), leaves."""
    g = generator(seed)
    x = torch.randn(tokens, HIDDEN, generator=g)
    scores = torch.rand(tokens, EXPERTS, generator=g) - 0.3 * torch.arange(EXPERTS)
    k = min(TOP_K, high - low)
    ids = scores[:, low:high].topk(k).indices + low
    if strangers:
        ids = ids.where(torch.rand(ids.shape, generator=g) < 0.5, EXPERTS + 1)
    weights = torch.rand(tokens, k, generator=g)
    return x.requires_grad_(), ids, weights.requires_grad_()


def batches(world, **kwargs):
    return [batch(TOKENS[rank], rank, **kwargs) for rank in range(world)]


def joined(parts):
    """One process's batch of those of the ranks."""
    columns = zip(*parts, strict=True)
    return [
        torch.cat([t.detach() for t in c]).requires_grad_(c[0].is_floating_point()) for c in columns
    ]


def call(family, experts, x, ids, weights):
    """``[T, H]`` of the module as its library calls it."""
    if family is GptOssV4:
        scores = x.new_zeros(len(x), EXPERTS).scatter(1, ids, weights)
        return experts(x[None], router_indices=ids, routing_weights=scores)[0]
    if family is not Titan:
        return experts(x, ids, weights)
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)[:EXPERTS]
    y = experts(x[order // ids.shape[1]], counts)
    y = torch.zeros_like(y).index_copy(0, order, y).view(*ids.shape, HIDDEN)
    return (y * weights[..., None]).sum(1)


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(full):
    """This rank's experts."""
    return full.chunk(dist.get_world_size())[dist.get_rank()]


class Layer(nn.Module):
    """A router and experts."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(1)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = module_of(GptOss, config)["experts"]

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        return self.experts(x, ids, weights)


def assert_same_packed(a, b):
    """Two MXTensors, or others, to the last byte and stride."""
    assert type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype
    if not isinstance(b, MXTensor):
        assert torch.equal(a, b)
        return
    for name, want in b.fields().items():
        got = getattr(a, name)
        if isinstance(want, torch.Tensor):
            assert got.stride() == want.stride() and torch.equal(as_bytes(got), as_bytes(want)), (
                name
            )
        else:
            assert got == want, name
