"""torch.distributed.checkpoint of packed models: any number of ranks to any other, bit for bit."""

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from _experts import GptOss
from _ranks import Ranks, each_backend, run_ranks
from _sharded import (
    assert_same_tensors,
    mesh_of,
    own_rows,
    qat_model,
    shard,
    whole_state,
)
from _tiny_moe import batch, lora_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, MXTensor, MXWeightOnlyConfig
from torchao_mx.distributed import ExpertParallel, gather_packed


def model_of(fmt, seed=0):
    return lora_model(fmt, seed, experts=GptOss)


def _save(device, folder, fmt, size):
    model = shard(model_of(fmt).to(device), mesh_of(device, size))
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)


def _load(device, folder, fmt, size):
    """Into a model of other values, and into one that had none."""
    saved, x = model_of(fmt).to(device), batch()[0].to(device)
    expected, out = whole_state(saved), saved(x)
    for from_meta in (False, True):
        with torch.device("meta" if from_meta else device):
            model = shard(model_of(fmt, seed=1), mesh_of(device, size))
        if from_meta:
            model.to_empty(device=device)
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state)
        assert_same_tensors(whole_state(model), expected)
        assert torch.equal(model(x), out)  # on a rank without rows of a weight, too


# Every number to every other, and with each format from every number, and to every number.
RESHARDINGS = {
    MXFP4: [(2, 4), (2, 1), (4, 3), (1, 3), (1, 2)],
    NVFP4: [(2, 3), (4, 2), (4, 1), (1, 4)],
}


@pytest.mark.parametrize("fmt", RESHARDINGS, ids=str)
@each_backend
def test_any_number_of_ranks_to_any_other(fmt, backend, tmp_path):
    for size in (2, 4, 1):
        run_ranks(_save, 4 if size == 4 else 2, tmp_path / str(size), fmt, size, backend=backend)
    for size, target in RESHARDINGS[fmt]:
        ranks = {1: 2}.get(target, target)
        run_ranks(_load, ranks, tmp_path / str(size), fmt, target, backend=backend)


SPLITS = {"ep2": (1, 2), "dp2_ep2": (2, 2)}  # ranks of FSDP2, of expert parallelism


def _split_by_experts(device, fmt, split, seed=0):
    mesh = init_device_mesh(device, SPLITS[split], mesh_dim_names=("dp", "ep"))
    model = parallelize_module(
        model_of(fmt, seed).to(device), mesh["ep"], {"blocks.*.experts": ExpertParallel()}
    )
    for block in model.blocks:
        fully_shard(block.experts, mesh=mesh["dp"])
    return shard(model, init_device_mesh(device, (dist.get_world_size(),)))


def _save_by_experts(device, folder, fmt, split):
    dcp.save(get_model_state_dict(_split_by_experts(device, fmt, split)), checkpoint_id=folder)


def _load_by_experts(device, folder, fmt, split):
    model = _split_by_experts(device, fmt, split, seed=1)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    assert_same_tensors(whole_state(model), whole_state(model_of(fmt)))


# Each split to the other and to and from FSDP2 alone; with each format from and to every one.
RESPLITS = {
    MXFP4: [("ep2", "dp2_ep2"), ("dp2_ep2", "ep2"), ("dp2_ep2", "fsdp"), ("fsdp", "dp2_ep2")],
    NVFP4: [("dp2_ep2", "dp2_ep2"), ("ep2", "fsdp"), ("fsdp", "ep2")],
}


@pytest.mark.parametrize("fmt", RESPLITS, ids=str)
@each_backend
def test_experts_that_are_split_over_ranks(fmt, backend, tmp_path):
    for split, sizes in SPLITS.items():
        run_ranks(_save_by_experts, math.prod(sizes), tmp_path / split, fmt, split, backend=backend)
    run_ranks(_save, 2, tmp_path / "fsdp", fmt, 2, backend=backend)
    for source, split in RESPLITS[fmt]:
        folder = tmp_path / source
        if split == "fsdp":
            run_ranks(_load, 2, folder, fmt, 2, backend=backend)
        else:
            ranks = math.prod(SPLITS[split])
            run_ranks(_load_by_experts, ranks, folder, fmt, split, backend=backend)


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
def test_shards_into_one_process_and_back(fmt, tmp_path):
    run_ranks(_save, 2, tmp_path / "sharded", fmt, 2)
    expected = whole_state(model_of(fmt))
    with torch.device("meta"):
        empty = model_of(fmt)
    for model in (model_of(fmt, seed=1), empty.to_empty(device="cpu")):
        state = model.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "sharded", no_dist=True)
        assert_same_tensors(whole_state(model), expected)
    dcp.save(state, checkpoint_id=tmp_path / "whole", no_dist=True)
    run_ranks(_load, 2, tmp_path / "whole", fmt, 2)


