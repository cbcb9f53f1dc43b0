"""Legitimate but unusual uses, each of which once gave wrong numbers or an unhelpful error."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _experts import EXPERTS, HIDDEN, Titan, each_family, inputs
from _grids import BASES, assert_close, linear, quantize, randn, relative_error
from _ranks import each_backend, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXFP4,
    MXFP8_E4M3,
    MXFakeQuantizedLinear,
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    QuantizeSpec,
    check_model,
    is_experts,
    ops,
)

quantize_tables = importlib.import_module("torchao_mx.reference.quantize")
PREPARE = QATConfig(MXWeightOnlyConfig(), step="prepare")
CONVERT = QATConfig(step="convert")
RECIPE = NVFP4ForwardMXFP8BackwardConfig()


def experts(family, config=PREPARE):
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": family()})
    quantize_(model, config, filter_fn=is_experts)
    return model["experts"]


# --- state of the process -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_torchs_default_dtype_does_not_matter(dtype):
    """To tables either, which are made once."""
    w = randn(64, 64)
    wanted = [t.view(torch.uint8) for t in ops.quantize(w, MXFP4)]
    values = ops.dequantize(*ops.quantize(w, MXFP4), MXFP4, torch.float32)
    tables = (quantize_tables._e2m1_pairs, quantize_tables._e2m1_codes)
    torch.set_default_dtype(dtype)
    try:
        for table in tables:
            table.cache_clear()
        packed = ops.quantize(w, MXFP4)
        assert torch.equal(ops.dequantize(*packed, MXFP4, torch.float32), values)
        assert all(map(torch.equal, (t.view(torch.uint8) for t in packed), wanted))
    finally:
        torch.set_default_dtype(torch.float32)
        for table in tables:
            table.cache_clear()


@each_family
def test_experts_train_under_autocast(family):
    """In its dtype forward, so that backward multiplies what forward did; weights from their own dtype."""
    ours = experts(family)
    args, wanting = inputs(family, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*args)
    out.float().sum().backward()
    got = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    args, _ = inputs(family, 9)
    ours(*args).sum().backward()
    for grad, p in zip(got, ours.parameters(), strict=True):
        assert grad.dtype == p.dtype and relative_error(grad, p.grad) < 3e-2
    assert all(w.grad.isfinite().all() for w in wanting)


def test_gradients_of_adapters_keep_their_dtype_under_autocast():
    model = quantize(linear(), MXWeightOnlyLoRAConfig(r=4, adapter_dtype=torch.float32))
    nn.init.normal_(model[0].lora_B)
    x, grads = randn(5, 64, dtype=torch.bfloat16), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(x).sum().backward()
        grads.append(model[0].lora_A.grad.clone())
    assert torch.equal(*grads)


# --- kinds of differentiation ---------------------------------------------------------------------


def test_other_differentiation_than_backward_is_refused():
    """Rather than given zeros."""
    w, x = MXTensor.from_hp(randn(64, 64), MXFP4), randn(3, 64)
    for call in (
        lambda: torch.func.jvp(lambda x: F.linear(x, w), (x,), (x,)),
        lambda: torch.func.grad(lambda x: F.linear(x, w).sum())(x),
        lambda: torch.func.jvp(ops.swiglu, (x,), (x,)),
    ):
        with pytest.raises(NotImplementedError, match=r"not torch\.func or forward-mode"):
            call()


def test_the_output_of_experts_can_be_modified_in_place():
    results = []
    for double in (lambda y: y.mul_(2), lambda y: y * 2):
        ours = experts(Titan)
        args, (x,) = inputs(Titan, 9)
        double(ours(*args)).sum().backward()
        results.append([x.grad, *(p.grad for p in ours.parameters())])
    assert all(map(torch.equal, *results))


# --- what becomes of a module ---------------------------------------------------------------------


@pytest.mark.parametrize("config", [PREPARE, MXWeightOnlyLoRAConfig(r=4), RECIPE], ids=["qat", "lora", "recipe"])  # fmt: skip
def test_hooks_stay_removable_and_meet_the_new_module(config):
    model, calls = linear(), []
    handle = model[0].register_forward_hook(lambda *args: calls.append("forward"))
    model[0].register_load_state_dict_pre_hook(lambda module, *args: calls.append(module))
    quantize_(model, config)
    model(randn(1, 64))
    handle.remove()
    model(randn(1, 64))
    model.load_state_dict(model.state_dict())
    assert calls == ["forward", model[0]]


def test_converting_without_a_base_gives_experts_their_weights_back():
    source, ours = Titan(), experts(Titan)
    weights = dict(ours.named_parameters())
    model = nn.ModuleDict({"experts": ours})
    quantize_(model, CONVERT, filter_fn=is_experts)
    back = model["experts"]
    assert type(back) is Titan and vars(back).keys() == vars(source).keys()
    assert all(p is weights[name] for name, p in back.named_parameters())


def test_another_weight_in_a_packed_layer_is_printed():
    model = quantize(linear(), MXWeightOnlyConfig())
    assert "weight=mxfp4" in str(model)
    model[0].weight = nn.Parameter(model[0].weight.dequantize())
    assert "mxfp4" not in str(model)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("config", [PREPARE, RECIPE], ids=["qat", "recipe"])
def test_check_model_finds_what_quantize_would_refuse(config):
    fine, attention = nn.Linear(64, 64), nn.MultiheadAttention(64, 4)
    packed = quantize(linear(), MXWeightOnlyConfig())[0]
    biased = nn.Linear(64, 64)
    parametrize.register_parametrization(biased, "bias", nn.Identity())
    for layer, match in (
        (Doubled(64, 64), "its own forward"),
        (packed, "already a MXTensor"),
        (attention, "reads its weight"),
        (biased, "its bias is computed"),
    ):
        model = nn.ModuleList([fine, layer])

        def every(m, name):
            return isinstance(m, nn.Linear)

        with pytest.raises(ValueError, match=match):
            check_model(model, config, every)
        with pytest.raises(TypeError, match=match):
            quantize_(layer if layer is attention else nn.ModuleList([layer]), config, every)


def test_check_model_of_what_is_in_training():
    model = quantize(linear(), PREPARE)
    assert type(model[0]) is MXFakeQuantizedLinear
    with pytest.raises(ValueError, match="is in training; convert it"):
        check_model(model, MXWeightOnlyConfig())
    check_model(model, PREPARE)
    convert = QATConfig(MXWeightOnlyConfig(), step="convert")
    with pytest.warns(
        UserWarning, match="1 layer was never prepared and stays in high precision: 1$"
    ):
        check_model(nn.Sequential(*model, nn.Linear(100, 7)), convert)


# --- operands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[3, 1, 4], [1, 2, 6]])
def test_offsets_are_looked_at_on_the_cpu_with_activations_too(ends):
    q, s = ops.quantize(randn(3, 64, 64), MXFP4)
    offs = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match="end offsets must ascend from 0"):
        ops.grouped_mm(randn(4, 64), q, s, MXFP4, offs, activation=QuantizeSpec(MXFP8_E4M3))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32]
)
def test_ids_of_experts_of_any_integer_dtype(dtype):
    ids = torch.tensor([[0, 1], [100, 7]])
    for n_experts in (8, 128, 300):
        wanted = ops.route(ids, n_experts)
        for got, want in zip(ops.route(ids.to(dtype), n_experts), wanted, strict=True):
            assert torch.equal(got, want)


def test_complex_ids_are_refused():
    with pytest.raises(TypeError, match="expert ids must be integers"):
        ops.route(torch.zeros(1, 1, dtype=torch.complex128), EXPERTS)


def test_an_input_that_counts_nothing_is_not_looked_at():
    w, x = MXTensor.from_hp(randn(64, HIDDEN), MXFP4), randn(3, HIDDEN)
    nan = torch.full((3, 64), torch.nan)
    assert torch.equal(torch.addmm(nan, x, w.t(), beta=0), F.linear(x, w))
    wide = MXTensor.from_hp(randn(2, 64, HIDDEN), MXFP4)
    batched = torch.baddbmm(torch.full((2, 3, 64), torch.nan), x.expand(2, -1, -1), wide.mT, beta=0)
    assert_close(batched[0], F.linear(x, wide[0]).double())


def test_no_columns():
    w, x = MXTensor.from_hp(randn(64, 64), MXFP4), randn(3, 64).requires_grad_()
    y = F.linear(x, w[:0])
    y.sum().backward()
    assert y.shape == (3, 0) and x.grad.eq(0).all()


def _data_parallel(device):
    torch.manual_seed(0)  # the same adapters on each rank, as nothing makes them so
    model = quantize(linear().to(device), MXWeightOnlyLoRAConfig(r=4))
    nn.init.ones_(model[0].lora_B)
    with pytest.raises(NotImplementedError, match="init_sync=False"):
        DistributedDataParallel(model)
    x = randn(2, 3, 64).to(device)  # 3 rows for each rank
    model(x.flatten(0, 1)).sum().backward()
    wanted = [p.grad.clone() / 2 for p in (model[0].lora_A, model[0].lora_B)]
    model.zero_grad()
    replica = DistributedDataParallel(
        model, init_sync=False
    )  # held: without it nothing is averaged
    replica(x[dist.get_rank()]).sum().backward()
    for p, want in zip((model[0].lora_A, model[0].lora_B), wanted, strict=True):
        assert_close(p.grad, want.double())
    assert model[0].weight.grad is None


@each_backend
def test_packed_weights_under_distributed_data_parallel(backend):
    """Its first broadcast flattens parameters, which the error tells how to leave out."""
    run_ranks(_data_parallel, 2, backend=backend)


def test_bases_are_still_prepared():
    """What the checks above must not refuse."""
    for base in BASES.values():
        check_model(linear(), QATConfig(base, step="prepare"))
