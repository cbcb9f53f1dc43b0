"""Experts split over ranks match one process with all ranks' tokens, values and gradients; refusals."""

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from _expert_ranks import (
    KINDS,
    LORA,
    TOKENS,
    batch,
    batches,
    call,
    joined,
    mesh_of,
    module_of,
    own,
    split,
    whole_of,
)
from _experts import EXPERTS, FAMILIES, Concatenated, GptOss, GptOssV4, Titan
from _grids import BASES, generator, refusals, relative_error
from _ranks import each_backend, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torchao.quantization.qat import QATConfig

from torchao_mx import NVFP4ForwardMXFP8BackwardConfig


def check_equals_one_process(family, config, parts, sync_free=False):
    """Bit for bit: the products of an expert have the same rows, in the same order."""
    rank = dist.get_rank()
    model = module_of(family, config)
    whole = copy.deepcopy(model)["experts"]
    split(model, sync_free=sync_free)
    out = call(family, model["experts"], *parts[rank])
    everything = joined(parts)
    want = call(family, whole, *everything)
    dout = torch.randn(want.shape, generator=generator(5))
    want.backward(dout)
    rows = [len(x) for x, *_ in parts]
    if out.requires_grad:
        out.backward(dout.split(rows)[rank])
    assert torch.equal(out, want.split(rows)[rank])
    assert torch.equal(parts[rank][0].grad, everything[0].grad.split(rows)[rank])
    assert torch.equal(parts[rank][2].grad, everything[2].grad.split(rows)[rank])
    trained = 0
    for (name, p), q in zip(model["experts"].named_parameters(), whole.parameters(), strict=True):
        assert isinstance(p, DTensor) and p.placements == (Shard(0),) and p.shape == q.shape
        assert p.requires_grad == q.requires_grad
        if q.requires_grad:
            trained += 1
            assert torch.equal(p.grad.to_local(), own(q.grad)), name
            assert torch.equal(whole_of(p.grad), q.grad), name
    return trained


def equals_one_process(device):
    world = dist.get_world_size()
    for family in FAMILIES:
        for kind, config in KINDS.items():
            trained = check_equals_one_process(family, config, batches(world))
            assert (trained > 0) == ("packed" not in kind or family in (GptOss, GptOssV4))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_one_process(world):
    run_ranks(equals_one_process, world)


def uneven_routing(device):
    world = dist.get_world_size()
    each = EXPERTS // world
    for family in (Concatenated, GptOss, Titan):
        check_equals_one_process(family, LORA, batches(world, strangers=True))
        last = {"low": EXPERTS - each}  # all tokens to one rank
        check_equals_one_process(family, LORA, batches(world, **last))
        # The rows that meet on a rank are then all, so that the scale of NVFP4 activations is the same.
        for base in (QATConfig(BASES["nvfp4"], step="prepare"), NVFP4ForwardMXFP8BackwardConfig()):
            check_equals_one_process(family, base, batches(world, **last))
        check_equals_one_process(family, LORA, batches(world, low=1, high=2))  # to one expert
        nobody = [batch(0, 0) for _ in range(world)]
        check_equals_one_process(family, LORA, nobody)


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_routing(world):
    run_ranks(uneven_routing, world)


def is_exact_without_waiting(device):
    world = dist.get_world_size()
    options = [{}, {"strangers": True}, {"low": EXPERTS - 1}, {"low": 1, "high": 3}]
    for family in FAMILIES:
        for kwargs in options:
            if family is not GptOssV4 or "strangers" not in kwargs:
                parts = [batch(5, rank, **kwargs) for rank in range(world)]
                check_equals_one_process(family, LORA, parts, sync_free=True)
        nobody = [batch(0, 0) for _ in range(world)]
        check_equals_one_process(family, LORA, nobody, sync_free=True)
        # What fills up must not count for the scale of NVFP4 activations: a giant is not sent to rank 0.
        args = batch(5, dist.get_rank())
        args[0].data[0] *= 1e3
        args[1][0] = torch.tensor([EXPERTS - 2, EXPERTS - 1])
        model = module_of(family, QATConfig(BASES["nvfp4"], step="prepare"))
        models = split(copy.deepcopy(model)), split(model, sync_free=True)
        waiting, sync_free = (call(family, m["experts"], *args) for m in models)
        assert torch.equal(waiting, sync_free)


@pytest.mark.parametrize("world", [2, 4])
def test_is_exact_without_waiting(world):
    run_ranks(is_exact_without_waiting, world)


def moved(t, device, dtype):
    t = t.detach().to(device)
    return t.to(dtype).requires_grad_() if t.is_floating_point() else t


