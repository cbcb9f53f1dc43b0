"""Products with MXTensor and LoRATensor weights against the same expressions of float64 tensors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from _grids import name_of, randn, refusals, relative_error
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.utils import parametrize

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, MXTensor, QuantizeSpec
from torchao_mx.tensor import LoRATensor

E, N, K, RANK, S = 3, 64, 96, 4, 0.5
OFFS = torch.tensor([4, 4, 9], dtype=torch.int32)  # one empty expert, and rows of nobody
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

each_format = pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, NVFP4], ids=name_of)
each_kind = pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
each_layout = pytest.mark.parametrize("transposed", [False, True], ids=["nk", "kn"])


def base_weight(fmt, *shape, dtype=torch.float32):
    return MXTensor.from_hp(randn(*shape, dtype=dtype, seed=1), fmt)


def adapters(*lead, dtype=torch.float32):
    return randn(*lead, RANK, K, dtype=dtype, seed=2), randn(*lead, N, RANK, dtype=dtype, seed=3)


def with_update(w, a, b, transposed):
    """``w + S b a``, of the ``[.., N, K]`` weight or of its transpose."""
    add = torch.addmm if w.dim() == 2 else torch.baddbmm
    if transposed:
        return add(w.mT, a.mT, b.mT, alpha=S).mT
    return add(w, b, a, alpha=S)


def values(w):
    return w.dequantize() if isinstance(w, (MXTensor, LoRATensor)) else w


def grouped(rows, w, bias=None, function="grouped_mm"):
    """``grouped_mm``, which for float64 does not exist, of the first ``OFFS[-1]`` rows; zeros behind."""
    if isinstance(w, (MXTensor, LoRATensor)):
        function = F.grouped_mm if function == "grouped_mm" else torch._grouped_mm
        return function(rows, w, offs=OFFS.to(rows.device), bias=bias)
    parts = []
    for e, (start, end) in enumerate(zip([0, *OFFS.tolist()], OFFS.tolist(), strict=False)):
        y = rows[start:end] @ w[e]
        parts.append(y if bias is None else y + bias[e])
    return torch.cat([*parts, parts[0].new_zeros(len(rows) - OFFS[-1], w.shape[-1])])


def expressions(text):
    """A function of the names below for each line, named by it."""
    lines = [line.strip() for line in text.strip().splitlines()]
    names = "w, x, z, x3, z3, xr, zr, bn, bk, be, s, s3"
    return {line: eval(f"lambda {names}, **_: {line}", globals()) for line in lines}


DENSE = expressions("""
    F.linear(x, w)
    F.linear(x, w, bn)
    F.linear(x[0], w, bias=bn)
    F.linear(z, w.t(), bk)
    x @ w.t()
    torch.matmul(x3, w.mT)
    torch.mm(x, w.T)
    x.mm(w.transpose(0, 1))
    z @ w
    z3.matmul(w)
    z.mm(w)
    torch.addmm(bn, x, w.t())
    torch.addmm(s, x, w.transpose(-1, -2), beta=0.5, alpha=2)
    torch.Tensor.addmm(bk, z, w)
    values(w)
    values(w.t())
""")
BATCHED = expressions("""
    torch.bmm(x3, w.mT)
    x3 @ w.transpose(-2, -1)
    z3.bmm(w)
    torch.matmul(z3, w)
    torch.bmm(x3[:, :0], w.transpose(1, 2))
    torch.baddbmm(s3, x3, w.mT, beta=0.5, alpha=2)
    s3.baddbmm(x3, w.mT)
    grouped(xr, w.mT)
    grouped(xr, w.transpose(-2, -1), be, "_grouped_mm")
    grouped(zr, w)
    x3[1] @ w[1].t()
    x3[1] @ w.mT[torch.tensor(1)]
    torch.bmm(x3[1:], w[1:].mT)
    torch.bmm(z3[[2, 0]], w[[2, 0]])
    torch.bmm(z3[1:2].expand(4, -1, -1), w[torch.tensor([2, 0, 2, 1])])
    values(w)
    values(w.mT[1])