def test_bytes_on_disk_and_what_is_pickled(tmp_path):
    run_ranks(_save, 2, tmp_path, MXFP4, 2)
    state = whole_state(model_of(MXFP4))
    size = sum(t.nbytes for v in state.values() for t in (v if type(v) is list else [v]))
    written = sum(f.stat().st_size for f in tmp_path.glob("*.distcp"))
    pieces = 2 * sum(3 if type(v) is list else 1 for v in state.values())
    assert size < written < size + 3000 * pieces  # a piece has a header
    records = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert records.keys() == state.keys()
    # Everything else is unpickled with weights_only=False.
    assert all(isinstance(record, TensorStorageMetadata) for record in records.values())


def _wrong_format(device, folder):
    model = shard(model_of(MXFP8_E4M3), mesh_of(device))
    with pytest.raises(CheckpointException, match="they differ in format: mxfp8_e4m3 and mxfp4"):
        dcp.load(get_model_state_dict(model), checkpoint_id=folder)


def test_another_format_is_refused(tmp_path):
    run_ranks(_save, 2, tmp_path, MXFP4, 2)
    run_ranks(_wrong_format, 2, tmp_path)


def _from_whole_state(device, fmt):
    model = shard(model_of(fmt, seed=1), mesh_of(device))
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, model_of(fmt).state_dict(), options=options)
    expected = whole_state(model_of(fmt))
    assert_same_tensors(whole_state(model), expected)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        assert isinstance(state["head.weight"], MXTensor)
        model_of(fmt, seed=1).load_state_dict(state)
        assert state.keys() == expected.keys()


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
def test_whole_state_dicts(fmt):
    run_ranks(_from_whole_state, 2, fmt)


# --- training -------------------------------------------------------------------------------------


def trainer(device, mesh, seed=0, qat=False):
    if qat:
        model = gather_packed(qat_model(MXWeightOnlyConfig()))
    else:
        model = model_of(MXFP4, seed)
    model = shard(model.to(device), mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2)


def steps(model, optimizer, device, mesh, numbers):
    losses = []
    for i in numbers:
        x, target = (t.to(device) for t in own_rows(mesh, *batch(seed=i)))
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_all(folder, model, optimizer):
    state, optim = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optim": optim}, checkpoint_id=folder)


def load_all(folder, model, optimizer):
    state, optim = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optim": optim}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optim)


def _resumes(device, folder, qat):
    mesh = mesh_of(device)
    model, optimizer = trainer(device, mesh, qat=qat)
    steps(model, optimizer, device, mesh, range(3))
    save_all(folder, model, optimizer)
    expected = steps(model, optimizer, device, mesh, range(3, 6))
    end = whole_state(model)
    model, optimizer = trainer(device, mesh, seed=1, qat=qat)
    load_all(folder, model, optimizer)
    assert steps(model, optimizer, device, mesh, range(3, 6)) == expected
    assert_same_tensors(whole_state(model), end)


@pytest.mark.parametrize("qat", [False, True], ids=["lora", "qat"])
@each_backend
def test_resuming_goes_on_bit_for_bit(qat, backend, tmp_path):
    run_ranks(_resumes, 2, tmp_path, qat, backend=backend)


def _saves_forever(device, folder):
    mesh = mesh_of(device)
    model, optimizer = trainer(device, mesh)
    for i in range(10_000):
        steps(model, optimizer, device, mesh, [i])
        save_all(folder / f"step-{i}", model, optimizer)
        if dist.get_rank() == 0:
            (folder / "last.tmp").write_text(str(i))
            os.replace(folder / "last.tmp", folder / "last")  # when all ranks have written
        dist.barrier()


def _loads(device, folder):
    mesh = mesh_of(device)
    last = int((folder / "last").read_text())
    model, optimizer = trainer(device, mesh)
    steps(model, optimizer, device, mesh, range(last + 1))
    expected = whole_state(model)
    model, optimizer = trainer(device, mesh, seed=1)
    load_all(folder / f"step-{last}", model, optimizer)
    assert_same_tensors(whole_state(model), expected)
    assert all(torch.tensor(steps(model, optimizer, device, mesh, [last + 1])).isfinite())


def unfinished(folder: Path):
    """A save that has begun, by its folder, and is not the last finished one."""
    last = int((folder / "last").read_text()) if (folder / "last").exists() else -1
    following = folder / f"step-{last + 1}"
    begun = following.exists() and any(following.iterdir())
    return last >= 0 and begun and not (following / ".metadata").exists()


def _kill_while_saving(folder):
    """Whether the SIGKILL, of all ranks, came before the save that it was meant for was finished."""
    ranks = Ranks(2)
    try:
        ranks.start(_saves_forever, folder)
        deadline = time.monotonic() + 120
        while not unfinished(folder):
            assert time.monotonic() < deadline
            assert all(p.exitcode is None for p in ranks.processes)
            time.sleep(0.001)  # a core for the ranks
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGKILL)
    finally:
        ranks.stop()
    return unfinished(folder)


def test_killed_while_saving(tmp_path):
    """While files are being written; what was saved before is whole."""
    killed = 0
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        killed += _kill_while_saving(folder)
        run_ranks(_loads, 2, folder)
        if killed == 2:
            return
    pytest.fail(f"{killed} of {attempt + 1} kills came in time")
