"""LoRA through quantize_: what a layer computes, trains, keeps, merges and refuses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from _grids import (
    DTYPES,
    E4M3,
    E5M2,
    assert_same_bytes,
    linear,
    name_of,
    quantize,
    randn,
    relative_error,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torchao.quantization import quantize_

from torchao_mx import (
    MXLoRALinear,
    MXTensor,
    is_linear,
    ops,
)
from torchao_mx import MXWeightOnlyLoRAConfig as Config

K, N, R = 64, 96, 4
FORMATS = {
    "mxfp4": Config(r=R),
    "mxfp8": Config(r=R, dtype=E4M3),
    "nvfp4": Config(r=R, block_size=16),
}
FP8 = Config(r=R, compute_dtype=E4M3, grad_compute_dtype=E5M2)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
each_format = pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def lora(config, bias=True, dtype=torch.float32, device="cpu", **kwargs):
    """A model of one layer whose adapters are at work."""
    model = quantize(linear(bias, dtype, device, **kwargs), config)
    if device != "meta":
        nn.init.normal_(model[0].lora_B, std=0.2, generator=torch.Generator().manual_seed(5))
    return model


def merged64(layer):
    """``W + s B A`` in float64, with gradients to copies of the adapters."""
    a, b = (p.detach().cpu().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    w = layer.weight.dequantize(torch.float32).cpu().double()
    return w + layer.config.scaling * b @ a, a, b


def bias64(layer):
    return None if layer.bias is None else layer.bias.detach().cpu().double()


# --- values and gradients -------------------------------------------------------------------------


@each_format
@each_dtype
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_values_and_gradients(config, dtype, adapter_dtype, bias, device):
    config = Config(
        r=R, dtype=config.dtype, block_size=config.block_size, adapter_dtype=adapter_dtype
    )
    model = lora(config, bias, dtype).to(device)
    layer = model[0]
    assert layer.lora_A.dtype == layer.lora_B.dtype == (adapter_dtype or dtype)
    for shape in ((7,), (2, 3), (1,), (), (0,)):
        x, dy = randn(*shape, K, dtype=dtype), randn(*shape, N, dtype=dtype, seed=3)
        x64 = x.double().requires_grad_()
        w, a, b = merged64(layer)
        expected = F.linear(x64, w, bias64(layer))
        here = x.to(device).requires_grad_()
        y = model(here)
        assert (y.dtype, y.shape) == (dtype, expected.shape)
        if not y.numel():
            continue
        assert relative_error(y.cpu(), expected) < BOUND[dtype]
        y.backward(dy.to(device))
        expected.backward(dy.double())
        for t, exact in ((here, x64), (layer.lora_A, a), (layer.lora_B, b)):
            assert t.grad.dtype == t.dtype
            assert relative_error(t.grad.cpu(), exact.grad) < max(BOUND[dtype], BOUND[t.dtype])
        assert layer.weight.grad is None and (not bias or layer.bias.grad is None)
        model.zero_grad()


def test_against_peft():
    """The same parameters in PEFT's own layer on the dequantized weight."""
    peft = pytest.importorskip("peft")
    for use_rslora in (False, True):
        model = lora(Config(r=R, lora_alpha=6, use_rslora=use_rslora))
        layer, plain = model[0], linear()
        with torch.no_grad():
            plain[0].weight.copy_(layer.weight.dequantize())
        theirs = peft.get_peft_model(
            plain,
            peft.LoraConfig(r=R, lora_alpha=6, use_rslora=use_rslora, target_modules=["0"]),
        ).base_model.model
        pairs = {
            "lora_A": theirs[0].lora_A.default.weight,
            "lora_B": theirs[0].lora_B.default.weight,
        }
        assert layer.lora_A.shape == pairs["lora_A"].shape and not pairs["lora_B"].any()
        bound = layer.lora_A.abs().max(), pairs["lora_A"].abs().max()
        assert 0.9 / math.sqrt(K) < min(bound) <= max(bound) < 1 / math.sqrt(K)
        with torch.no_grad():
            for name, p in pairs.items():
                p.copy_(getattr(layer, name))
        x = randn(5, K)
        for m in (model, theirs):
            m(x).square().sum().backward()
        assert relative_error(model(x), theirs(x)) < 1e-5
        for name, p in pairs.items():
            assert relative_error(getattr(layer, name).grad, p.grad) < 1e-5