""")


def operands(dtype):
    shapes = dict(
        x=(5, K), z=(5, N), x3=(E, 5, K), z3=(E, 5, N), xr=(12, K), zr=(12, N),
        bn=(N,), bk=(K,), be=(E, N), s=(5, N), s3=(E, 5, N),
    )  # fmt: skip
    return {name: randn(*shape, dtype=dtype, seed=5) for name, shape in shapes.items()}


def check(expression, fmt, lead, lora, transposed, device):
    """Value, dtype, and the gradient of everything that the expression uses."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = base_weight(fmt, *lead, N, K, dtype=dtype).to(device)
    tensors = operands(dtype)
    tensors["a"], tensors["b"] = adapters(*lead)
    tensors = {k: t.to(device).requires_grad_() for k, t in tensors.items()}
    exact = {k: t.detach().cpu().double().requires_grad_() for k, t in tensors.items()}
    w64 = base.dequantize(torch.float32).cpu().double()
    if lora:
        w = with_update(base, tensors["a"], tensors["b"], transposed)
        w64 = w64 + S * exact["b"] @ exact["a"]
        assert type(w) is LoRATensor
    else:
        w = base.mT.contiguous().mT if transposed else base
    y, expected = expression(w=w, **tensors), expression(w=w64, **exact)
    assert (y.dtype, y.shape, type(y)) == (dtype, expected.shape, torch.Tensor)
    if y.numel():
        assert relative_error(y.cpu(), expected) < BOUND[dtype]
    if not expected.requires_grad:
        return
    dy = randn(*y.shape, dtype=dtype, seed=7)
    wanted = torch.autograd.grad(expected, exact.values(), dy.double(), allow_unused=True)
    grads = torch.autograd.grad(y, tensors.values(), dy.to(device), allow_unused=True)
    for (name, t), grad, want in zip(tensors.items(), grads, wanted, strict=True):
        if want is None:
            assert grad is None, name
        elif want.eq(0).all():
            assert grad.eq(0).all(), name
        else:
            assert grad.dtype == t.dtype
            assert relative_error(grad.cpu(), want) < BOUND[dtype], name


@each_format
@each_kind
@each_layout
@pytest.mark.parametrize("expression", DENSE.values(), ids=DENSE)
def test_dense(expression, fmt, lora, transposed, device):
    check(expression, fmt, (), lora, transposed, device)


@each_format
@each_kind
@each_layout
@pytest.mark.parametrize("expression", BATCHED.values(), ids=BATCHED)
def test_batched_and_grouped(expression, fmt, lora, transposed, device):
    check(expression, fmt, (E,), lora, transposed, device)


@each_format
@pytest.mark.parametrize("lead", [(), (E,)], ids=["2d", "3d"])
@each_layout
def test_is_what_it_stands_for(fmt, lead, transposed):
    """Shape, strides, dtype and device; formed without a computation or a copy."""
    base = base_weight(fmt, *lead, N, K, dtype=torch.bfloat16)
    a, b = adapters(*lead)
    w = with_update(base, a, b, transposed)
    for mine, theirs in ((w, base), (w.mT, base.mT), (w.mT.mT, base)):
        assert (mine.shape, mine.stride(), mine.dtype) == (
            theirs.shape,
            theirs.stride(),
            torch.bfloat16,
        )
        assert mine.device == theirs.device and mine.dim() == theirs.dim()
    assert w.base.qdata.data_ptr() == base.qdata.data_ptr()
    assert (w.lora_a.data_ptr(), w.lora_b.data_ptr()) == (a.data_ptr(), b.data_ptr())
    assert w.dequantize(torch.float32).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(w.dequantize(torch.float32), w.dequantize(torch.float32))
        exact = base.dequantize(torch.float32).double() + S * b.double() @ a.double()
        assert relative_error(w.dequantize(torch.float32), exact) < 1e-6


@pytest.mark.parametrize("needs", ["x", "a", "b", "bn"])
def test_only_one_operand_needs_its_gradient(needs):
    base, t = base_weight(MXFP4, N, K), operands(torch.float32)
    t["a"], t["b"] = adapters()
    t[needs].requires_grad_()
    F.linear(t["x"], with_update(base, t["a"], t["b"], False), t["bn"]).square().sum().backward()
    assert t[needs].grad.abs().sum() > 0
    assert [name for name, tensor in t.items() if tensor.grad is not None] == [needs]


def test_gradients_pass_clone_and_detach_ends_them():
    base, (a, b) = base_weight(MXFP4, N, K), adapters()
    a.requires_grad_(), b.requires_grad_()
    w = with_update(base, a, b, True)
    x = randn(5, K)
    y = x @ w.t()
    assert torch.equal(x @ w.clone().t(), y)
    assert torch.autograd.grad((x @ w.clone().t()).sum(), [a, b])[0].abs().sum() > 0
    assert not (x @ w.detach().t()).requires_grad and torch.equal(x @ w.detach().t(), y)


