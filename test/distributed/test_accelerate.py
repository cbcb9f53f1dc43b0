"""accelerate's FSDP2 with our adapters on packed experts: on two GPUs, and its code for FSDP2 on two CPU ranks."""

import os
import pathlib
import re

import pytest
import torch
import torch.distributed as dist
from _grids import generator, relative_error
from _ranks import each_backend, run_ranks
from torch.distributed.tensor import DTensor
from torchao.quantization import quantize_

from torchao_mx import MXTensor, MXWeightOnlyLoRAConfig, is_experts

accelerate = pytest.importorskip("accelerate", "1.10")
pytest.importorskip("transformers", "5.8")

RANKS, STEPS, BATCH = 2, 5, 4
LAYER = "GptOssDecoderLayer"
README = pathlib.Path(__file__).parents[2] / "README.md"
(LAUNCH,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)


def model_of(device):
    """A tiny gpt-oss, its experts packed and with adapters, the same on each rank."""
    from test_load import moe_models
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_oss", **moe_models()["gpt_oss"], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    config = MXWeightOnlyLoRAConfig(r=4, lora_alpha=8)
    quantize_(model.requires_grad_(False), config, filter_fn=is_experts)
    return model.to(device).train()


def test_hooks_of_accelerate_call_what_experts_became():
    """They put a forward on the instance that calls the class's, as where a device map spreads a model."""
    from _experts import Concatenated, inputs
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    layer, (args, _) = Concatenated(), inputs(Concatenated, 5)
    add_hook_to_module(layer, ModelHook())
    quantize_(layer, MXWeightOnlyLoRAConfig(r=4), filter_fn=is_experts)
    y = layer(*args)
    assert torch.equal(y, type(layer).forward(layer, *args))
    y.sum().backward()
    assert layer.gate_up_proj_lora_B.grad is not None
    remove_hook_from_module(layer)
    assert torch.equal(layer(*args), y)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, ids, backward):
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tokens(device):
    return torch.randint(3, 128, (BATCH, 12), generator=generator(1)).to(device)


def accelerator_of(device, **options):
    """An Accelerator that shards, of a process group that exists already."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    rank = str(dist.get_rank())
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[LAYER],
        cpu_ram_efficient_loading=False,
        **options,
    )
    accelerator = accelerate.Accelerator(fsdp_plugin=plugin, cpu=device == "cpu")
    if device == "cpu":  # where accelerate leaves its plugin unused, without a word
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


def sharded_run(device, options):
    """(losses, trained adapters, bytes of this rank's packed weights; on the first rank, whole ones)."""
    accelerator = accelerator_of(device, **options)
    model = model_of(
        accelerator.device
    )  # from the CPU, fully_shard moves packed weights as trained ones
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    ids = tokens(accelerator.device).chunk(RANKS)[dist.get_rank()]
    losses = train(model, optimizer, ids, accelerator.backward)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    adapters = {n: p.full_tensor().cpu() for n, p in model.named_parameters() if p.requires_grad}
    local = [p.to_local() for p in model.parameters()]
    state = accelerator.get_state_dict(model)
    whole = {n: t.qdata for n, t in state.items() if isinstance(t, MXTensor)}
    return losses, adapters, [t.qdata.nbytes for t in local if isinstance(t, MXTensor)], whole


@each_backend
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_training_is_that_of_one_process(backend, checkpointing):
    """But for the order in which gradients are added: 5e-7 after five steps on the CPU."""
    device = "cuda" if backend == "nccl" else "cpu"
    model = model_of(device)
    want = train(model, optimizer_of(model), tokens(device), torch.Tensor.backward)
    options = {"activation_checkpointing": checkpointing}
    results = run_ranks(sharded_run, RANKS, options, backend=backend)
    losses = torch.tensor([losses for losses, *_ in results]).mean(0)
    assert losses.tolist() == pytest.approx(want, rel=1e-5)
    packed = {n: p.qdata.cpu() for n, p in model.named_parameters() if isinstance(p, MXTensor)}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for _, adapters, local_bytes, _ in results:
        assert [RANKS * n for n in local_bytes] == [qdata.nbytes for qdata in packed.values()]
        adapters = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in adapters.items()}
        assert adapters.keys() == trained.keys()
        for name, p in trained.items():
            assert relative_error(adapters[name], p) < 1e-4, name
    state = results[0][-1]
    assert state.keys() == packed.keys() and len(packed) == 4
    assert all(torch.equal(state[name], qdata) for name, qdata in packed.items())


def mixed_run(device):
    """(losses, dtypes of the trained parameters), computed in bfloat16."""
    accelerator = accelerator_of(device, mixed_precision_policy="bf16")
    model = model_of(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    ids = tokens(accelerator.device).chunk(RANKS)[dist.get_rank()]
    losses = train(model, optimizer, ids, accelerator.backward)
    return losses, {p.dtype for p in model.parameters() if p.requires_grad}


@each_backend
def test_mixed_precision(backend):
    """Weights gathered packed give products in bfloat16, which moves a loss by some 3e-3 of itself."""
    device = "cuda" if backend == "nccl" else "cpu"
    model = model_of(device)
    want = train(model, optimizer_of(model), tokens(device), torch.Tensor.backward)
    results = run_ranks(mixed_run, RANKS, backend=backend)
    losses = torch.tensor([losses for losses, _ in results]).mean(0)
    assert losses.tolist() == pytest.approx(want, rel=2e-2)
    assert losses.tolist() != pytest.approx(want, rel=1e-5)
    assert all(dtypes == {torch.float32} for _, dtypes in results)


def test_launch_config(tmp_path, monkeypatch):
    """What `accelerate launch` reads from the file, and hands to the plugin through the environment."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = tmp_path / "fsdp2.yaml"
    file.write_text(LAUNCH)
    assert load_config_from_file(str(file)).num_processes == 2
    args = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    assert plugin.transformer_cls_names_to_wrap == [LAYER]
    assert plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
