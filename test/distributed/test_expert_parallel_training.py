"""Experts split over ranks train like one process, also with FSDP2; what happens to the parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _expert_ranks import (
    KINDS,
    LORA,
    Layer,
    assert_same_packed,
    batch,
    call,
    mesh_of,
    module_of,
    split,
    whole_of,
)
from _experts import EXPERTS, FAMILIES, HIDDEN, Concatenated, GptOss, Titan
from _grids import BASES, generator, relative_error
from _ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXExperts,
    MXLoRAExperts,
    MXTensor,
    NVFP4ForwardMXFP8BackwardConfig,
    is_experts,
)
from torchao_mx.distributed import clip_grad_norm_, gather_experts, gather_packed


def losses(model, config, steps=6):
    """Of training on batches that the ranks share, on each of them that of all."""
    world, rank = dist.get_world_size(), dist.get_rank()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for seed in range(steps):
        x = torch.randn(16, HIDDEN, generator=generator(seed))
        part = x.chunk(world)[rank]
        loss = F.mse_loss(model(part), part.flip(-1), reduction="sum") / x.numel()
        loss.backward()
        total = loss.detach().clone()
        for t in (total, *(p.grad for p in model.router.parameters())):
            dist.all_reduce(t)
        curve.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(curve)


def trains_as_one_process(device, path):
    for name in ("lora", "qat"):
        model = split(Layer(KINDS[name]))
        curve = losses(model, KINDS[name])
        state = {n: whole_of(t.detach()) for n, t in model.state_dict().items()}
        file = path / f"{name}.pt"
        if dist.get_world_size() == 1:
            torch.save((curve, state), file)
        want, want_state = torch.load(file)
        assert curve[-1] < 0.95 * curve[0]
        assert relative_error(curve, want) < 1e-6
        for key, t in want_state.items():
            if isinstance(t, MXTensor):
                assert_same_packed(state[key], t)
            else:
                assert relative_error(state[key], t) < 1e-4, key


def test_trains_as_one_process(tmp_path):
    for world in (1, 2, 4):
        run_ranks(trains_as_one_process, world, tmp_path)


def parameters_are_split_and_gathered(device):
    rank, world = dist.get_rank(), dist.get_world_size()
    for family in FAMILIES:
        for config in (*KINDS.values(), NVFP4ForwardMXFP8BackwardConfig()):
            model = module_of(family, config)
            before = {n: t.detach().clone() for n, t in model.state_dict().items()}
            with torch.no_grad():
                for p in model.parameters():
                    if rank and not isinstance(p, MXTensor):
                        p.fill_(rank)  # rank 0's count
            split(model)
            after = {n: whole_of(t) for n, t in model.state_dict().items()}
            assert before.keys() == after.keys()
            for name, t in before.items():
                assert_same_packed(after[name], t)
            for name, p in model["experts"].named_parameters():
                local = p.to_local()
                assert local.shape == (EXPERTS // world, *p.shape[1:])
                storage = getattr(local, "qdata", local).untyped_storage()
                whole = getattr(before[f"experts.{name}"], "qdata", before[f"experts.{name}"])
                assert storage.nbytes() * world == whole.numel() * whole.itemsize
            assert f"split over {world} ranks" in str(model)
            args = batch(5, rank)
            out = call(family, model["experts"], *args)
            gather_experts(model)
            for name, p in model.named_parameters():
                assert isinstance(p, nn.Parameter)
                assert_same_packed(p.detach(), before[name])
            assert "split" not in str(model)
            if config in KINDS.values():  # the recipe's scales are of the rows that meet on a rank
                assert relative_error(call(family, model["experts"], *args), out) < 1e-5

    model = module_of(GptOss, LORA)
    with torch.no_grad():
        model["experts"].down_proj_lora_A.fill_(rank)
    split(model, src_data_rank=None)  # each rank's own
    local = model["experts"].down_proj_lora_A.to_local()
    assert (local == rank).all() and local.untyped_storage().nbytes() == local.nbytes
    gathered = whole_of(model["experts"].down_proj_lora_A)
    assert gathered[:, 0, 0].tolist() == sorted(list(range(world)) * (EXPERTS // world))
    packed = model["experts"].down_proj.to_local().qdata
    assert packed.untyped_storage().nbytes() == packed.nbytes
    assert_same_packed(
        whole_of(model["experts"].down_proj),
        module_of(GptOss, LORA)["experts"].down_proj.detach(),
    )


def test_parameters_are_split_and_gathered():
    run_ranks(parameters_are_split_and_gathered, 2)


def is_quantized_after_splitting(device):
    for family in (Concatenated, GptOss):
        for kind in ("qat", "qat_nvfp4"):
            base = KINDS[kind].base_config
            model = module_of(family, KINDS[kind])
            whole = copy.deepcopy(model)
            split(model)
            args = batch(5, dist.get_rank())
            trained = call(family, model["experts"], *args)
            for m in (model, whole):
                quantize_(m, QATConfig(base, step="convert"), filter_fn=is_experts)
            assert type(model["experts"]) is MXExperts
            assert torch.equal(call(family, model["experts"], *args), trained)
            assert_same_packed(
                whole_of(model["experts"].down_proj), whole["experts"].down_proj.data
            )

        model = split(module_of(family, BASES["w4a16"]))
        packed = model["experts"].down_proj
        args = batch(5, dist.get_rank())
        before = call(family, model["experts"], *args)
        quantize_(model, LORA, filter_fn=is_experts)
        experts = model["experts"]
        assert type(experts) is MXLoRAExperts
        assert experts.down_proj.to_local().qdata.data_ptr() == packed.to_local().qdata.data_ptr()
        for p in experts.parameters():
            assert p.placements == (Shard(0),) and p.shape[0] == EXPERTS
        assert experts.down_proj_lora_A.to_local().std() > 0
        out = call(family, experts, *args)
        assert relative_error(out, before) < 1e-6
        out.sum().backward()
        assert whole_of(experts.down_proj_lora_B.grad).norm() > 0
        assert all(p.is_contiguous() for p in experts.parameters())  # or FSDP2 would refuse

    model = nn.ModuleDict({"experts": Concatenated()})
    quantize_(model, BASES["w4a16"], filter_fn=is_experts)
    split(model)
    with pytest.warns(UserWarning, match="already holds MXTensors"):
        quantize_(model, BASES["w4a16"], filter_fn=is_experts)


def test_is_quantized_after_splitting():
    run_ranks(is_quantized_after_splitting, 2)


def composes_with_fsdp(device, path):
    """Mesh (dp, ep): experts over ep and sharded over dp, the rest sharded over all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for name in ("lora", "qat", "packed_qat"):
        model = Layer(KINDS[name.removeprefix("packed_")])
        if name == "packed_qat":
            gather_packed(model)
        if world > 1:
            mesh, everyone = mesh_of(2, world // 2), init_device_mesh(device, (world,))
            split(model, mesh["ep"])
            fully_shard(model.experts, mesh=mesh["dp"])
            fully_shard(model, mesh=everyone)
            # FSDP2 averages over dp; losses are means over each rank's tokens.
            model.experts.set_gradient_divide_factor(world)
            model.experts.set_force_sum_reduction_for_comms(device == "cpu")  # gloo lacks another
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for seed in range(5):
            x = torch.randn(16, HIDDEN, generator=generator(seed)).chunk(world)[rank]
            loss = F.mse_loss(model(x), x.flip(-1))
            loss.backward()
            total = loss.detach() / world
            dist.all_reduce(total)
            curve.append(total.item())
            if seed == 0:
                grads = {
                    n: whole_of(p.grad) for n, p in model.named_parameters() if p.requires_grad
                }
            optimizer.step()
            optimizer.zero_grad()
        if world > 1:
            with pytest.raises(ValueError, match=r"experts\..* so FSDP2 shards it too"):
                gather_experts(model)
        result = torch.tensor(curve), grads, {n: whole_of(t) for n, t in model.state_dict().items()}
        file = path / f"fsdp_{name}.pt"
        if world == 1:
            torch.save(result, file)
        curve, grads, state = torch.load(file)
        assert curve[-1] < 0.95 * curve[0]
        assert relative_error(result[0], curve) < 1e-6
        assert grads.keys() == result[1].keys()
        for key, grad in grads.items():
            assert relative_error(result[1][key], grad) < 1e-5, key
        for key, t in state.items():
            if isinstance(t, MXTensor):
                assert_same_packed(result[2][key], t)
            else:
                assert relative_error(result[2][key], t) < 1e-4, key


def test_composes_with_fsdp(tmp_path):
    for world in (1, 4):
        run_ranks(composes_with_fsdp, world, tmp_path)


def distributed_like(p, full):
    """``full`` with the placements of ``p``."""
    if not isinstance(p, DTensor):
        return full
    for dim in reversed(range(p.device_mesh.ndim)):  # of FSDP2 and experts the latter split first
        full = full.chunk(p.device_mesh.size(dim))[p.device_mesh.get_local_rank(dim)]
    return DTensor.from_local(full, p.device_mesh, p.placements, run_check=False)


def clips_gradients_on_several_meshes(device):
    mesh, everyone = mesh_of(2, 2), init_device_mesh(device, (4,))
    for norm_type in (2.0, 1.0, float("inf")):
        whole, plain, sharded = (Layer(LORA) for _ in range(3))
        x = torch.randn(16, HIDDEN, generator=generator())
        whole(x).square().sum().backward()
        for model in (plain, sharded):
            split(model, mesh["ep"])
        fully_shard(sharded.experts, mesh=mesh["dp"])
        fully_shard(sharded, mesh=everyone)
        for model in (plain, sharded):
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = distributed_like(p, q.grad.clone())
                    assert torch.equal(whole_of(p.grad), q.grad)
        wanted = [p for p in whole.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(wanted, 3.0, norm_type)
        assert norm > 3
        for model in (plain, sharded):
            got = clip_grad_norm_(model.parameters(), 3.0, norm_type)
            assert not isinstance(got, DTensor) and relative_error(got, norm) < 1e-6
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                if q.grad is not None:
                    assert relative_error(whole_of(p.grad), q.grad) < 1e-6
    frozen = split(module_of(Titan, BASES["w4a16"]), mesh["ep"])
    assert clip_grad_norm_(frozen.parameters(), 1.0) == 0
    plain.router.weight.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(plain.parameters(), 1.0, error_if_nonfinite=True)


def test_clips_gradients_on_several_meshes():
    run_ranks(clips_gradients_on_several_meshes, 4)