def test_under_autocast():
    base, (a, b), x = base_weight(MXFP4, N, K), adapters(), randn(5, K)
    a.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, with_update(base, a, b, False))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert a.grad.dtype == torch.float32
    assert relative_error(y, x @ (base.dequantize() + S * b @ a).mT) < 1e-2


# --- in other people's code -----------------------------------------------------------------------


class Update(nn.Module):
    """How PEFT adapts a parameter."""

    def __init__(self, lhs, rhs):
        super().__init__()
        self.lhs, self.rhs = lhs, rhs

    def forward(self, w):
        return torch.baddbmm(w, self.lhs, self.rhs, alpha=S)


def test_as_a_parametrization():
    module, (a, b) = nn.Module(), adapters(E)
    base = base_weight(MXFP4, E, N, K)
    module.weight = nn.Parameter(base, requires_grad=False)
    a.requires_grad_()
    parametrize.register_parametrization(module, "weight", Update(b, a))
    x = randn(E, 5, K)
    with parametrize.cached():
        assert module.weight is module.weight
        y = x @ module.weight.mT
    y.sum().backward()
    assert relative_error(y, x @ (base.dequantize() + S * b @ a).mT) < 1e-5
    assert a.grad.abs().sum() > 0
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert torch.equal(module.weight, base) and not module.weight.requires_grad


class Experts(nn.Module):
    """Two projections, their weights stored as gpt-oss (``is_transposed``) or as the others have them."""

    def __init__(self, is_transposed, packed):
        super().__init__()
        self.is_transposed = is_transposed
        for name, seed in (("up", 1), ("down", 2)):
            shape = (E, N, K) if name == "up" else (E, K, N)
            w = MXTensor.from_hp(randn(*shape, seed=seed), MXFP4)
            w = w.mT if is_transposed else w
            setattr(self, name, nn.Parameter(w if packed else w.dequantize(), requires_grad=False))

    def forward(self, x):
        for w in (self.up, self.down):
            x = torch.bmm(x, w if self.is_transposed else w.mT)
        return x


@pytest.mark.parametrize("is_transposed", [True, False])
def test_peft_target_parameters(is_transposed):
    """PEFT on our weights, unpatched, against PEFT on their dequantized values."""
    peft = pytest.importorskip("peft")
    x, dy = randn(E, 5, K), randn(E, 5, K, seed=3)
    results = []
    for packed in (True, False):
        model = nn.ModuleDict({"experts": Experts(is_transposed, packed)})
        model.forward = lambda x, experts=model["experts"]: experts(x)
        config = peft.LoraConfig(
            r=RANK, target_modules=[], target_parameters=["experts.up", "experts.down"]
        )
        model = peft.get_peft_model(model, config)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 4 and all("lora_" in name for name in trained)
        for seed, p in enumerate(trained.values()):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(seed))
        experts = model.base_model.model["experts"]
        y = experts(x)
        y.backward(dy)
        results.append([y, *(p.grad for p in trained.values())])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5
    model = nn.ModuleDict({"experts": Experts(is_transposed, True)})
    model = peft.get_peft_model(model, config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(
        NotImplementedError, match=r"aten.add.Tensor is not implemented for MXTensor"
    ):
        model.base_model.model["experts"](x)


def test_peft_target_modules():
    """A linear layer with a packed weight, under PEFT's own LoRA layer."""
    peft = pytest.importorskip("peft")
    w = base_weight(MXFP4, N, K)
    x, results = randn(5, K), []
    for weight in (w, w.dequantize()):
        model = nn.Sequential(nn.Linear(K, N, bias=False))
        model[0].weight = nn.Parameter(weight, requires_grad=False)
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=["0"]))
        trained = [p for p in model.parameters() if p.requires_grad]
        for seed, p in enumerate(trained):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(seed))
        y = model.base_model.model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in trained)])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5


def dense_step(w, a, b, x):
    return x[0] @ torch.addmm(w.t(), a.t(), b.t(), alpha=S)


def grouped_step(w, a, b, x):
    w = torch.baddbmm(w[None], b[None], a[None], alpha=S)
    return F.grouped_mm(x[0], w.mT, offs=torch.tensor([4], dtype=torch.int32, device=x.device))


def batched_step(w, a, b, x):
    w = torch.baddbmm(w[None], b[None], a[None], alpha=S)
    return torch.bmm(x, w.mT) + F.linear(x, w[0])


