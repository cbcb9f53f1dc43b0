"""FSDP2 of packed weights gives one process's numbers from a quarter of the bytes, however sharded."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _experts import Concatenated, GptOss
from _grids import FORMATS, assert_close, randn
from _ranks import each_backend, run_ranks
from _sharded import (
    ROWS,
    adapters_of,
    assert_same_tensors,
    assert_same_weight,
    mesh_of,
    own_rows,
    qat_model,
    recipe_model,
    shard,
    train,
    whole,
    whole_gradients,
    whole_state,
)
from _tiny_moe import batch, lora_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXFP4,
    NVFP4,
    MXTensor,
    MXWeightOnlyConfig,
    QuantizeSpec,
    is_experts,
)
from torchao_mx.distributed import gather_packed
from torchao_mx.tensor.master_tensor import MasterTensor

# --- one process's numbers ------------------------------------------------------------------------


def same_as_unsharded(device, fmt, family, mesh, reshard):
    """Of the same rows on each rank, so that the mean over ranks is what one has."""
    model = lora_model(fmt, experts=family).to(device)
    x, target = (t.to(device) for t in batch(ROWS))
    expected = model(x)
    F.cross_entropy(expected, target).backward()
    gradients, state = whole_gradients(model), whole_state(model)
    model.zero_grad()
    packed = [n for n, t in model.state_dict().items() if isinstance(t, MXTensor)]
    assert len(packed) == 7
    shard(model, mesh, reshard_after_forward=reshard)
    for name in packed:
        assert isinstance(model.state_dict()[name].to_local(), MXTensor), name
    assert_same_tensors(whole_state(model), state)
    exact = mesh.size() != 3  # whose mean of equal numbers rounds
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        assert torch.equal(out, expected)
        F.cross_entropy(out, target).backward()
        for name, gradient in whole_gradients(model).items():
            if exact:
                assert torch.equal(gradient, gradients[name]), name
            else:
                assert_close(gradient, gradients[name])
        assert whole_gradients(model).keys() == gradients.keys()
    assert_same_tensors(whole_state(model), state)
    str(model)


def _same_in_all_forms(device, sizes):
    """Each size with each format, and each of these with both families, for one size or another."""
    for size in sizes:
        mesh = mesh_of(device, size)
        for i, fmt in enumerate(FORMATS):
            family, reshard = ((GptOss, True), (Concatenated, False))[(i + size) % 2]
            same_as_unsharded(device, fmt, family, mesh, reshard)


@each_backend
@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.gpu)])
def test_outputs_and_gradients_of_one_process(ranks, backend):
    # 4 experts on 3 ranks are 2, 2, 0; 9 classes are 5, 4 or 3, 3, 3 or 3, 3, 3, 0.
    sizes = {2: [1, 2], 3: [3], 4: [4]}[ranks]
    run_ranks(_same_in_all_forms, ranks, sizes, backend=backend)


def _losses(device, fmt, size):
    mesh = mesh_of(device, size)
    model = shard(lora_model(fmt).to(device), mesh)
    frozen = {n: t for n, t in whole_state(model).items() if "lora" not in n}
    losses = train(model, device, mesh)
    assert_same_tensors({n: t for n, t in whole_state(model).items() if "lora" not in n}, frozen)
    return losses, adapters_of(model)


@pytest.mark.parametrize(("fmt", "ranks"), [(MXFP4, 2), (NVFP4, 4)], ids=str)
@each_backend
def test_losses_and_adapters_do_not_depend_on_the_ranks(fmt, ranks, backend):
    [(expected, want)] = run_ranks(_losses, 1, fmt, 1, backend=backend)
    assert torch.tensor(expected).isfinite().all() and expected[-1] < expected[0] - 0.1
    start = {n: t for n, t in lora_model(fmt).state_dict().items() if n in want}
    for losses, adapters in run_ranks(_losses, ranks, fmt, ranks, backend=backend):
        assert_close(torch.tensor(losses), torch.tensor(expected))
        for name, adapter in want.items():
            moved = (adapter - start[name]).norm()
            assert moved > 0 and (adapters[name] - adapter).norm() < 1e-3 * moved, name


# --- what moves -----------------------------------------------------------------------------------


class Gathered(TorchDispatchMode):
    """Counts the bytes that all-gathers put out."""

    def __init__(self):
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in func.__name__ or "all_gather_into" in func.__name__:
            self.bytes += args[0].nbytes
            self.calls += 1
        return func(*args, **kwargs or {})


def _forward_bytes(device, make):
    module = make().to(device)
    fully_shard(module)
    x = torch.randn(5, 64, device=device)
    ids, weights = (
        torch.zeros(5, 1, dtype=torch.long, device=device),
        torch.ones(5, 1, device=device),
    )
    with Gathered() as gathered, torch.no_grad():
        module(x.to(next(module.parameters()).dtype), ids, weights)
    assert gathered.calls == 1
    return gathered.bytes


def plain_experts():
    return Concatenated().bfloat16()


def packed_experts(config):
    model = nn.ModuleDict({"experts": plain_experts()})
    quantize_(model, config, filter_fn=is_experts)
    return model["experts"]


def trained_experts(config, packed):
    model = nn.ModuleDict({"experts": plain_experts()})
    quantize_(model, QATConfig(config, step="prepare"), filter_fn=is_experts)
    return (gather_packed(model) if packed else model)["experts"]


@each_backend
def test_bytes_of_the_all_gather(backend):
    config = MXWeightOnlyConfig()
    plain, frozen, trained, packed = (
        run_ranks(_forward_bytes, 2, make, backend=backend)
        for make in (
            plain_experts,
            functools.partial(packed_experts, config),
            functools.partial(trained_experts, config, False),
            functools.partial(trained_experts, config, True),
        )
    )
    assert plain == trained == [sum(p.nbytes for p in plain_experts().parameters())] * 2
    assert frozen[0] <= 0.27 * plain[0] and packed == frozen


def _storage_is_reused(device):
    model = nn.Sequential(lora_model(NVFP4).blocks[0].proj).to(device)
    fully_shard(model)
    seen, x = [], torch.randn(3, 64, device=device)
    hook = model[0].register_forward_hook(lambda m, args, out: seen.append(m.weight))
    for _ in range(3):
        model(x).sum().backward()
        assert seen[-1].qdata.untyped_storage().size() == 0  # freed
        with torch.no_grad():  # as an optimizer of the weight would; the gathered one has to follow
            model[0].weight.to_local().scale.view(torch.uint8).add_(1)
    hook.remove()
    assert all(w is seen[0] for w in seen)
    model.unshard()
    assert seen[0] is model[0].weight
    expected = whole(lora_model(NVFP4).blocks[0].proj.weight)
    assert torch.equal(whole(seen[0])[1], expected[1] + 3)


@each_backend
def test_gathered_weight_is_made_once_over_storage_that_is_freed(backend):
    run_ranks(_storage_is_reused, 2, backend=backend)


# --- ways of sharding -----------------------------------------------------------------------------


def reference(device, rows=ROWS, **options):
    """(model, its outputs, gradients) of one process."""
    model = lora_model(**options).to(device)
    x, target = (t.to(device) for t in batch(rows))
    out = model(x)
    F.cross_entropy(out, target).backward()
    gradients = whole_gradients(model)
    model.zero_grad()
    return model, out.detach(), gradients


def assert_close_gradients(model, expected):
    actual = whole_gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


def _hsdp(device):
    model, _, gradients = reference(device)
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("replicate", "shard"))
    with Gathered() as gathered:
        shard(model, mesh)
        x, target = (t.to(device).chunk(4)[dist.get_rank()] for t in batch(ROWS))
        F.cross_entropy(model(x), target).backward()
    assert gathered.calls
    assert model.head.weight.placements[0].is_replicate()
    assert_close_gradients(model, gradients)


@each_backend
def test_hybrid_sharding(backend):
    run_ranks(_hsdp, 4, backend=backend)


def _from_meta(device, fmt):
    reference = lora_model(fmt, experts=GptOss).to(device)
    with torch.device("meta"):
        model = lora_model(fmt, experts=GptOss)
    mesh = mesh_of(device)
    shard(model, mesh)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=device)
    state = {
        name: distribute_tensor(t.detach(), mesh, [Shard(0)])
        for name, t in reference.state_dict().items()
    }
    model.load_state_dict(state)
    x = batch(ROWS)[0].to(device)
    assert torch.equal(model(x), reference(x))
    assert_same_tensors(whole_state(model), whole_state(reference))
    # And by taking the tensors themselves, which FSDP2 then pads.
    with torch.device("meta"):
        model = lora_model(fmt, experts=GptOss)
    shard(model, mesh).load_state_dict(state, assign=True)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
@each_backend
def test_built_without_memory_then_loaded(fmt, ranks, backend):
    run_ranks(_from_meta, ranks, fmt, backend=backend)


def _checkpointed(device):
    model, out, gradients = reference(device)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    shard(model, mesh_of(device))
    x, target = (t.to(device) for t in batch(ROWS))
    actual = model(x)
    assert torch.equal(actual, out)
    F.cross_entropy(actual, target).backward()
    inserted = "_checkpoint_wrapped_module."
    actual = {n.replace(inserted, ""): t for n, t in whole_gradients(model).items()}
    assert_same_tensors(actual, gradients)


@each_backend
def test_activation_checkpointing(backend):
    run_ranks(_checkpointed, 2, backend=backend)


def _accumulated(device):
    model, _, gradients = reference(device)
    mesh = mesh_of(device)
    shard(model, mesh)
    x, target = (t.to(device) for t in own_rows(mesh, *batch(ROWS)))
    parts = list(zip(x.chunk(3), target.chunk(3), strict=True))
    for i, (rows, targets) in enumerate(parts):
        model.set_requires_gradient_sync(i == len(parts) - 1)
        (F.cross_entropy(model(rows), targets) / len(parts)).backward()
    assert_close_gradients(model, gradients)


@each_backend
def test_gradient_accumulation(backend):
    run_ranks(_accumulated, 2, backend=backend)


def _mixed_precision(device):
    """fp32 adapters, weights that call themselves fp32, and a forward pass in bf16."""
    model = lora_model().to(device)
    want = copy.deepcopy(model).bfloat16()
    x = batch(ROWS)[0].to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh_of(device), mp_policy=policy)
    seen = []
    model.head.register_forward_pre_hook(lambda m, args: seen.append(m.weight))
    out = model(x)
    assert seen[0].dtype == torch.bfloat16 and type(seen[0].data) is MXTensor
    assert out.dtype == torch.bfloat16 and torch.equal(out, want(x.bfloat16()))
    out.float().square().sum().backward()
    want(x.bfloat16()).float().square().sum().backward()
    for name, gradient in whole_gradients(model).items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, want.get_parameter(name).grad.float().cpu()), name
    state = whole_state(model)
    assert model.head.weight.dtype == torch.float32
    assert_same_tensors(state, whole_state(lora_model()))


@each_backend
def test_mixed_precision_is_of_the_logical_dtype(backend):
    run_ranks(_mixed_precision, 2, backend=backend)


def _compiled(device):
    model, out, gradients = reference(device)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    shard(model, mesh_of(device))
    x, target = (t.to(device) for t in batch(ROWS))
    for _ in range(2):
        model.zero_grad()
        actual = model(x)
        assert_close(actual, out)
        F.cross_entropy(actual, target).backward()
        assert_close_gradients(model, gradients)


@each_backend
def test_compiled_blocks(backend):
    run_ranks(_compiled, 2, backend=backend)


def _offloaded(device):
    model, out, _ = reference(device)
    policy = CPUOffloadPolicy(pin_memory=device == "cuda")
    shard(model, mesh_of(device), offload_policy=policy)
    assert all(p.device.type == "cpu" for p in model.parameters())
    x, target = (t.to(device) for t in batch(ROWS))
    for _ in range(2):
        actual = model(x)
        assert torch.equal(actual, out)
        F.cross_entropy(actual, target).backward()


@pytest.mark.parametrize("ranks", [2, 3])
@each_backend
def test_offloading_to_the_cpu(ranks, backend):
    run_ranks(_offloaded, ranks, backend=backend)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_shard_that_is_moved_keeps_its_padding_and_none_is_saved(fmt, trained):
    """As when it is offloaded, which on the CPU moves nothing."""
    data = randn(3, 64)
    w = MasterTensor(data, QuantizeSpec(MXFP4)) if trained else MXTensor.from_hp(data, fmt)
    padded = w.new_zeros((5, 64))
    padded[:3].copy_(w)
    mesh = SimpleNamespace(size=lambda: 2)
    half = padded.to(torch.bfloat16)
    for rows in (
        padded[:3],
        padded[:3].to(torch.bfloat16),
        half[:3],
        padded[:3].to(torch.float16),
    ):
        qdata, scale, *_ = rows.fsdp_pre_all_gather(mesh)[0]
        assert len(qdata) == len(scale) == 5 and rows.shape == (3, 64)
    assert len(w[:2].fsdp_pre_all_gather(mesh)[0][0]) == 2  # a part of what is no shard
    if not trained:
        assert_same_weight(padded[:3].to(torch.bfloat16), w)
        for saved in (padded, half, padded[:3].to(torch.bfloat16)):
            assert saved.__getstate__().keys() == w.__getstate__().keys()


def _recipe(device):
    """Sharded and not: the same outputs and gradients, bit for bit, where a mean of equal numbers is exact."""
    x, target = (t.to(device) for t in batch(ROWS))
    runs = []
    for prepare in (lambda model: model, lambda model: shard(model, mesh_of(device))):
        model = prepare(recipe_model().to(device))
        out = model(x)
        F.cross_entropy(out, target).backward()
        runs.append((out, whole_gradients(model)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_same_tensors(runs[1][1], runs[0][1])


@each_backend
def test_the_recipe(backend):
    run_ranks(_recipe, 2, backend=backend)


def _in_inference_mode(device):
    """From the first forward pass on, in which FSDP2 pads shards."""
    x = batch(ROWS)[0].to(device)
    for model in (
        lora_model(NVFP4, experts=GptOss),
        gather_packed(qat_model(MXWeightOnlyConfig())),
    ):
        expected = model.to(device)(x)
        shard(model, mesh_of(device))
        with torch.inference_mode():
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("ranks", [2, 3])
@each_backend
def test_inference_mode(ranks, backend):
    run_ranks(_in_inference_mode, ranks, backend=backend)


def _refusals(device):
    mesh = mesh_of(device)
    module = nn.Linear(64, 64, bias=False, device=device)
    w = MXTensor.from_hp(torch.randn(64, 64, device=device), MXFP4)
    module.weight = nn.Parameter(w.mT, requires_grad=False)
    with pytest.raises(NotImplementedError, match="axis 0 is packed"):
        fully_shard(module, mesh=mesh)
    sharded = fully_shard(qat_model(MXWeightOnlyConfig()).to(device), mesh=mesh)
    with pytest.raises(ValueError, match=r"blocks\.0\.proj\.weight is a DTensor"):
        gather_packed(sharded)
    recipe = nn.ModuleDict({"qat": qat_model(MXWeightOnlyConfig()), "recipe": recipe_model()})
    before = dict(recipe.named_parameters())
    with pytest.raises(
        TypeError, match=r"recipe\.blocks\.0.*: NVFP4MXFP8.* leave gather_packed out"
    ):
        gather_packed(recipe)
    assert all(p is before[name] for name, p in recipe.named_parameters())


@each_backend
def test_what_cannot_be_sharded_is_refused(backend):
    run_ranks(_refusals, 2, backend=backend)
