"""Modules of experts: the known classes, the module that replaces them, and the pipeline that computes them.

``layouts`` lists the known classes, the weights that each holds and how it is called. ``module`` holds the
replacement on packed weights, with functions that pack, check and report. ``pipeline`` is the computation:
route, two grouped products with an activation between them, and combine.
"""

from torchao_mx.nn.experts.layouts import Layout, register_experts
from torchao_mx.nn.experts.module import MXExperts, is_experts, unclaimed_experts

__all__ = ["Layout", "MXExperts", "is_experts", "register_experts", "unclaimed_experts"]
