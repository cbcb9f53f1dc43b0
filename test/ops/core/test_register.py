"""What ``define_op`` gives every op: a backward op without a derivative says so, by the name of its verb."""

import pytest
import torch

from torchao_mx import ops


def combined(x):
    order, offs = ops.route(torch.tensor([[0, 1], [1, 0], [1, 1]]), 2)
    return ops.combine(x.repeat_interleave(2, 0), torch.rand(3, 2), order, offs=offs)


VERBS = {"swiglu": ops.swiglu, "combine": combined}


@pytest.mark.parametrize("verb", VERBS)
def test_second_derivatives_are_refused(verb):
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(VERBS[verb](x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{verb} has no second derivative: .* instead"):
        dx.sum().backward()
