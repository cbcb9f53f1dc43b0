"""benchmarks/models/cost_model.py: what it counts, against tensors, torch's counter and transformers; and its page."""

import json
import pathlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from _experts import EXPERTS, HIDDEN, INNER, GptOss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import quantize_

from benchmarks.models import cost_model as cost
from torchao_mx import MXWeightOnlyLoRAConfig, is_experts

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def test_bytes_of_experts_are_those_of_the_tensors():
    module = torch.nn.ModuleDict({"experts": GptOss().bfloat16()})
    quantize_(module, MXWeightOnlyLoRAConfig(r=cost.RANK), filter_fn=is_experts)
    model = cost.Model(1, (3,) * EXPERTS, hidden=HIDDEN, inner=INNER)
    frozen = trained = 0
    for p in module.parameters():
        if p.requires_grad:
            trained += p.nbytes
        elif hasattr(p, "qdata"):
            frozen += p.qdata.nbytes + p.scale.nbytes
        else:
            frozen += p.nbytes
    assert (model.packed_bytes, model.expert_adapter_bytes) == (frozen, trained)


@pytest.mark.parametrize("strategy", ["auto", "unpack"])
@pytest.mark.parametrize("sizes", [(3, 0, 5), (2000, 1500, 1700)])  # fused, and unpacked anyway
def test_flops_of_a_product_are_those_of_its_matmuls(sizes, strategy):
    n, k = 96, 64
    with FlopCounterMode(display=False) as forward, torch.device("meta"):
        ys = []
        for rows in sizes:
            x, a, b = (torch.empty(s, requires_grad=True)
                       for s in ((rows, k), (cost.RANK, k), (n, cost.RANK)))  # fmt: skip
            ys.append(x @ torch.empty(k, n) + x @ a.t() @ b.t())
    with FlopCounterMode(display=False) as backward:
        torch.cat(ys).sum().backward()
    passes = cost.Product("", sizes, n, k, tokens=sum(sizes)).passes(strategy)
    assert sum(kernel.flops for kernel in passes.forward) == forward.get_total_flops()
    assert sum(kernel.flops for kernel in passes.backward) == backward.get_total_flops()


