"""The house has no circles: a room imports from rooms below it, and files in a room from one another one way."""

import ast
from pathlib import Path

import pytest

import torchao_mx

ROOT = Path(torchao_mx.__file__).parent
# From the ground up. A file belongs to the most specific room that its dotted name begins with.
ROOMS = [
    "formats",
    "errors",
    "torch_internals",
    "reference",
    "ops.core",
    "ops.quantization",
    "ops.moe",
    "ops.packed_mm",
    "ops.block_scaled",
    "ops",  # the verbs
    "tensor",
    "nn.modules",
    "nn.raw_reads",
    "nn.registry",
    "nn.experts",
    "nn.linear_checks",
    "nn.check_model",
    "nn.ptq",
    "nn.qat",
    "nn.lora",
    "nn.recipes",
    "nn",
    "distributed",
    "",  # torchao_mx itself: the public names
    "hf",
    "demo",
]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}


def room_of(name):
    return max((r for r in ROOMS if not r or name == r or name.startswith(f"{r}.")), key=len)


def imports_of(tree, files):
    """The files of the package that ``tree`` imports, inside functions too; not what is for annotations alone."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("torchao_mx.") in files else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    ours = {name for name in found if name == "torchao_mx" or name.startswith("torchao_mx.")}
    return {name.removeprefix("torchao_mx").removeprefix(".") for name in ours}


def graph(files=FILES):
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    return {name: imports_of(tree, files) - {name} for name, tree in trees.items()}


def circles(arrows):
    """The files that can be reached from themselves."""
    found = []
    for start in arrows:
        seen, todo = set(), list(arrows[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(arrows.get(name, ()))
        if start in seen:
            found.append(start)
    return found


def against_the_order(arrows):
    height = {room: i for i, room in enumerate(ROOMS)}
    return [
        f"{name} imports {other}"
        for name, others in arrows.items()
        for other in others
        if height[room_of(other)] > height[room_of(name)]
    ]


def test_no_arrow_runs_up():
    assert against_the_order(graph()) == []


def test_no_circle():
    assert circles(graph()) == []


def test_every_room_tells_its_story():
    for name, path in FILES.items():
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc, f"{name or 'torchao_mx'} has no docstring"


@pytest.mark.parametrize(
    ("line", "arrow"),
    [
        ("from torchao_mx.nn.qat.config import MXFakeQuantizeConfig", "nn.qat.config"),
        ("from torchao_mx.nn import ptq", "nn.ptq"),
        ("import torchao_mx.hf.load", "hf.load"),
        ("def f():\n    from torchao_mx.tensor import MXTensor", "tensor"),
    ],
)
def test_the_test_sees(line, arrow):
    """A new import of ``ops.core.launch`` that runs up, wherever it stands."""
    arrows = graph() | {"ops.core.launch": imports_of(ast.parse(line), FILES)}
    assert against_the_order(arrows) == [f"ops.core.launch imports {arrow}"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