@each_format
def test_begins_as_the_quantized_layer(config):
    x = randn(5, K)
    model = quantize(linear(), config)
    assert not model[0].lora_B.any() and model[0].lora_A.any()
    assert relative_error(model(x), F.linear(x, model[0].weight, model[0].bias)) < 1e-6
    assert torch.equal(
        model[0].weight, MXTensor.from_hp(linear()[0].weight, config.weight_spec.format)
    )


def test_under_autocast():
    for config in (Config(r=R), Config(r=R, lora_dropout=0.5)):
        model, x = lora(config), randn(5, K)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x.requires_grad_())
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert {t.grad.dtype for t in (x, model[0].lora_A, model[0].lora_B)} == {torch.float32}
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert (
            relative_error(y, F.linear(x.double(), merged64(model[0])[0], bias64(model[0]))) < 1e-2
        )


def test_small_updates_of_fp32_adapters_are_kept():
    """A hundred steps that bf16 would each round away, under bf16 activations."""
    x = randn(16, K, dtype=torch.bfloat16)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = lora(Config(r=R, adapter_dtype=dtype), dtype=torch.bfloat16)
        parameters = [model[0].lora_A, model[0].lora_B]
        with torch.no_grad():
            for p in parameters:  # away from zero, where bf16 is coarse
                p.copy_(torch.where(p.abs() < 0.05, 0.05, p))
            start = [p.clone() for p in parameters]
        before = model(x).detach()
        for _ in range(100):
            model(x).float().square().mean().backward()
            assert all(p.grad.dtype == dtype for p in parameters)
            with torch.no_grad():
                for p in parameters:
                    p -= 5e-5 * p.grad.sign()
                    p.grad = None
        moved[dtype] = [relative_error(p, s) for p, s in zip(parameters, start, strict=True)]
        moved[dtype].append(relative_error(model(x), before))
    assert min(moved[torch.float32]) > 1e-2
    assert max(moved[torch.bfloat16]) == 0