def gradients_by_relative_error(device):
    """What every device has to pass; on a GPU the products of other numbers of rows round otherwise."""
    world, rank = dist.get_world_size(), dist.get_rank()
    dtype, bound = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 3e-2)
    for family, kind, sync_free in itertools.product(FAMILIES, ("lora", "qat"), (False, True)):
        model = module_of(family, KINDS[kind]).to(device, dtype)
        if hasattr(model["experts"], "limit"):
            model["experts"].limit = 100.0  # rounding would decide on which side of it a value is
        whole = copy.deepcopy(model)["experts"]
        split(model, sync_free=sync_free)
        parts = [batch(40, r) for r in range(world)]
        parts = [[moved(t, device, dtype) for t in part] for part in parts]
        everything = joined(parts)
        want = call(family, whole, *everything)
        dout = torch.randn(want.shape, generator=generator(5)).to(device, dtype)
        want.backward(dout)
        for _ in range(2):
            for leaf in (*parts[rank], *model.parameters()):
                leaf.grad = None
            out = call(family, model["experts"], *parts[rank])
            out.backward(dout.chunk(world)[rank])
        assert relative_error(out, want.chunk(world)[rank]) < bound
        for i in (0, 2):
            got = parts[rank][i].grad
            assert relative_error(got, everything[i].grad.chunk(world)[rank]) < bound
        for (name, p), q in zip(
            model["experts"].named_parameters(), whole.parameters(), strict=True
        ):
            if q.grad is not None:
                assert relative_error(p.grad.full_tensor(), q.grad) < bound, name


@each_backend
def test_gradients_by_relative_error(backend):
    run_ranks(gradients_by_relative_error, 2, backend=backend)


@pytest.mark.parametrize("family", [Concatenated, GptOss])
@pytest.mark.parametrize("kind", ["packed", "lora", "transformers"])
def test_ids_of_other_ranks_as_transformers_gives_them(family, kind):
    """E' for every expert elsewhere, with weight 0, and the ranks' results summed."""
    whole = module_of(family, LORA if kind == "lora" else BASES["w4a16"])["experts"]
    if kind == "transformers":
        pytest.importorskip("transformers")
        from torchao_mx.hf.experts import experts_forward as forward

        source = family()
        source._parameters.update(whole._parameters)
        whole = source
    else:
        forward = type(whole).forward
    x, ids, weights = batch(13, 0)
    out = forward(whole, x, ids, weights)
    dout = torch.randn(out.shape, generator=generator(1))
    out.backward(dout)
    half = EXPERTS // 2
    total, dx = torch.zeros_like(out), torch.zeros_like(x)
    for first in (0, half):
        part = copy.deepcopy(whole)
        for name, p in whole.named_parameters():
            own = p.detach()[first : first + half]
            part._parameters[name] = nn.Parameter(own, requires_grad=p.requires_grad)
        here = (ids >= first) & (ids < first + half)
        assert here.any() and not here.all()
        local = weights.detach().where(here, 0).requires_grad_()
        x_part = x.detach().requires_grad_()
        y = forward(part, x_part, (ids - first).where(here, half), local)
        y.backward(dout)
        total, dx = total + y, dx + x_part.grad
        assert not local.grad[~here].any()
        assert relative_error(local.grad[here], weights.grad[here]) < 1e-6
        for name, p in part.named_parameters():
            if p.requires_grad:
                want = whole._parameters[name].grad[first : first + half]
                assert relative_error(p.grad, want) < 1e-6
    assert relative_error(total, out) < 1e-6
    assert relative_error(dx, x.grad) < 1e-6


