"""DTensors of packed weights: distribute, gather, load, and refusals."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from _grids import randn
from _ranks import each_backend, run_ranks
from _sharded import (
    assert_same_weight,
    mesh_of,
)
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchao_mx import (
    MXFP4,
    NVFP4,
    MXTensor,
    torch_internals,
)


def _distributed(device, fmt, shape):
    mesh = mesh_of(device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Other ranks' values are not the first's, which distribute_tensor sends.
    w = MXTensor.from_hp(randn(*shape, seed=0).to(device), fmt)
    other = MXTensor.from_hp(randn(*shape, seed=rank).to(device), fmt)
    for placement in (Shard(0), Replicate()):
        d = distribute_tensor(other, mesh, [placement])
        assert type(d.to_local()) is MXTensor
        assert_same_weight(d, w)
    rows = -(-shape[0] // ranks)
    sharded = distribute_tensor(w, mesh, [Shard(0)])
    assert_same_weight(sharded.to_local(), w[rank * rows : (rank + 1) * rows])
    local = DTensor.from_local(
        w[rank * rows : (rank + 1) * rows], mesh, [Shard(0)], shape=w.shape, stride=w.stride()
    )
    assert_same_weight(local, w)
    assert_same_weight(sharded.redistribute(mesh, [Replicate()]).to_local(), w)
    assert_same_weight(sharded.redistribute(mesh, [Replicate()]).redistribute(mesh, [Shard(0)]), w)
    assert_same_weight(sharded.detach().clone(), w)
    assert sharded.to(torch.bfloat16).full_tensor().dtype == torch.bfloat16
    # mT moves the packed axis, and its shards along the first stay.
    if len(shape) == 3:
        assert_same_weight(sharded.mT.full_tensor().mT, w)
    assert "MXTensor" in repr(sharded)
    module = nn.Module()
    module.weight = nn.Parameter(sharded, requires_grad=False)
    zeros = distribute_tensor(
        MXTensor.from_hp(torch.ones(shape, device=device), fmt), mesh, [Shard(0)]
    )
    module.load_state_dict({"weight": zeros})
    assert_same_weight(module.weight, zeros)
    with pytest.raises(
        NotImplementedError, match=r"aten\.add\.Tensor is not implemented for MXTensor"
    ):
        sharded + sharded


def recorded(op, names):
    """The list of the operator ``op``, whose name is appended to ``names`` where it is called."""

    def call(*args):
        names.append(op.name().partition("::")[2])
        return op(*args)

    return [call]


def _gathers(device):
    names = []
    sharded = distribute_tensor(
        MXTensor.from_hp(randn(8, 64).to(device), NVFP4), mesh_of(device), [Shard(0)]
    )
    collectives = ("ALL_GATHER", "WAIT_TENSOR")
    patches = {name: recorded(getattr(torch_internals, name)[0], names) for name in collectives}
    with mock.patch.multiple(torch_internals, **patches):
        sharded.full_tensor()
    return names


def test_gloo_gathers_one_tensor_at_a_time():
    """Two that are under way at once corrupt the heap now and then; see ``sharding.py``."""
    for names in run_ranks(_gathers, 2):
        under_way = 0
        for name in names:
            under_way = under_way + 1 if name == "all_gather_into_tensor" else 0
            assert under_way <= 1
        assert names.count("all_gather_into_tensor") == 3  # qdata, scales, the per-tensor scale


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (7, 64), (4, 16, 64), (3, 16, 64)], ids=str)
@each_backend
def test_dtensor(fmt, shape, backend):
    run_ranks(_distributed, 2, fmt, shape, backend=backend)


def _distributed_along_blocks(device):
    """Shard(1) is whole blocks of each row, or refused."""
    mesh = mesh_of(device)
    w = MXTensor.from_hp(randn(8, 128).to(device), MXFP4)
    sharded = distribute_tensor(w, mesh, [Shard(1)])
    assert sharded.to_local().shape == (8, 64)
    assert_same_weight(sharded, w)
    for width in (96, 32):
        narrow = MXTensor.from_hp(randn(8, width).to(device), MXFP4)
        with pytest.raises(ValueError, match="multiples of 32"):
            distribute_tensor(narrow, mesh, [Shard(1)])


@each_backend
def test_dtensor_along_the_packed_axis(backend):
    run_ranks(_distributed_along_blocks, 2, backend=backend)