@pytest.mark.parametrize(
    "device", [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_fp8_compute(device):
    """Rounded by rows: close, and not what bf16 computes; adapters' gradients as without."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs 8-bit tensor cores")
    x, dy = randn(32, K, dtype=torch.bfloat16), randn(32, N, dtype=torch.bfloat16, seed=3)
    results = []
    for config in (FP8, Config(r=R)):
        model = linear(dtype=torch.bfloat16)
        nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(1))
        quantize(model, config)
        for seed, p in enumerate((model[0].lora_A, model[0].lora_B)):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(seed))
        model.to(device)
        here = x.clone().to(device).requires_grad_()
        y = model(here)
        y.backward(dy.to(device))
        results.append([y, here.grad, model[0].lora_A.grad, model[0].lora_B.grad])
    for i, (y, exact) in enumerate(zip(*results, strict=True)):
        assert (0.005 if i < 2 else 0) <= relative_error(y, exact) < (0.1 if i < 2 else 1e-2)


def test_options_reach_the_op(monkeypatch):
    config = Config(
        r=R, lora_alpha=6, compute_dtype=E4M3, grad_compute_dtype=torch.bfloat16,
        strategy="unpack8", max_scratch_bytes=12345,
    )  # fmt: skip
    model, seen = lora(config, dtype=torch.bfloat16), {}
    monkeypatch.setattr(ops, "lora_matmul", lambda *args, **kwargs: seen.update(kwargs, args=args))
    model(randn(3, K, dtype=torch.bfloat16))
    assert seen["args"][-1] == 1.5 and seen["bias"] is model[0].bias
    options = ("compute_dtype", "grad_compute_dtype", "strategy", "max_scratch_bytes")
    assert [seen[name] for name in options] == [getattr(config, name) for name in options]


# --- dropout --------------------------------------------------------------------------------------


def test_dropout():
    """PEFT's: on the adapters' input alone, in training alone."""
    model, x = lora(Config(r=R, lora_dropout=0.5)), randn(5, K).requires_grad_()
    layer, dy = model[0], randn(5, N, seed=3)
    torch.manual_seed(0)
    y = model(x)
    y.backward(dy)
    torch.manual_seed(0)
    x64 = x.detach().double().requires_grad_()
    dropped = x64 * F.dropout(torch.ones_like(x), 0.5)
    _, a, b = merged64(layer)
    expected = F.linear(x64, layer.weight.dequantize().double(), bias64(layer))
    expected = expected + layer.config.scaling * dropped @ a.mT @ b.mT
    expected.backward(dy.double())
    assert relative_error(y, expected) < 1e-5
    for t, exact in ((x, x64), (layer.lora_A, a), (layer.lora_B, b)):
        assert relative_error(t.grad, exact.grad) < 1e-5
    other = lora(Config(r=R))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), other(x))


# --- training -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.embed = nn.Embedding(16, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 16)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(x + self.down(F.gelu(self.up(x))))


@each_format
def test_training(config):
    """Only adapters move, and the loss falls; the head is left out by filter_fn."""
    torch.manual_seed(0)
    model = Block().requires_grad_(False)
    quantize_(model, config, filter_fn=lambda m, fqn: is_linear(m) and fqn != "head")
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert adapters == {f"{m}.lora_{x}" for m in ("qkv", "out", "up", "down") for x in "AB"}
    assert type(model.head) is nn.Linear and type(model.qkv) is MXLoRALinear
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in adapters}
    ids = torch.randint(16, (8, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name


def test_other_modules_are_left_alone():
    model = nn.Sequential(nn.LayerNorm(K), *linear())
    quantize_(model, Config(r=R))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.weight", "0.bias", "1.lora_A", "1.lora_B"]
    assert not model[1].weight.requires_grad and not model[1].bias.requires_grad


def test_backward_keeps_x_and_the_packed_weight():
    model, x, saved = lora(Config(r=R)), randn(128, K).requires_grad_(), {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    w = model[0].weight
    for t in (w.qdata, w.scale, x, model[0].lora_A, model[0].lora_B):
        assert saved.pop(t.untyped_storage().data_ptr())
    assert sum(saved.values()) == 128 * R * 4  # x A^T


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing(dropout, use_reentrant):
    model, grads = lora(Config(r=R, lora_dropout=dropout)), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        x = randn(5, K).requires_grad_()
        torch.manual_seed(0)
        run(x).square().sum().backward()
        grads.append([x.grad, model[0].lora_A.grad, model[0].lora_B.grad])
        model.zero_grad()
    for actual, expected in zip(*grads, strict=True):
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("case", ["plain", "fp32_adapters", "dropout", "merged", "fp8"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile(case, backend):
    device = "cuda" if backend == "inductor" else "cpu"
    dtype = torch.bfloat16 if device == "cuda" or case == "fp8" else torch.float32
    config = {
        "dropout": Config(r=R, lora_dropout=0.5),
        "fp32_adapters": Config(r=R, adapter_dtype=torch.float32),
        "fp8": FP8,
    }.get(case, Config(r=R))
    model = lora(config, dtype=dtype).to(device)
    if case == "merged":
        model[0].merge()
    torch.compiler.reset()
    x = randn(5, K, dtype=dtype).to(device).requires_grad_()
    results = []
    for run in (torch.compile(model, fullgraph=True, backend=backend), model):
        torch.manual_seed(0)
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
        x.grad = None
    for compiled, eager in zip(*results, strict=True):
        if backend == "aot_eager":
            assert torch.equal(compiled, eager)
        elif case != "dropout":  # inductor has its own random numbers
            assert relative_error(compiled, eager) < 1e-2


@pytest.mark.gpu
def test_graph_capture():
    """No host synchronisation: a forward and backward can be captured and replayed."""
    x = randn(16, K, dtype=torch.bfloat16).cuda().requires_grad_()
    for config in (Config(r=R), Config(r=R, adapter_dtype=torch.float32, strategy="unpack")):
        model = lora(config, dtype=torch.bfloat16).cuda()
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))
        results = []
        for run in (graphed, model):
            y = run(x)
            y.backward(torch.ones_like(y))
            results.append([y, x.grad, run[0].lora_A.grad, run[0].lora_B.grad])
            x.grad = None
        for replayed, eager in zip(*results, strict=True):
            assert torch.equal(replayed, eager)