@pytest.mark.parametrize("step", [dense_step, grouped_step, batched_step])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile(step, backend):
    device, dtype = ("cuda", torch.bfloat16) if backend == "inductor" else ("cpu", torch.float32)
    w = nn.Parameter(base_weight(MXFP4, N, K, dtype=dtype).to(device), requires_grad=False)
    tensors = [t.to(device).requires_grad_() for t in (*adapters(), randn(1, 5, K, dtype=dtype))]
    torch.compiler.reset()
    results = []
    for run in (torch.compile(step, backend=backend, fullgraph=True), step):
        y = run(w, *tensors)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for compiled, eager in zip(*results, strict=True):
        if backend == "aot_eager":
            assert torch.equal(compiled, eager)
        else:
            assert relative_error(compiled, eager) < 1e-2


# --- what it refuses and says ---------------------------------------------------------------------


def test_repr():
    a, b = adapters()
    w = with_update(base_weight(NVFP4, N, K, dtype=torch.bfloat16), a, b, True)
    assert_expected_inline(
        f"{w}\n{w.t()!r}",
        """\
LoRATensor(shape=(64, 96), r=4, scaling=0.5, base=nvfp4, orig_dtype=bfloat16, device=cpu)
LoRATensor(shape=(96, 64), r=4, scaling=0.5, base=nvfp4, orig_dtype=bfloat16, transposed, device=cpu)""",
    )


def test_refusals_of_operators():
    w = with_update(base_weight(MXFP4, N, K), *adapters(), False)
    w3 = with_update(base_weight(MXFP4, E, N, K), *adapters(E), False)
    x = randn(5, K)
    operators = [
        lambda: w + 1,
        lambda: w.sum(),
        lambda: w.mul_(2),
        lambda: torch.zeros_like(w),
        lambda: w.to(torch.float16),
        lambda: list(w3),
        lambda: F.relu(w),
        lambda: w[0],
        lambda: w3[:, 1],
        lambda: w3.transpose(0, 1),
        lambda: w3.t(),
        lambda: torch.bmm(x, w3.mT),
        lambda: F.linear(x[:, :64], w),
        lambda: F.grouped_mm(x, w3.mT),
        lambda: copy.deepcopy(w),
        lambda: pickle.dumps(w),
    ]
    text = refusals(operators, (NotImplementedError, TypeError, ValueError))
    text = text.replace(str(w), "<w>").replace(str(w3), "<w3>").replace(str(w3.mT), "<w3.mT>")
    assert_expected_inline(
        text,
        """\
NotImplementedError: aten.add.Tensor is not implemented for <w>: call .dequantize() on it first; for PEFT's DoRA, merge_and_unload and several adapters at once, load the model in high precision, or merge one adapter with torchao_mx.hf.save_pretrained(merge_adapters=True)
NotImplementedError: aten.sum.default is not implemented for <w>: call .dequantize() on it first
NotImplementedError: aten.mul_.Tensor is not implemented for <w>: call .dequantize() on it first
NotImplementedError: aten.zeros_like.default is not implemented for <w>: call .dequantize() on it first
NotImplementedError: aten._to_copy.default is not implemented for <w>: call .dequantize() on it first
NotImplementedError: aten.unbind.int is not implemented for <w3>: call .dequantize() on it first
NotImplementedError: aten.relu.default is not implemented for <w>: call .dequantize() on it first
NotImplementedError: indexing of <w>: only axis 0 of a 3-D weight can be indexed; call .dequantize() on it first
NotImplementedError: indexing of <w3>: only axis 0 of a 3-D weight can be indexed; call .dequantize() on it first
NotImplementedError: transpose of <w3>: only the last two axes can be swapped; call .dequantize() on it first
ValueError: t of <w3>: t needs two dimensions; use .mT to swap the last two
ValueError: x has shape (5, 96); a weight of 3 matrices needs x [3, M, 96]: expand or reshape x
ValueError: x has shape (5, 64); the weight reduces over 96 elements, which x's last axis must have
NotImplementedError: grouped_mm with a packed weight needs offs, and out_dtype must be mat_a's: convert the result, use bmm for groups of equal size, or call .dequantize() first
NotImplementedError: <w> exists only within a forward pass and cannot be saved: save its base, lora_a and lora_b, or its .dequantize() values
NotImplementedError: <w> exists only within a forward pass and cannot be saved: save its base, lora_a and lora_b, or its .dequantize() values""",
    )


