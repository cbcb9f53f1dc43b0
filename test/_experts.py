"""Modules of experts as model libraries have them, small, and what to call them with."""

import pytest
import torch
import torch.nn.functional as F
from _grids import generator
from torch import nn

from torchao_mx import register_experts

EXPERTS, HIDDEN, INNER, TOP_K = 4, 64, 96, 2
NAMES = ("gate_up_proj", "down_proj")


def loop(hidden, ids, weights, up, gate, down):
    """An expert at a time; ``up`` and ``down`` of (x, e)."""
    out = torch.zeros_like(hidden)
    for e in range(EXPERTS):
        token, slot = torch.where(ids == e)
        y = down(gate(up(hidden[token], e)), e) * weights[token, slot, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out


def clamped_gate(gate_up, alpha, limit):
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class Concatenated(nn.Module):
    """As transformers v5 has most models' experts."""

    transposed = is_transposed = has_bias = False

    def __init__(self, hidden=HIDDEN, inner=INNER):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * inner, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, hidden, inner) / inner**0.5)
        self.act_fn = nn.SiLU()
        self.config = "the model's"

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return loop(
            hidden_states, top_k_index, top_k_weights, lambda x, e: F.linear(x, self.gate_up_proj[e]),
            self._apply_gate, lambda x, e: F.linear(x, self.down_proj[e]),
        )  # fmt: skip


class GptOss(nn.Module):
    """As transformers v5 has it: interleaved, transposed, with biases."""

    transposed = is_transposed = has_bias = True

    def __init__(self, hidden=HIDDEN, inner=INNER):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, hidden, 2 * inner) / hidden**0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, inner, hidden) / inner**0.5)
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, hidden))
        self.alpha, self.limit = 1.702, 0.7  # so low that it matters

    def _apply_gate(self, gate_up):
        return clamped_gate(gate_up, self.alpha, self.limit)

    def product(self, name, x, e):
        return x @ getattr(self, name)[e] + getattr(self, f"{name}_bias")[e]

    def forward(self, hidden_states, router_indices, routing_weights):
        return loop(
            hidden_states, router_indices, routing_weights, lambda x, e: self.product(NAMES[0], x, e),
            lambda x: clamped_gate(x, self.alpha, self.limit), lambda x, e: self.product(NAMES[1], x, e),
        )  # fmt: skip


class GptOssV4(GptOss):
    """As transformers 4.57 has it: no flags, no ``_apply_gate``, scores of all experts."""

    is_transposed = has_bias = property()  # hasattr is False
    _apply_gate = property()

    def forward(self, hidden_states, router_indices, routing_weights):
        hidden = hidden_states.flatten(0, 1)
        weights = routing_weights.gather(1, router_indices)
        return super().forward(hidden, router_indices, weights).view_as(hidden_states)


class Titan(nn.Module):
    transposed = False

    def __init__(self, hidden=HIDDEN, inner=INNER):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, inner, hidden) / hidden**0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, hidden, inner) / inner**0.5)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, inner, hidden) / hidden**0.5)

    def forward(self, x, num_tokens_per_expert):
        sizes = num_tokens_per_expert.int().tolist()
        *parts, rest = x.split([*sizes, len(x) - sum(sizes)])
        rows = [
            (F.silu(part @ self.w1[e].T) * (part @ self.w3[e].T)) @ self.w2[e].T
            for e, part in enumerate(parts)
        ]
        return torch.cat([*rows, torch.zeros_like(rest)])


register_experts(GptOssV4, "transformers_v4_gpt_oss")
register_experts(Titan, "torchtitan")
FAMILIES = [Concatenated, GptOss, GptOssV4, Titan]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)


def inputs(family, tokens, dtype=torch.float32, device="cpu", seed=0):
    """(all arguments, which of them want gradients)."""
    g = generator(seed)
    x = torch.randn(tokens, HIDDEN, generator=g).to(device, dtype).requires_grad_()
    if family is Titan:
        sizes = torch.tensor([3, 0, tokens - 4, 0]).clamp(min=0).to(device)  # a row of nobody
        return (x, sizes), [x]
    scores = torch.rand(tokens, EXPERTS, generator=g).to(device, dtype).requires_grad_()
    ids = scores.detach().topk(TOP_K).indices
    if family is GptOssV4:
        x = x.detach().view(1, tokens, HIDDEN).requires_grad_()
        return (x, ids, scores), [x, scores]
    weights = scores.detach().gather(1, ids).requires_grad_()
    return (x, ids, weights), [x, weights]
