"""gather_packed: FSDP2 of quantization-aware training gives the same bits from a quarter of the bytes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _experts import Concatenated, GptOss
from _grids import assert_close
from _ranks import each_backend, run_ranks
from _sharded import (
    ROWS,
    W4A8,
    assert_same_tensors,
    mesh_of,
    qat_model,
    shard,
    train,
    whole,
    whole_gradients,
    whole_state,
)
from _tiny_moe import TinyMoE, batch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import MXTensor, MXWeightOnlyConfig, is_experts, is_linear
from torchao_mx.distributed import gather_packed


def _gathered_packed_or_not(device, base, family):
    mesh, runs = mesh_of(device), []
    for prepare in (gather_packed, lambda model: model):
        model = shard(prepare(qat_model(base, family)).to(device), mesh)
        losses = train(model, device, mesh, steps=2)
        runs.append((losses, whole_gradients(model), whole_state(model)))
        assert all(type(t) is torch.Tensor for t in whole_state(model).values())
    packed, plain = runs
    assert packed[0] == plain[0]
    assert_same_tensors(packed[1], plain[1])
    assert_same_tensors(packed[2], plain[2])
    # And of one process, in which there is nothing to gather.
    model = qat_model(base, family).to(device)
    x, target = (t.to(device) for t in batch(ROWS))
    F.cross_entropy(model(x), target).backward()
    again = shard(gather_packed(qat_model(base, family).to(device)), mesh)
    F.cross_entropy(again(x), target).backward()
    for name, gradient in whole_gradients(model).items():
        assert_close(whole(again.get_parameter(name).grad), gradient)


MXFP4, NVFP4 = MXWeightOnlyConfig(), MXWeightOnlyConfig(block_size=16)


@pytest.mark.parametrize(
    ("base", "family", "ranks"),  # each pair of two of them
    [(MXFP4, Concatenated, 3), (MXFP4, GptOss, 2), (NVFP4, Concatenated, 2),
     (NVFP4, GptOss, 3), (W4A8, Concatenated, 3), (W4A8, GptOss, 2)],
    ids=["mxfp4", "mxfp4-biases", "nvfp4", "nvfp4-biases", "w4a8", "w4a8-biases"],
)  # fmt: skip
@each_backend
def test_weights_in_training_are_gathered_packed(base, family, ranks, backend):
    run_ranks(_gathered_packed_or_not, ranks, base, family, backend=backend)


def _compiled_or_checkpointed(device, base):
    x, target = (t.to(device) for t in batch(ROWS))
    for compiled in (False, True):
        runs = []
        for prepare in (gather_packed, lambda model: model):
            model = prepare(qat_model(base).bfloat16()).to(device)
            if compiled:
                del model.blocks[2:]  # a compilation takes seconds; two, so that one is prefetched
            for i, block in enumerate(model.blocks):
                if compiled:
                    block.compile(backend="aot_eager")
                else:
                    model.blocks[i] = checkpoint_wrapper(block)
            shard(model, mesh_of(device))
            out = model(x.bfloat16())
            F.cross_entropy(out, target).backward()
            runs.append(whole_gradients(model) | {"out": out.detach()})
        assert_same_tensors(*runs)


@each_backend
def test_training_gathered_packed_compiled_or_checkpointed(backend):
    run_ranks(_compiled_or_checkpointed, 2, W4A8, backend=backend)


def _mixed_precision_in_training(device):
    """Weights are quantized from fp32, and the layer is otherwise one in bf16."""
    torch.manual_seed(0)
    x = batch(ROWS)[0].to(device, torch.bfloat16)
    whole_layer, layer = (
        qat_model(MXWeightOnlyConfig()).blocks[0].proj.to(device) for _ in range(2)
    )
    expected = whole_layer(x)
    expected.float().square().sum().backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(gather_packed(layer), mesh=mesh_of(device), mp_policy=policy)
    out = layer(x)
    assert torch.equal(out, expected)
    out.float().square().sum().backward()
    gradient = whole(layer.weight.grad)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, whole_layer.weight.grad.cpu().bfloat16().float())


@each_backend
def test_mixed_precision_in_training_quantizes_the_master(backend):
    run_ranks(_mixed_precision_in_training, 2, backend=backend)


def _converted_after_sharded_training(device, base):
    """As the error says: from the whole state, in a model that is not sharded."""
    model = shard(qat_model(base).to(device), mesh_of(device))
    train(model, device, mesh_of(device), steps=2)
    x = batch(ROWS)[0].to(device)
    trained = model(x).detach()
    for wanted in (is_experts, lambda m, n: n.endswith("proj")):
        with pytest.raises(TypeError, match="sharded by FSDP2; call quantize_ before fully_shard"):
            convert(model, base, wanted)
    with pytest.raises(TypeError, match="its weight is a DTensor"):
        quantize_(model, base, filter_fn=lambda m, n: n.endswith("router"))
    assert torch.equal(model(x), trained)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:  # the others get nothing
        plain = qat_model(base).to(device)
        plain.load_state_dict(state)
        for wanted in (is_experts, is_linear):
            convert(plain, base, lambda m, n, wanted=wanted: wanted(m, n) and "router" not in n)
        assert isinstance(plain.blocks[0].proj.weight, MXTensor)
        assert torch.equal(plain(x), trained)


def convert(model, base, filter_fn):
    quantize_(model, QATConfig(base, step="convert"), filter_fn=filter_fn)


@each_backend
def test_a_model_trained_in_shards_converts_whole(backend):
    run_ranks(_converted_after_sharded_training, 2, W4A8, backend=backend)


def test_gather_packed_twice_and_of_tied_weights():
    model = qat_model(MXWeightOnlyConfig())
    model.blocks[1].proj.weight = model.blocks[0].proj.weight
    state = {n: t.clone() for n, t in model.state_dict().items()}
    out = model(batch()[0])
    gather_packed(gather_packed(model))
    assert model.blocks[1].proj.weight is model.blocks[0].proj.weight
    assert torch.equal(model(batch()[0]), out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    with pytest.warns(UserWarning, match="found no fake-quantized layer"):
        gather_packed(TinyMoE())