def test_refusals_of_updates():
    w, (a, b) = base_weight(MXFP4, N, K), adapters()
    w3, (a3, b3) = base_weight(MXFP4, E, N, K), adapters(E)
    quantizing = w.replace(activation=QuantizeSpec(MXFP4))
    calls = [
        lambda: torch.addmm(w, b, a, beta=2),
        lambda: torch.addmm(w, b, a, alpha=torch.tensor(2.0)),
        lambda: torch.addmm(w, b, a[:, :32]),
        lambda: torch.addmm(w, b.double(), a),
        lambda: torch.addmm(w, randn(N, 65), randn(65, K)),
        lambda: torch.addmm(w, b, a.to("meta")),
        lambda: torch.addmm(quantizing, b, a),
        lambda: torch.baddbmm(w3, b, a),
        lambda: torch.ops.aten.addmm(w, b, a),
        lambda: LoRATensor(w.dequantize(), a, b, S),
        lambda: LoRATensor(w.t(), b.t(), a.t(), S),
        lambda: LoRATensor(w3[None], a3[None], b3[None], S),
        lambda: w + S * b @ a,
    ]
    text = refusals(calls, (NotImplementedError, TypeError, ValueError))
    text = text.replace(str(w), "<w>")
    assert_expected_inline(
        text,
        """\
NotImplementedError: addmm onto <w> with beta=2; a low-rank update of a packed weight needs beta=1: call .dequantize() on it first
TypeError: scaling is a Tensor; it must be a Python number: use .item() once, outside the training loop, or multiply lora_b by it
ValueError: lora_a has shape (4, 32) and lora_b (64, 4); a weight [64, 96] takes lora_a [r, 96] and lora_b [64, r]
TypeError: lora_b has dtype torch.float64; adapters are bfloat16, float16 or float32: convert it with .to(torch.bfloat16)
ValueError: the adapters have rank 65; a weight of 64 x 96 takes a rank from 1 to 64
ValueError: lora_a is on meta and the weight on cpu; move one with .to(device)
ValueError: MXTensor(shape=(64, 96), mxfp4, orig_dtype=float32, activation=mxfp4 (rceil), device=cpu) quantizes the other operand of its products, which LoRA products cannot do: use .replace(activation=None)
ValueError: lora_a has shape (4, 96) and lora_b (64, 4); a weight [3, 64, 96] takes lora_a [3, r, 96] and lora_b [3, 64, r]
NotImplementedError: addmm takes an MXTensor or a LoRATensor only as its second matrix, the weight; call .dequantize() on the other operands first
TypeError: the base of LoRA adapters is a Tensor; it must be an MXTensor: quantize it with MXTensor.from_hp
ValueError: MXTensor(shape=(96, 64), mxfp4, orig_dtype=float32, packed_axis=-2, device=cpu) cannot take LoRA adapters; the weight must be [N, K] or [E, N, K], packed along the last axis: reshape it, or undo a transpose with .mT
ValueError: MXTensor(shape=(1, 3, 64, 96), mxfp4, orig_dtype=float32, device=cpu) cannot take LoRA adapters; the weight must be [N, K] or [E, N, K], packed along the last axis: reshape it, or undo a transpose with .mT
NotImplementedError: aten.add.Tensor is not implemented for <w>: call .dequantize() on it first; for PEFT's DoRA, merge_and_unload and several adapters at once, load the model in high precision, or merge one adapter with torchao_mx.hf.save_pretrained(merge_adapters=True)""",
    )


def test_a_weight_that_asks_for_a_gradient_is_refused():
    w, (a, b), x = base_weight(MXFP4, N, K), adapters(), randn(5, K)
    w.requires_grad_()
    calls = [
        lambda: x @ w.t(),
        lambda: F.linear(x, w),
        lambda: torch.addmm(w, b, a),
        lambda: F.linear(x, LoRATensor(w.detach(), a, b, S).requires_grad_()),
    ]
    assert_expected_inline(
        refusals(calls, NotImplementedError),
        """\
NotImplementedError: matmul: the MXTensor weight has requires_grad=True but cannot be trained; call .requires_grad_(False), or train it with QATConfig(step='prepare') before converting
NotImplementedError: linear: the MXTensor weight has requires_grad=True but cannot be trained; call .requires_grad_(False), or train it with QATConfig(step='prepare') before converting
NotImplementedError: addmm: the MXTensor weight has requires_grad=True but cannot be trained; call .requires_grad_(False), or train it with QATConfig(step='prepare') before converting
NotImplementedError: linear: the LoRATensor weight has requires_grad=True but cannot be trained; call .requires_grad_(False), or train it with QATConfig(step='prepare') before converting""",
    )
    with torch.no_grad():
        assert torch.equal(x @ w.t(), x @ w.detach().t())
        assert torch.addmm(w, b, a, alpha=S).shape == (N, K)
