"""What tests of sharded models share: sharding, training, and what all ranks have together."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _experts import Concatenated
from _tiny_moe import TinyMoE, batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXDynamicActivationMXWeightConfig,
    MXTensor,
    NVFP4ForwardMXFP8BackwardConfig,
    is_experts,
    is_linear,
)

ROWS = 24
W4A8 = MXDynamicActivationMXWeightConfig(torch.float8_e4m3fn, torch.float4_e2m1fn_x2)


def mesh_of(device, ranks=None):
    """Ranks ``0 .. ranks - 1``, and as many groups of that size as there are, each doing the same."""
    ranks = ranks or dist.get_world_size()
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh(device, shape, mesh_dim_names=("copies", "shard"))["shard"]


def shard(model, mesh, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def own_rows(mesh, *tensors):
    return [t.chunk(mesh.size())[mesh.get_local_rank()] for t in tensors]


def whole(tensor):
    """What all ranks have of a tensor, on the CPU, an MXTensor as its fields."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if not isinstance(tensor, MXTensor):
        return tensor.detach().cpu()
    data = [tensor.qdata, tensor.scale]
    if tensor.per_tensor_scale is not None:
        data.append(tensor.per_tensor_scale)
    return [t.cpu().view(torch.uint8 if t.itemsize == 1 else t.dtype) for t in data]


def whole_state(model):
    return {name: whole(t) for name, t in model.state_dict().items()}


def whole_gradients(model):
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        pairs = (
            zip(actual[name], want, strict=True) if type(want) is list else [(actual[name], want)]
        )
        for a, b in pairs:
            assert a.dtype == b.dtype and torch.equal(a, b), name


def train(model, device, mesh, steps=6, lr=1e-2):
    """Losses of the whole batch, each rank computing with its rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        x, target = (t.to(device) for t in own_rows(mesh, *batch(ROWS)))
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, group=mesh.get_group())
        losses.append(total.item() / mesh.size())
    return losses


def adapters_of(model):
    return {n: t for n, t in whole_state(model).items() if "lora" in n}


def qat_model(base, family=Concatenated):
    torch.manual_seed(0)
    model = TinyMoE(experts=family)
    for wanted in (is_experts, is_linear):
        quantize_(
            model, QATConfig(base, step="prepare"),
            filter_fn=lambda m, n, wanted=wanted: wanted(m, n) and not n.endswith("router"),
        )  # fmt: skip
    return model


def recipe_model():
    torch.manual_seed(0)
    model = TinyMoE(experts=Concatenated)
    for wanted in (is_experts, is_linear):
        quantize_(
            model, NVFP4ForwardMXFP8BackwardConfig(),
            filter_fn=lambda m, n, wanted=wanted: wanted(m, n) and not n.endswith(("router", "head")),
        )  # fmt: skip
    return model


def assert_same_weight(actual, expected):
    assert_same_tensors({"": whole(actual)}, {"": whole(expected)})
