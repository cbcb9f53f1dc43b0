"""NVFP4MXFP8Experts: each product matches a loop over experts; every way of calling such modules."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from _experts import (
    EXPERTS,
    HIDDEN,
    Concatenated,
    GptOss,
    Titan,
    each_family,
    inputs,
)
from _grids import BASES, assert_close, generator, name_of, randn, relative_error
from _recipes import CONFIG, CONFIGS, CONVERT, STOCHASTIC
from torch import nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor as TorchAOMXTensor
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXExperts,
    MXWeightOnlyLoRAConfig,
    NVFP4MXFP8Experts,
    ScaleCalculationMode,
    check_model,
    is_experts,
    reference,
)
from torchao_mx.ops.moe.groups import completed_groups

SOME = {name: CONFIGS[name] for name in ("e4m3", "grad_e5m2_floor")}
each_config = pytest.mark.parametrize("config", SOME.values(), ids=SOME)


def quantized(module, config=CONFIG):
    """``quantize_`` of a module that is a model's."""
    model = nn.ModuleDict({"experts": module})
    quantize_(model, config, filter_fn=is_experts)
    return model["experts"]


def prepared(family, config=CONFIG, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return quantized(family().to(device, dtype), config)


# --- one product ----------------------------------------------------------------------------------

GROUPS = {
    "whole_blocks": [32, 64, 128, 160],
    "ragged": [5, 38, 39, 104],
    "empty_first": [0, 33, 60, 97],
    "empty_middle": [40, 40, 40, 71],
    "empty_last": [31, 64, 70, 70],
    "one": [0, 45, 45, 45],
    "nobody": [0, 0, 0, 0],
}
BEHIND = 6  # rows of nobody


def expected_product(config, x, w, dy, ends, order, bias, device="cpu"):
    """(y, dx, dw, dbias) in float64, an expert at a time, from the reference's operands.

    Per-tensor scales are found on ``device``, as torchao's are: a GPU divides by a number by multiplying.
    """
    top_k = 1 if order is None else len(order) // len(x)
    token = torch.arange(len(x)) if order is None else order.long() // top_k
    rows, spec = x[token], config.forward_spec
    # Of all rows, as the forward product has it.
    pts = reference.per_tensor_scale(rows.to(device), spec.format).cpu()
    w_pts = reference.per_tensor_scale(w.to(device), spec.format, per_expert=True).cpu()
    xq = reference.fake_quantize(rows, spec.format, per_tensor_scale=pts).double()
    y, dx = torch.zeros(len(rows), w.shape[1], dtype=torch.float64), torch.zeros_like(x).double()
    dw, dbias = torch.zeros_like(w).double(), torch.zeros(w.shape[:2], dtype=torch.float64)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == end:
            continue
        mine = slice(start, end)
        products = reference.recipe_products(
            rows[mine], w[e], dy[mine], spec, config.backward_spec, config.grad_spec,
            weight_scale=w_pts[e, 0, 0],
        )  # fmt: skip
        y[mine] = xq[mine] @ products.y[1].double()
        y[mine] += 0 if bias is None else bias[e].double()
        dx.index_add_(0, token[mine], products.dx[0].double() @ products.dx[1].double())
        dw[e] = products.dw[0].double() @ products.dw[1].double()
        dbias[e] = dy[mine].double().sum(0)
    return y, dx, dw, dbias


@each_config
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
def test_product(config, groups, top_k, with_bias, transposed, device):
    ends, k, n = GROUPS[groups], HIDDEN, 96
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n_rows = ends[-1] + BEHIND
    n_rows += n_rows % 2
    order = None
    if top_k is not None:
        order = torch.randperm(n_rows, generator=generator()).int()
    module = GptOss() if transposed else Concatenated()
    name = "gate_up_proj"
    x = randn(n_rows // (top_k or 1), k, dtype=dtype)
    dy = randn(n_rows, 2 * n, dtype=dtype, seed=3)
    w = randn(EXPERTS, 2 * n, k, dtype=dtype, seed=1)
    bias = randn(EXPERTS, 2 * n, dtype=dtype, seed=2) if with_bias else None
    module._parameters[name] = nn.Parameter((w.mT if transposed else w).contiguous().to(device))
    ours = NVFP4MXFP8Experts.from_experts(module, config)
    leaf = x.to(device).requires_grad_()
    bias_leaf = bias.to(device).requires_grad_() if with_bias else None
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    y = ours.operand(name)(leaf, offs, None if order is None else order.to(device), bias_leaf)
    y.backward(dy.to(device))
    weight_grad = module._parameters[name].grad
    got = [y, leaf.grad, weight_grad.mT if transposed else weight_grad]
    got += [bias_leaf.grad] if with_bias else []
    expected = expected_product(config, x, w, dy, ends, order, bias, device)
    for actual, wanted in zip(got, expected, strict=False):
        assert actual.shape == wanted.shape and actual.dtype == dtype
        if wanted.eq(0).all():
            assert groups == "nobody" and actual.eq(0).all()
        else:
            assert_close(actual.cpu(), wanted)
    behind = slice(ends[-1], None)
    assert y[behind].eq(0).all()
    if order is None:
        assert leaf.grad[behind].eq(0).all()


@pytest.mark.parametrize("k", [32, 96])
def test_backward_operands_are_torchaos(k):
    """dX and dW of an expert from torchao's own quantizer, along the axis that each product reduces."""
    module = Concatenated()
    w, ends = randn(EXPERTS, 64, k, seed=1), GROUPS["ragged"]
    module._parameters["gate_up_proj"] = nn.Parameter(w)
    ours = NVFP4MXFP8Experts.from_experts(module, CONFIG)
    x, dy = randn(ends[-1], k).requires_grad_(), randn(ends[-1], 64, seed=3)
    ours.operand("gate_up_proj")(x, torch.tensor(ends, dtype=torch.int32), None, None).backward(dy)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == end:
            continue
        mine = slice(start, end)
        pad = -(end - start) % 32
        dyt, xt = (F.pad(t[mine].detach(), (0, 0, 0, pad)).t() for t in (dy, x))
        assert_close(x.grad[mine], torchao_values(dy[mine]) @ torchao_values(w[e].t()).t())
        grad = module._parameters["gate_up_proj"].grad[e]
        assert_close(grad, torchao_values(dyt) @ torchao_values(xt).t())


def torchao_values(t):
    """float64 of MXFP8 E4M3 (RCEIL) in blocks along the last axis."""
    quantized = TorchAOMXTensor.to_mx(
        t.contiguous(), torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL
    )
    return quantized.dequantize(torch.float32).double()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_reaches_all_rows(value):
    """Of the experts here, by the per-tensor scale, as in the converted module; from unassigned rows none."""
    ours = NVFP4MXFP8Experts.from_experts(Concatenated(), CONFIG)
    x, offs = randn(9, HIDDEN), torch.tensor([2, 5, 5, 7], dtype=torch.int32)
    clean = ours.operand("gate_up_proj")(x, offs, None, None)
    for row in (0, 8):
        poisoned = x.clone()
        poisoned[row, 0] = value
        y = ours.operand("gate_up_proj")(poisoned, offs, None, None)
        assert y[offs[-1] :].eq(0).all()
        assert y[: offs[-1]].isnan().all() if row == 0 else torch.equal(y, clean)


def test_zeros_give_zeros():
    """A per-tensor amax of 0, of tokens and of one expert's weight."""
    module = Concatenated()
    with torch.no_grad():
        module.gate_up_proj[1] = 0
    ours = NVFP4MXFP8Experts.from_experts(module, CONFIG)
    offs = torch.tensor([2, 5, 5, 7], dtype=torch.int32)
    assert ours.operand("gate_up_proj")(torch.zeros(7, HIDDEN), offs, None, None).eq(0).all()
    x = randn(7, HIDDEN).requires_grad_()
    y = ours.operand("gate_up_proj")(x, offs, None, None)
    y.backward(randn(*y.shape))
    assert y[2:5].eq(0).all() and x.grad[2:5].eq(0).all()
    assert y[:2].ne(0).any() and module.gate_up_proj.grad.isfinite().all()


def test_blocks_of_tokens_mix_no_experts():
    """An expert's dW does not see another's giant, though the two have rows of one block of 32."""
    grads = []
    for giant in (1.0, 1e6):
        ours = prepared(Titan)
        x = randn(20, HIDDEN).requires_grad_()
        with torch.no_grad():
            x[:9] *= giant
        offs = torch.tensor([9, 9, 20, 20], dtype=torch.int32)
        ours.operand("w1")(x, offs, None, None).backward(randn(20, 96, seed=3))
        grads.append(ours.w1.grad)
    assert torch.equal(grads[0][2], grads[1][2])
    assert not torch.equal(grads[0][0], grads[1][0])


def test_completed_groups():
    offs = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
    index, ends = completed_groups(offs, 12, 4)
    assert ends.tolist() == [4, 4, 12, 16]
    assert index.tolist() == [0, 1, 2, -1, 3, 4, 5, 6, 7, -1, -1, -1, 8, 9, -1, -1, *[-1] * 8]
    assert index.dtype == ends.dtype == torch.int32
    for seed in range(20):  # whatever the groups, the places suffice
        cuts = torch.randint(0, 71, (5,), generator=generator(seed)).sort().values.int()
        index, ends = completed_groups(cuts, 70, 32)
        assert index[index >= 0].tolist() == list(range(cuts[-1]))
        assert len(index) >= ends[-1] and (ends % 32 == 0).all()


@pytest.mark.parametrize("needs", ["x", "weight", "bias"])
def test_only_one_input_needs_its_gradient(needs):
    ours = prepared(GptOss)
    ours.requires_grad_(False)
    tensors = {"x": randn(11, HIDDEN), "weight": ours.gate_up_proj, "bias": ours.gate_up_proj_bias}
    tensors[needs].requires_grad_()
    offs = torch.tensor([3, 3, 9, 11], dtype=torch.int32)
    args = (tensors["x"], offs, None, tensors["bias"])
    ours.operand("gate_up_proj")(*args).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == {needs}


def test_bias_gradient_is_summed_in_fp32():
    ours = prepared(GptOss)
    offs = torch.tensor([4097, 4097, 4100, 4100], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours.operand("gate_up_proj")(
            torch.randn(4100, HIDDEN), offs, None, ours.gate_up_proj_bias
        )
    y.backward(torch.ones_like(y))
    assert ours.gate_up_proj_bias.grad[:, 0].tolist() == [4097, 0, 3, 0]


def test_stochastic_rounding():
    ours, offs = prepared(Titan, STOCHASTIC), torch.tensor([9, 9, 40, 40], dtype=torch.int32)
    x, dy = randn(40, HIDDEN), randn(40, 96, seed=3)

    def gradients(seed):
        torch.manual_seed(seed)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(ours.operand("w1")(leaf, offs, None, None), (leaf, ours.w1), dy)

    assert all(map(torch.equal, gradients(1), gradients(1)))
    draws = [gradients(seed) for seed in range(200)]
    _, dx, dw, _ = expected_product(CONFIG, x, ours.w1.detach(), dy, offs.tolist(), None, None)
    rounding = [relative_error(t, wanted) for t, wanted in zip(draws[0], (dx, dw), strict=True)]
    means = [torch.stack(t).double().mean(0) for t in zip(*draws, strict=True)]
    again = [torch.stack(t).double().mean(0) for t in zip(*draws[:100], strict=True)]
    for i, (mean, half) in enumerate(zip(means, again, strict=True)):
        assert relative_error(half, mean) < 0.12 * rounding[i]  # draws differ, their mean settles
        assert not torch.equal(draws[0][i], draws[1][i])


# --- modules --------------------------------------------------------------------------------------


class LoopProduct(torch.autograd.Function):
    """:func:`expected_product` as an op, in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, offs, order, config):
        ctx.save_for_backward(x, weight, bias, offs, order)
        ctx.config = config
        zeros = x.new_zeros(len(x) if order is None else len(order), weight.shape[1])
        y, *_ = expected_product(config, x, weight, zeros, offs.tolist(), order, bias)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, offs, order = ctx.saved_tensors
        _, *grads = expected_product(ctx.config, x, weight, dy, offs.tolist(), order, bias)
        dx, dw, dbias = (g.to(x.dtype) for g in grads)
        return dx, dw, None if bias is None else dbias, None, None, None


@each_family
def test_values_and_gradients(family, monkeypatch):
    """A module whose products are the loop's computes and trains the same."""
    ours = prepared(family)
    assert type(ours) is NVFP4MXFP8Experts
    args, wanting = inputs(family, 43)
    results = []
    for _ in range(2):
        for leaf in (*wanting, *ours.parameters()):
            leaf.grad = None
        out = ours(*args)
        out.backward(torch.randn(out.shape, generator=generator(5)))
        results.append([out, *(t.grad for t in (*wanting, *ours.parameters()))])
        monkeypatch.setattr(
            NVFP4MXFP8Experts, "_product",
            lambda self, name, x, offs, order, bias: LoopProduct.apply(
                x, self.base(name), bias, offs, order, self.recipe
            ),
        )  # fmt: skip
    # A value on the edge between two elements may fall to either side: fewer than one in a thousand do.
    for got, want in zip(*results, strict=True):
        assert relative_error(got.detach(), want.detach()) < 2e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_family
def test_converted_and_quantized_compute_what_was_trained(family, device):
    ours = prepared(family, dtype=torch.bfloat16, device=device)
    args, _ = inputs(family, 23, torch.bfloat16, device)
    want = ours(*args)
    torch.manual_seed(0)
    packed = quantized(family().to(device, torch.bfloat16), BASES["nvfp4"])
    for step in (CONVERT, QATConfig(BASES["nvfp4"], step="convert")):
        converted = quantized(copy.deepcopy(ours), step)
        assert type(converted) is type(packed) is MXExperts
        assert converted.__dict__.keys() == packed.__dict__.keys()
        assert torch.equal(converted(*args), want) and torch.equal(packed(*args), want)
        for name in converted.layout.weights:
            assert torch.equal(getattr(converted, name).qdata, getattr(packed, name).qdata)
            assert not getattr(converted, name).requires_grad
    assert quantized(converted, CONVERT) is converted


@each_family
def test_parameters_are_the_sources(family):
    source = family()
    ours = NVFP4MXFP8Experts.from_experts(source)
    assert dict(ours.named_parameters()).keys() == dict(source.named_parameters()).keys()
    assert all(p is source._parameters[n] for n, p in ours.named_parameters())
    assert f"{family.__name__}: " in repr(ours) and "forward=nvfp4, backward=mxfp8_e4m3" in repr(
        ours
    )


def test_training_lowers_the_loss(device):
    """As quantization-aware training does."""
    losses = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for config in (CONFIG, QATConfig(BASES["nvfp4"], step="prepare")):
        ours = prepared(Concatenated, config, dtype, device)
        args, _ = inputs(Concatenated, 32, dtype, device)
        target = torch.randn(32, HIDDEN, generator=generator(3)).to(device, dtype)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
        history = losses.setdefault(type(config), [])
        for _ in range(25):
            loss = F.mse_loss(ours(*args), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    assert losses[type(CONFIG)][-1] < 0.5 * losses[type(CONFIG)][0]
    assert losses[type(CONFIG)][-1] < 1.15 * losses[QATConfig][-1]


@pytest.mark.parametrize("family", [Concatenated, GptOss, Titan], ids=lambda f: f.__name__)
@pytest.mark.parametrize("config", [CONFIG, STOCHASTIC], ids=["nearest", "stochastic"])
def test_compiles_whole(family, config):
    torch._dynamo.reset()
    ours = prepared(family, config, torch.bfloat16)
    results = []
    for run in (torch.compile(ours, fullgraph=True, backend="aot_eager"), ours):
        args, wanting = inputs(family, 43, torch.bfloat16)
        for p in ours.parameters():
            p.grad = None
        torch.manual_seed(0)
        out = run(*args)
        out.sum().backward()
        results.append([out, *(w.grad for w in wanting), *(p.grad for p in ours.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_and_one_expert(rows, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours = prepared(Titan, dtype=dtype, device=device)
    x = torch.randn(rows, HIDDEN, device=device, dtype=dtype).requires_grad_()
    out = ours(x, torch.tensor([0, rows, 0, 0], device=device))
    out.sum().backward()
    assert out.shape == x.grad.shape == (rows, HIDDEN)
    for p in ours.parameters():
        assert p.grad.shape == p.shape and p.grad[[0, 2, 3]].eq(0).all()


@pytest.mark.gpu
def test_a_step_waits_for_nothing():
    ours = prepared(Concatenated, dtype=torch.bfloat16, device="cuda")
    args, _ = inputs(Concatenated, 64, torch.bfloat16, "cuda")
    ours(*args).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(*args).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", [Titan, GptOss], ids=lambda f: f.__name__)
def test_twice_is_once(family):
    ours = prepared(family)
    for again in (CONFIG, QATConfig(BASES["nvfp4"], step="prepare")):
        with pytest.warns(UserWarning, match="is already prepared"):
            assert quantized(ours, again) is ours
    check_model(nn.ModuleDict({"experts": ours}), CONFIG, is_experts)


def test_refusals():
    for family, sizes, message in (
        (Titan, {"hidden": 40}, r"Titan\.w1 has shape .*not a multiple of 16"),
        (Titan, {"inner": 48}, r"Titan\.w1: its output .*48.* is not a multiple of 32"),
        (GptOss, {"hidden": 48}, r"GptOss\.down_proj: its output .*48.* is not a multiple of 32"),
    ):
        module = family(**sizes)
        with pytest.raises(ValueError, match=message):
            quantized(module)
        with pytest.raises(ValueError, match=f"experts: {message}"):
            check_model(nn.ModuleDict({"experts": module}), CONFIG, is_experts)
    ours = prepared(Titan)
    with pytest.raises(TypeError, match="is in training"):
        quantized(ours, BASES["nvfp4"])
    with pytest.raises(TypeError, match="is in training; convert it first"):
        quantized(ours, MXWeightOnlyLoRAConfig(r=4))
    with pytest.raises(ValueError, match="for which it was not trained"):
        quantized(ours, QATConfig(BASES["w4a4"], step="convert"))
    with pytest.raises(TypeError, match="not a known module of experts"):
        NVFP4MXFP8Experts.from_experts(nn.Linear(32, 32))
    with pytest.raises(TypeError, match=r"config=.*must be a torchao_mx\.NVFP4Forward"):
        NVFP4MXFP8Experts.from_experts(Titan(), BASES["nvfp4"])
    with pytest.raises(TypeError, match="is in training; convert it first"):
        quantized(quantized(Titan(), QATConfig(BASES["nvfp4"], step="prepare")))
    with pytest.raises(TypeError, match="is already an MXTensor"):
        quantized(ours.to_packed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_copies_train_alone(dtype):
    ours = prepared(GptOss, dtype=dtype)
    other = copy.deepcopy(ours)
    args, _ = inputs(GptOss, 7, dtype)
    assert torch.equal(ours(*args), other(*args))
    other(*args).sum().backward()
    assert all(p.grad is None for p in ours.parameters())
