"""Modules of experts: which classes are known, what stands in for them, and the pipeline that computes them.

``layouts`` says which classes are known, where each holds its weights and how it is called. ``module`` is the
stand-in on packed weights, with what packs, checks and reports. ``pipeline`` is the computation: route, two
grouped products with an activation between them, and combine.
"""

from torchao_mx.nn.experts.layouts import Layout, register_experts
from torchao_mx.nn.experts.module import MXExperts, is_experts, unclaimed_experts

__all__ = ["Layout", "MXExperts", "is_experts", "register_experts", "unclaimed_experts"]