def recomputed_in_backward(device):
    from torch.utils.checkpoint import checkpoint

    rank = dist.get_rank()
    model, args = split(module_of(GptOss, LORA))["experts"], batch(TOKENS[rank], rank)
    grads = []
    for forward in (model, functools.partial(checkpoint, model, use_reentrant=False)):
        forward(*args).square().sum().backward()
        leaves = [args[0], args[2], *(p for p in model.parameters() if p.grad is not None)]
        grads.append([whole_of(leaf.grad).clone() for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert len(grads[0]) == 6
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_recomputed_in_backward():
    run_ranks(recomputed_in_backward, 2)


class TitanStyle:
    """torchtitan's hooks: rows to their ranks and into the order of its experts, and back."""

    def partition(self, name, module, mesh):
        for name, p in list(module._parameters.items()):
            part = distribute_tensor(p.detach(), mesh, [Shard(0)])
            module._parameters[name] = nn.Parameter(part, requires_grad=p.requires_grad)

    def dispatch(self, module, inputs, mesh):
        rows, counts = inputs
        group = mesh.get_group()
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        self.sizes = [c.view(mesh.size(), -1).sum(1).tolist() for c in (received, counts)]
        rows = dist._functional_collectives.all_to_all_single_autograd(rows, *self.sizes, group)
        experts = torch.arange(EXPERTS // mesh.size()).repeat(mesh.size())
        self.order = experts.repeat_interleave(received).argsort(stable=True)
        padding = rows.new_zeros(3, rows.shape[1])  # its permutation leaves room for alignment
        rows = torch.cat([dist._functional_collectives.wait_tensor(rows)[self.order], padding])
        return rows, received.view(mesh.size(), -1).sum(0)

    def combine(self, module, y, mesh):
        y = torch.zeros_like(y[:-3]).index_copy(0, self.order, y[:-3])
        back = dist._functional_collectives.all_to_all_single_autograd
        return back(y, *self.sizes[::-1], mesh.get_group())


def works_under_the_hooks_of_torchtitan(device):
    for kind in ("packed", "lora", "qat"):
        rank, world = dist.get_rank(), dist.get_world_size()
        whole, model = (module_of(Titan, KINDS[kind])["experts"] for _ in range(2))
        style = TitanStyle()
        distribute_module(model, mesh_of(world), style.partition, style.dispatch, style.combine)
        parts = batches(world)
        everything = joined(parts)
        out, want = call(Titan, model, *parts[rank]), call(Titan, whole, *everything)
        rows = [len(x) for x, *_ in parts]
        dout = torch.randn(want.shape, generator=generator(5))
        want.backward(dout)
        out.backward(dout.split(rows)[rank])
        assert torch.equal(out, want.split(rows)[rank])
        assert torch.equal(parts[rank][0].grad, everything[0].grad.split(rows)[rank])
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                assert torch.equal(p.grad.to_local(), own(q.grad))


def test_works_under_the_hooks_of_torchtitan():
    run_ranks(works_under_the_hooks_of_torchtitan, 2)


def works_under_transformers(device):
    from transformers.distributed.expert_parallel import EpDispatchExpertsParallel, MoEParamShard

    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device, (world, 1), mesh_dim_names=("ep", "tp"))
    for family, kind in itertools.product((Concatenated, GptOss), ("packed", "lora", "qat")):
        whole, model = (module_of(family, KINDS[kind])["experts"] for _ in range(2))
        model.num_experts = EXPERTS
        for name in list(model._parameters):
            MoEParamShard(Shard(0), shards_expert_dim=True).shard_param(model, name, mesh["ep"])
        dispatch = EpDispatchExpertsParallel()
        dispatch.install_forward(
            model, mesh["ep"], tp_mesh=mesh["tp"], ep_implementation="all_to_all"
        )
        parts = batches(world)
        everything = joined(parts)
        out, want = model(*parts[rank]), whole(*everything)
        rows = [len(x) for x, *_ in parts]
        dout = torch.randn(want.shape, generator=generator(5))
        want.backward(dout)
        out.backward(dout.split(rows)[rank])
        # Its sort is not stable, and its sum not in fp32.
        if rows[rank]:
            assert relative_error(out, want.split(rows)[rank]) < 1e-6
            for i in (0, 2):
                got = parts[rank][i].grad
                assert relative_error(got, everything[i].grad.split(rows)[rank]) < 1e-6
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                assert relative_error(p.grad.full_tensor(), q.grad) < 1e-5


def test_works_under_transformers():
    """v5's own expert parallelism, on modules of ours: it splits them and calls them with local ids."""
    pytest.importorskip("transformers.distributed.expert_parallel")
    run_ranks(works_under_transformers, 2)


REFUSALS = """\
TypeError: this Linear is not a module of experts; ExpertParallel needs modules of experts made by quantize_(..., filter_fn=is_experts): quantize it first, or take it out of the plan
TypeError: this GptOss is not quantized; ExpertParallel needs modules of experts made by quantize_(..., filter_fn=is_experts): quantize it first, or take it out of the plan
ValueError: MXExperts has 3 experts, which 2 ranks cannot share evenly; use a mesh whose size divides 3
ValueError: the mesh has 2 dimensions, ('dp', 'ep'); experts are split over one: pass one of them, such as mesh['ep']
ValueError: MXExperts has 4 experts, but scale (3,) does not have one entry per expert; keep other parameters in a separate module
ValueError: MXExperts: w1, w2, w3 are DTensors already; apply ExpertParallel once, and before FSDP2"""


def refuses(device):
    def refused(model, mesh):
        def call():
            before = [str(model), *map(id, model.parameters())]
            try:
                split(model, mesh)
            finally:
                assert [str(model), *map(id, model.parameters())] == before

        return call

    plain = nn.ModuleDict({"experts": nn.Linear(4, 4)})
    unquantized = nn.ModuleDict({"experts": GptOss()})
    packed = functools.partial(module_of, Titan, BASES["w4a16"])
    strange = packed()
    strange["experts"].scale = nn.Parameter(torch.ones(3))
    odd = packed()
    for name, p in odd["experts"].named_parameters():
        odd["experts"]._parameters[name] = nn.Parameter(p[:3], requires_grad=False)
    line, square = mesh_of(2), mesh_of(2, 1)
    twice = split(packed(), square["ep"])
    lines = refusals(
        [
            refused(plain, line), refused(unquantized, line), refused(odd, line),
            refused(packed(), square), refused(strange, square["ep"]), refused(twice, square["ep"]),
        ]
    )  # fmt: skip
    assert lines == REFUSALS, lines


def test_refuses():
    run_ranks(refuses, 2)
