"""Find layers whose owner reads the weight itself instead of calling the layer.

``self.proj.weight @ x`` in an owner's forward, or ``kernel(x, self.proj.weight)``, uses the high-precision
weight of a layer in training and bypasses adapters. transformers' Mamba and similar models do so. Only the
owner's source shows it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn

from torchao_mx.torch_internals import children_of

# Attributes that describe a weight without reading its values.
_DESCRIPTIONS = {
    "data_ptr", "device", "dim", "dtype", "element_size", "is_cpu", "is_cuda", "is_meta", "itemsize",
    "layout", "ndim", "numel", "requires_grad", "shape", "size", "stride",
}  # fmt: skip
_MAKES_WEIGHTS = ("init", "reset_parameters", "tie_", "repr")  # in a method's name


def raw_reads(model: nn.Module) -> dict[str, str]:
    """Return, by name, each layer of ``model`` whose weight another module's code reads, and the reader.

    Example:
        >>> import torch
        >>> from torchao_mx.nn.raw_reads import raw_reads
        >>> raw_reads(torch.nn.Sequential(torch.nn.Linear(32, 32)))  # only the layer reads its weight
        {}
    """
    found = {}
    for name, owner in model.named_modules():
        for child, method in _reads_of(type(owner)).items():
            if isinstance(children_of(owner).get(child), nn.Module):
                found[f"{name}.{child}" if name else child] = f"{type(owner).__name__}.{method}"
    return found


@functools.lru_cache(maxsize=1024)
def _reads_of(cls: type[nn.Module]) -> dict[str, str]:
    """Return, by name, each submodule whose ``weight`` a class reads, and the method that reads it."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if base.__module__.startswith("torch."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # the class was made at run time
            continue
        for method in ast.walk(tree):
            if not isinstance(method, ast.FunctionDef):
                continue
            if any(part in method.name for part in _MAKES_WEIGHTS):
                continue
            for child in _reads_in(method):
                found.setdefault(child, method.name)
    return found


def _reads_in(method: ast.FunctionDef) -> list[str]:
    """Return ``proj`` for each ``self.proj.weight`` whose values the method uses."""
    nodes = list(ast.walk(method))
    described: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in _DESCRIPTIONS:
            described.add(id(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in (
            "isinstance",
            "type",
        ):
            described |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            described |= {id(operand) for operand in (node.left, *node.comparators)}
    return [
        node.value.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in described
        and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name) and node.value.value.id == "self"
    ]  # fmt: skip