def test_a_fused_product_by_hand():
    product = cost.Product("", (17, 0, 40, 3), n=128, k=64, tokens=30)
    _, kernel = product.fused(forward=True)  # 15 rows an expert: tiles of 32 rows
    assert kernel.decoded == (1 + 0 + 2 + 1) * 128 * 64
    assert kernel.tile_flops == 4 * 32 * 2 * 128 * 64
    assert kernel.nbytes == 3 * 128 * (64 // 2 + 64 // 32) + 60 * (128 + 64) * 2
    assert kernel.flops == 60 * 2 * 128 * (64 + 16)
    c = cost.Constants(1000, 500, fused=0.5, decode_ps=2.0, launch_us=7.0)
    ms = kernel.decoded * 2e-9 + kernel.tile_flops / 500e9 / 0.5 + 0.007
    assert kernel.ms(c) == pytest.approx(ms)
    few = cost.Kernel("", "fused", nbytes=3e9, decoded=1)  # bound by 1,000 GB/s
    assert few.ms(c) == pytest.approx(3.007)


def test_a_model_by_hand():
    measured = json.loads((BENCHMARKS / "results/gpt_oss-h200.json").read_text())["rows"][0]
    model = cost.gpt_oss("20b")
    optimizer = model.step()[-1]
    assert optimizer.nbytes == cost.OPTIMIZER * measured["adapter_elements"]
    root = 2 * model.vocabulary * model.hidden * 2
    weights = model.layers * (model.packed_bytes + model.expert_adapter_bytes + model.dense_bytes)
    assert weights + root == pytest.approx(measured["weights_gb"] * 1e9, rel=2e-3)
    assert sum(model.sizes) == 4 * 4096 and len(model.sizes) == 32
    head = model.head().forward[0]
    assert head.flops == 2 * 4096 * 201_088 * 2880


class Moved(TorchDispatchMode):
    """Bytes that operations other than GEMMs read and write; a view and an allocation move none."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        free = ("view", "empty", "detach")
        if not func.is_view and not any(word in str(func) for word in free):
            tensors = [
                t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)
            ]
            self.nbytes += sum(t.nbytes for t in tensors)
        return result


def moved(fn, *inputs):
    """Forward and backward, ``inputs`` on meta."""
    with Moved() as forward:
        out = fn(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    with Moved() as backward:
        torch.autograd.backward(out, [torch.empty_like(t) for t in out])
    return forward.nbytes, backward.nbytes


@pytest.fixture
def gpt_oss():
    module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    if not hasattr(module, "use_experts_implementation"):
        pytest.skip("counted on transformers 5")
    return module


def test_bytes_of_a_layer_beside_its_experts(gpt_oss):
    config = gpt_oss.GptOssConfig()  # 120b's
    with torch.device("meta"):
        layer = gpt_oss.GptOssDecoderLayer(config, 0).bfloat16()
    frozen = sum(p.nbytes for name, p in layer.named_parameters() if "experts" not in name)
    linears = [layer.self_attn.get_submodule(f"{x}_proj").weight.shape for x in "qkvo"]
    adapters = sum(cost.RANK * sum(shape) * 2 for shape in linears)
    model = cost.Model(1, (1,) * config.num_local_experts)
    assert model.dense_bytes == frozen + adapters


def test_bytes_of_torchs_operations_are_those_it_dispatches(gpt_oss):
    s, heads, kv_heads, dim = 4096, 64, 8, 64

    def empty(*shape):
        return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)

    norm = gpt_oss.GptOssRMSNorm(2880).to("meta", torch.bfloat16).requires_grad_(False)
    found = [n / (s * 2880) for n in moved(norm, empty(1, s, 2880))]
    assert found == pytest.approx(cost.NORM, rel=0.02)
    q, k, v = empty(1, heads, s, dim), empty(1, kv_heads, s, dim), empty(1, kv_heads, s, dim)
    angle = torch.empty(1, s, dim // 2, device="meta", dtype=torch.bfloat16)
    rotate = gpt_oss.apply_rotary_pos_emb
    found = [
        n / (s * (heads + kv_heads) * dim)
        for n in moved(lambda q, k: rotate(q, k, angle, angle), q, k)
    ]
    assert found == pytest.approx(cost.ROPE, rel=0.02)
    module = SimpleNamespace(
        num_key_value_groups=heads // kv_heads, sinks=empty(heads).detach(), training=True
    )
    mask = torch.empty(1, 1, s, s, device="meta", dtype=torch.bfloat16)

    def attention(q, k, v):
        return gpt_oss.eager_attention_forward(module, q, k, v, mask, scaling=0.125)[0]

    found = [n / (heads * s * s * 2) for n in moved(attention, q, k, v)]
    # The slice's backward first fills with zeros, unseen.
    assert [found[0], found[1] + 1] == pytest.approx(cost.EAGER_PASSES, rel=0.02)


def test_the_page_and_how_well_it_predicts(monkeypatch, tmp_path, capsys):
    for file in (BENCHMARKS / "results").glob("*-h200.json"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(cost.results, "RESULTS", tmp_path)
    cost.main()
    page = capsys.readouterr().out
    assert "| 120b | MoE: gate_up |" in page and "## On many GPUs" in page
    saved = json.loads((tmp_path / "cost_model.json").read_text())
    close, count = cost.share_close(saved["rows"])
    assert f"{close} of {count} predicted" in page
    assert count >= 40 and close / count >= 0.85
    assert sum(row["use"] == "fitted" for row in saved["rows"]) < count / 2
    constants = saved["meta"]["constants"]
    for share in ("fused", "gemm", "copy", "torch", "attention"):
        assert 0 < constants[share] <= 1, share
    for row in saved["scaling"]:
        assert row["ms"] >= row["compute_ms"] + row["exchange_ms"]
        assert (row["gpus"] > 1) == (row["gather_gb"] > 0)
        assert (row["exchange_gb"] > 0) == (row["plan"] == "FSDP2 + EP")
