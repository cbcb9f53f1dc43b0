"""Training on several ranks: experts split over ranks, weights gathered packed."""

from torchao_mx.distributed.clip_grad import clip_grad_norm_
from torchao_mx.distributed.expert_parallel import ExpertParallel, gather_experts
from torchao_mx.distributed.packed_gather import gather_packed

__all__ = ["ExpertParallel", "clip_grad_norm_", "gather_experts", "gather_packed"]
