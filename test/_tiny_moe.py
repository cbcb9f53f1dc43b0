"""A small model of linear layers and experts, in the forms that quantize_ gives it."""

import torch
from _experts import EXPERTS, HIDDEN, TOP_K, Concatenated
from torch import nn
from torchao.quantization import quantize_

from torchao_mx import MXFP4, MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts, is_linear

CLASSES = 9  # no multiple of a number of ranks


class Block(nn.Module):
    def __init__(self, experts=Concatenated):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = experts()

    def forward(self, x):
        x = x + self.proj(self.norm(x))
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        return x + self.experts(x, ids, weights)


class TinyMoE(nn.Module):
    def __init__(self, blocks=2, experts=Concatenated):
        super().__init__()
        self.blocks = nn.ModuleList(Block(experts) for _ in range(blocks))
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def lora_model(fmt=MXFP4, seed=0, **options):
    """Frozen and packed with adapters, but for a head that has none and a router and norms in fp32."""
    torch.manual_seed(seed)
    model = TinyMoE(**options)
    for p in model.parameters():
        p.requires_grad_(False)
    layout = {"dtype": fmt.elem_dtype, "block_size": fmt.block_size}
    config = MXWeightOnlyLoRAConfig(r=4, lora_alpha=8, **layout)
    quantize_(model, MXWeightOnlyConfig(**layout), filter_fn=lambda m, n: n == "head")
    for wanted in (is_experts, lambda m, n: n.endswith("proj") and is_linear(m)):
        quantize_(model, config, filter_fn=wanted)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model


def batch(rows=24, seed=0):
    """(x, targets) of all ranks together."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HIDDEN, generator=g), torch.randint(CLASSES, (rows,), generator=g)
