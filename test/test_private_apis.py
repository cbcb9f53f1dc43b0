"""What torchao_mx uses of other libraries beyond their documented API: where, and whether it is still there.

The first tests need no torchao_mx that can be imported, so that they name what a new release took away. CI runs
them with the newest torchao too.
"""

import ast
import functools
import importlib
import inspect
import pickle
import re
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1] / "torchao_mx"
LIBRARIES = ("torch", "triton", "torchao", "transformers", "peft", "accelerate", "safetensors")
TORCH, LAUNCH = "torch_internals.py", "ops/core/launch.py"
REGISTRY, TRANSFORMERS = "nn/registry.py", "hf/transformers_internals.py"


class Use(NamedTuple):
    """A private name, the one file that has it, where the library keeps it, and what it is used for."""

    name: str
    file: str
    owner: str
    purpose: str


# An owner that ends in "()" is an object, which the tests below make.
USES = [
    Use("_after_autograd_keyset", TORCH, "torch._C", "an autograd kernel of our own"),
    Use("_are_functorch_transforms_active", TORCH, "torch._C", "an autograd kernel of our own"),
    Use("_current_level", TORCH, "torch.autograd.forward_ad", "an autograd kernel of our own"),
    Use("_AutoDispatchBelowADInplaceOrView", TORCH, "torch._C", "results that are no views"),
    Use("_schema", TORCH, "torch.ops.aten.add.Tensor", "the arguments of a collective; what an operator writes to"),
    Use("_python_dispatch", TORCH, "torch.utils", "recorded launches; views of a packed weight"),
    Use("_pytree", TORCH, "torch.utils", "arguments in lists"),
    Use("_make_wrapper_subclass", TORCH, "torch.Tensor", "tensors without memory of their own"),
    Use("_set_throw_on_mutable_data_ptr", TORCH, "torch._C", "errors instead of address 0"),
    Use("_disabled_torch_function_impl", TORCH, "torch._C", "MasterTensor"),
    Use("_base", TORCH, "torch.Tensor", "FSDP2's padded shards"),
    Use("_cdata", TORCH, "torch.UntypedStorage", "torch.compile, which tells storages by it"),
    Use("_weak_ref", TORCH, "torch.UntypedStorage", "torch.compile, which tells storages by it"),
    Use("_rebuild_wrapper_subclass", TORCH, "torch._utils", "saved MXTensors"),
    Use("_rebuild_from_type_v2", TORCH, "torch._tensor", "saved MXTensors"),
    Use("_grouped_mm", TORCH, "torch", "calls that users, and transformers, make with an MXTensor"),
    Use("_scaled_mm", TORCH, "torch", "products in 8 bits"),
    Use("_scaled_grouped_mm", TORCH, "torch", "products in 8 bits of experts"),
    Use("_parameters", TORCH, "torch.nn.Module()", "a module's own parameters, None among them"),
    Use("_modules", TORCH, "torch.nn.Module()", "a module's own children"),
    Use("_compiled_call_impl", TORCH, "torch.nn.Module", "module.compile(), which stays with its object"),
    Use("_hooks", TORCH, "torch.nn.Module()", "handles of hooks, which stay with their object"),
    Use("_is_fsdp_managed_module", TORCH, "fully_shard()", "a refusal of what FSDP2 shards"),
    Use("_quantization_type", "tensor/mx_tensor.py",
        "torchao.prototype.mx_formats.mx_tensor.MXTensor", "a weight's repr in its module"),
    Use("_QUANTIZE_CONFIG_HANDLER", REGISTRY, "torchao.quantization.transform_module",
        "handing QATConfig on to torchao, and converting with torchao's configs"),
    Use("knobs", LAUNCH, "triton", "profilers, which hear of recorded launches"),
    Use("packed_metadata", LAUNCH, "CompiledKernel()", "recorded launches"),
    Use("_hf_hook", "nn/modules.py", "accelerate.hooks", "modules that Accelerate offloads"),
    Use("_apply_gate", "nn/experts/layouts.py", "transformers 5's experts", "the gate of experts"),
    Use("_default_apply_gate", "nn/experts/layouts.py", "transformers 5's experts", "the gate of experts"),
    Use("_hf_peft_config_loaded", TRANSFORMERS, "transformers.PreTrainedModel",
        "stock save_pretrained of models with PEFT's adapters"),
    Use("_tied_weights_keys", TRANSFORMERS, "transformers.PreTrainedModel", "names that no file has"),
    Use("_pre_quantization_dtype", TRANSFORMERS, "transformers 4's configs", "loading in v4"),
    Use("_weight_conversions", TRANSFORMERS, "transformers 5's models", "stock save_pretrained in v5"),
    Use("_is_hf_initialized", TRANSFORMERS, "transformers 5's modules", "no second filling in v5"),
]  # fmt: skip

# Methods that a library calls and a class of ours defines: by name, the libraries' class.
OVERRIDES = {
    "_apply": "torch.distributed.tensor.parallel.ParallelStyle",
    "_load_from_state_dict": "torch.nn.Module",
    "_typed_storage": "torch.Tensor",
    "_convert_model_for_quantization": "transformers.quantizers.base.HfQuantizer",
    "_process_model_after_weight_loading": "transformers.quantizers.base.HfQuantizer",
    "_process_model_before_weight_loading": "transformers.quantizers.base.HfQuantizer",
}

# Undocumented, though no underscore tells.
NO_UNDERSCORE = {"knobs", "packed_metadata"}
PRIVATE_MODULES = ("torch.fx.", "triton.runtime", "triton.compiler", "triton.backends")
# Of named tuples; suffixes of tensors' names in gpt-oss's files.
OWN = {"_asdict", "_fields", "_replace", "_blocks", "_scales", "_ActionsContainer"}


def is_private(name):
    dunder = name.startswith("__") and name.endswith("__")
    return name in NO_UNDERSCORE or (name.startswith("_") and name.strip("_") and not dunder)


@functools.cache
def own_names():
    """What the package defines: functions, classes, variables, attributes of self."""
    found = set(OWN)
    for node in (node for tree in trees().values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.update([node.attr] if ast.unparse(node.value) in ("self", "cls") else [])
    return found - {use.name for use in USES} - OVERRIDES.keys()


def private_names(tree):
    """The private names of others in a file: (name, line); imported, read as attributes, or given as strings."""
    own = own_names()
    parts_of_strings = {
        part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                parts = [part for part in full.split(".") if is_private(part)]
                if not parts and f"{full}.".startswith(PRIVATE_MODULES):
                    parts = [full]
                yield from ((part, node.lineno) for part in parts)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    parts = [part for part in alias.name.split(".") if is_private(part)]
                    yield from ((part, node.lineno) for part in parts)
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
            is_name = name.isidentifier() and node not in parts_of_strings
            if is_name and is_private(name) and name not in own:
                yield name, node.lineno


@functools.cache
def trees():
    """Of each file of the package; read, and not changed."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for path in sorted(ROOT.rglob("*.py"))
    }


def misplaced(files):
    """The private names that are in no table, or in another file than theirs."""
    table = {use.name: use.file for use in USES}
    modules = {"_C", "_utils", "_tensor"}  # of torch, that hold names of the table
    for file, tree in files.items():
        for name, line in private_names(tree):
            if name in OVERRIDES or (name in modules and file == TORCH):
                continue
            if name == "_quantization_type" and file != REGISTRY:  # MXTensor's, by then
                continue
            if table.get(name) != file:
                where = f"is for {table[name]} alone" if name in table else "is in no table"
                yield f"{file}:{line}: {name} {where}"


def test_private_names_stand_in_one_file_each():
    found = "\n".join(misplaced(trees()))
    assert not found, f"use the public way, or see test/test_private_apis.py:\n{found}"


def test_the_tables_are_no_longer_than_what_is_used():
    used = {name for tree in trees().values() for name, _ in private_names(tree)}
    defined = {
        n.name for t in trees().values() for n in ast.walk(t) if isinstance(n, ast.FunctionDef)
    }
    names = {use.name for use in USES} | OVERRIDES.keys()
    assert sorted(names - used - defined) == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch._prims_common import make_contiguous_strides_for",
        "from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER",
        "import torch._dynamo",
        "from triton.runtime import driver",
        "x = module._parameters",
        "x = getattr(module, '_is_fsdp_managed_module', False)",
        "x = compiled.packed_metadata",
        "def f():\n    return torch._C._len_torch_dispatch_stack()",
    ],
)
def test_the_test_sees(line):
    assert list(misplaced({"nn/ptq.py": ast.parse(line)}))


# --- whether they are there -----------------------------------------------------------------------


def version_of(library):
    return f"{library} {importlib.import_module(library).__version__}"


def find(path):
    """The object at a dotted path, which may end in attributes; raises AttributeError or ImportError."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):
                raise
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ImportError(path)


def lacks(use):
    library = use.owner.split(".")[0]
    return (
        f"{version_of(library)} has no {use.owner.removesuffix('()')}.{use.name}; used in torchao_mx/{use.file} "
        f"for {use.purpose}"
    )


STATIC = [use for use in USES if use.owner.replace(".", "").replace("_", "").isidentifier()]


@pytest.mark.parametrize("use", STATIC, ids=[use.name for use in STATIC])
def test_it_is_there(use):
    library = use.owner.split(".")[0]
    pytest.importorskip(library, exc_type=ImportError)
    if use.name == "_hf_hook":
        assert use.name in inspect.getsource(find("accelerate.hooks.add_hook_to_module")), lacks(
            use
        )
        return
    try:
        found = hasattr(find(use.owner), use.name) or find(f"{use.owner}.{use.name}") is not None
    except (AttributeError, ImportError):
        found = False
    assert found, lacks(use)


@pytest.mark.parametrize("library", ["torch", "triton", "torchao", "transformers", "peft"])
def test_what_is_imported_is_there(library):
    """Documented or not: all that torchao_mx imports, so that one run tells of everything that is gone."""
    pytest.importorskip(library, exc_type=ImportError)
    major = "5" if library != "transformers" else version_of(library).split()[1].split(".")[0]
    gone = []
    for file, tree in trees().items():
        if file.startswith("hf/hooks_v") and file != f"hf/hooks_v{major}.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library:
                for alias in node.names:
                    if alias.name == "CustomDtype":  # v4's, with Accelerate
                        continue
                    try:
                        find(f"{node.module}.{alias.name}")
                    except (AttributeError, ImportError):
                        gone.append(f"{node.module}.{alias.name}; imported in torchao_mx/{file}")
    assert not gone, f"{version_of(library)} has no " + ", no ".join(gone)


@pytest.mark.parametrize(("name", "owner"), OVERRIDES.items())
def test_a_method_that_is_overridden_is_there(name, owner):
    library = owner.split(".")[0]
    pytest.importorskip(library, exc_type=ImportError)
    assert hasattr(find(owner), name), (
        f"{version_of(library)} has no {owner}.{name}, which a class of torchao_mx overrides: it is never called"
    )


def use_of(name):
    return next(use for use in USES if use.name == name)


@pytest.mark.parametrize("name", ["_parameters", "_modules"])
def test_modules_have_dicts(name):
    assert isinstance(getattr(nn.Module(), name, None), dict), lacks(use_of(name))


def test_modules_have_dicts_of_hooks():
    module = nn.Linear(2, 2)
    handle = module.register_forward_hook(print)
    held = [k for k, v in vars(module).items() if isinstance(v, dict) and handle.id in v]
    assert held and all("_hooks" in name for name in held), lacks(use_of("_hooks"))


@pytest.fixture(scope="module")
def sharded():
    """A layer inside a module that FSDP2 shards on one rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(32, 32))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    yield model
    dist.destroy_process_group()


def test_fsdp2_flags_what_it_shards(sharded):
    use = use_of("_is_fsdp_managed_module")._replace(owner="torch.nn.Module() under fully_shard")
    assert all(getattr(m, use.name, False) for m in sharded.modules()), lacks(use)


def test_torchaos_handlers_are_what_its_decorator_fills():
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import transform_module

    table = getattr(transform_module, "_QUANTIZE_CONFIG_HANDLER", None)
    assert isinstance(table, dict), lacks(use_of("_QUANTIZE_CONFIG_HANDLER"))
    config = type("Config", (torchao.core.config.AOBaseConfig,), {})
    transform_module.register_quantize_module_handler(config)(print)
    assert table.pop(config) is print, lacks(use_of("_QUANTIZE_CONFIG_HANDLER"))


def test_triton_runs_compiled_kernels_as_we_do():
    triton = pytest.importorskip("triton")
    from triton.compiler import CompiledKernel

    launcher = re.sub(r"\s", "", inspect.getsource(CompiledKernel.__getitem__))
    call = (
        "self.run(grid[0],grid[1],grid[2],stream,self.function,self.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*args)"
    )
    assert call in launcher and "defrunner(*args,stream=None)" in launcher, (
        f"triton {triton.__version__} launches compiled kernels otherwise; used in torchao_mx/{LAUNCH} for "
        f"launches with less Python, and recorded ones"
    )
    hooks = triton.knobs.runtime
    assert hooks.launch_enter_hook.calls == [] == hooks.launch_exit_hook.calls, (
        f"triton {triton.__version__} has no lists of hooks; used in torchao_mx/{LAUNCH} for profilers"
    )


@pytest.mark.parametrize(
    ("name", "major", "module"),
    [
        ("_weight_conversions", 5, "core_model_loading"),
        ("_is_hf_initialized", 5, "modeling_utils"),
        ("_pre_quantization_dtype", 4, "modeling_utils"),
        ("_apply_gate", 5, "integrations.moe"),
        ("_default_apply_gate", 5, "integrations.moe"),
    ],
)
def test_transformers_has_it(name, major, module):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) != major:
        pytest.skip(f"of transformers {major}")
    use = use_of(name)._replace(owner=f"transformers.{module}")
    source = inspect.getsource(importlib.import_module(use.owner))
    assert re.search(rf"\b{name}\b", source), lacks(use)


# --- and what is done without them ----------------------------------------------------------------


@pytest.fixture
def internals():
    return importlib.import_module("torchao_mx.torch_internals")


@pytest.mark.parametrize("is_view", [False, True])
def test_ops_without_the_dispatchers_keys(is_view, internals, monkeypatch):
    from torchao_mx.ops.core.register import define_op

    monkeypatch.setattr(internals, "HAS_AUTOGRAD_KERNELS", False)
    monkeypatch.setattr(internals, "BELOW_AUTOGRAD", None)

    def double(x):
        assert x.is_contiguous() and not torch.is_grad_enabled()
        out = x * 2
        return out.view(-1).view(x.shape) if is_view else out

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    op = define_op(
        f"private_{is_view}".lower(), "(Tensor x) -> Tensor", cpu=double, cuda=double, fake=torch.empty_like,
        setup_context=save, backward=lambda ctx, dy: (dy * 2 + 0 * ctx.saved_tensors[0],),
    )  # fmt: skip
    x = torch.randn(3, 4).t().requires_grad_()
    y = op(x)
    assert torch.equal(y, x * 2) and y.grad_fn is not None
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    plain = op(x.detach())
    assert plain._base is None
    plain.add_(1)


def test_calls_are_not_recorded_without_dispatch_modes(monkeypatch):
    from torchao_mx.ops.core import replay

    monkeypatch.setattr(replay, "TorchDispatchMode", None)
    calls = []
    call = replay.replayed(lambda x: calls.append(x) or x + 1)
    for n in range(4):
        assert torch.equal(call(torch.arange(n)), torch.arange(n) + 1)
    assert len(calls) == 4
    call.forget()


class Pair(NamedTuple):
    a: int
    b: list


def test_trees_of_our_own(internals):
    tree = (1, [2, {"a": 3, "b": (4,)}], Pair(5, [6]), None)
    assert list(internals._tree_iter(tree)) == list(internals.tree_iter(tree))

    def add(x):
        return x if x is None else x + 1

    mapped = internals._tree_map(add, tree)
    assert mapped == internals.tree_map(add, tree) and type(mapped[2]) is Pair
    leaves = internals._tree_iter(tree, is_leaf=lambda x: isinstance(x, Pair))
    assert Pair(5, [6]) in list(leaves)


def test_no_torch_function_of_our_own(internals):
    class Plain(torch.Tensor):
        __torch_function__ = staticmethod(internals._plain_torch_function)

    x = torch.ones(2).as_subclass(Plain)
    assert type(x + 1) is torch.Tensor and torch.equal(x + 1, torch.full((2,), 2.0))


def test_saved_weights_without_torchs_rebuilding(internals, monkeypatch, tmp_path):
    from torchao_mx import MXFP4, MXTensor

    monkeypatch.setattr(internals, "rebuild", internals._rebuild)
    monkeypatch.setattr(internals, "rebuild_wrapper", internals._rebuild_wrapper)
    w = MXTensor.from_hp(torch.randn(4, 64), MXFP4).t()
    torch.save({"w": w}, tmp_path / "w.pt")
    loaded = [torch.load(tmp_path / "w.pt", weights_only=True)["w"], pickle.loads(pickle.dumps(w))]
    for again in loaded:
        assert str(again) == str(w) and torch.equal(again.dequantize(), w.dequantize())


def rowwise(device, experts=None):
    def e4m3(*shape):
        return torch.randn(*shape, device=device).to(torch.float8_e4m3fn)

    scales = torch.rand(64, device=device), torch.rand(experts or 1, 48, device=device)
    weight = e4m3(experts, 48, 32).mT if experts else e4m3(48, 32).t()
    return e4m3(64, 32), weight, *scales


@pytest.mark.parametrize("use_fast_accum", [False, True])
def test_products_in_8_bits_by_the_public_op(use_fast_accum, internals, monkeypatch, device):
    x, w, x_scale, w_scale = rowwise(device)
    args, options = (x, w, x_scale[:, None], w_scale), {"use_fast_accum": use_fast_accum}
    y = internals.scaled_mm(*args, **options)
    monkeypatch.setattr(internals, "_scaled_mm", None)
    assert torch.equal(internals.scaled_mm(*args, **options), y)


@pytest.mark.gpu
def test_grouped_products_in_8_bits_by_the_public_op(internals, monkeypatch):
    args = (*rowwise("cuda", 2), torch.tensor([16, 64], device="cuda", dtype=torch.int32))
    y = internals.scaled_grouped_mm(*args, use_fast_accum=True)
    monkeypatch.setattr(internals, "_scaled_grouped_mm", None)
    assert torch.equal(internals.scaled_grouped_mm(*args, use_fast_accum=True), y)


def test_grouped_products_in_8_bits_call_the_public_op(internals, monkeypatch):
    signature = inspect.signature(F.scaled_grouped_mm)
    monkeypatch.setattr(internals, "_scaled_grouped_mm", None)
    monkeypatch.setattr(F, "scaled_grouped_mm", lambda *a, **k: signature.bind(*a, **k).arguments)
    args = (*rowwise("cpu", 2), torch.tensor([16, 64], dtype=torch.int32))
    given = internals.scaled_grouped_mm(*args, use_fast_accum=True)
    assert given["offs"] is args[-1] and given["scale_b"] is args[3] and given["use_fast_accum"]


def test_modules_without_dicts(internals):
    layer = nn.Sequential(nn.Linear(2, 3))
    public = types.SimpleNamespace(
        named_parameters=layer[0].named_parameters, named_children=layer.named_children
    )
    assert internals.parameters_of(public) == dict(layer[0].named_parameters())
    assert internals.children_of(public) == {"0": layer[0]}


def test_fsdp2_without_its_flag(sharded, internals):
    assert internals.is_under_fsdp(sharded[0])
    for module in sharded.modules():
        del module._is_fsdp_managed_module
    assert internals.is_under_fsdp(sharded)
    assert not internals.is_under_fsdp(nn.Linear(2, 2))


def test_operators_that_write(internals):
    aten = torch.ops.aten
    writing = [aten.add_.Tensor, aten.copy_.default, aten.add.out, aten._foreach_add_.List]
    reading = [aten.add.Tensor, aten.max.dim, aten.__and__.Tensor, aten.new_zeros.default]
    unusual = [aten.max.dim_max, aten.gelu_backward.grad_input]  # only the schema tells
    assert all(map(internals.is_mutable, writing + unusual))
    assert not any(map(internals.is_mutable, reading))
    named = [types.SimpleNamespace(name=op.name) for op in writing + reading]
    assert [internals.is_mutable.__wrapped__(op) for op in named] == [True] * 4 + [False] * 4


def test_what_has_no_public_way_says_so(internals, monkeypatch):
    text = (
        rf"torch {re.escape(torch.__version__)} has no _x, which does y: .* {internals.SUPPORTED}"
    )
    use = internals._required(torch, "_x", "does y")
    with pytest.raises(NotImplementedError, match=text):
        use()
    assert internals.operators("aten::_no_such_operator") == []
    monkeypatch.setattr(internals, "Tensor", object)
    with pytest.raises(NotImplementedError, match=r"has no Tensor\._base"):
        internals.view_base(torch.ones(2))
    with pytest.raises(NotImplementedError, match=r"has no OpOverload\._schema"):
        internals.argument_names(object())


def test_torchao_without_its_table(monkeypatch):
    import torchao
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.qat import QATConfig

    from torchao_mx import MXTensor, MXWeightOnlyConfig
    from torchao_mx.nn import registry

    monkeypatch.setattr(registry, "_TORCHAOS", None)
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, dtype=torch.bfloat16), torch.randn(2, 64, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    model[0].load_state_dict(layer.state_dict())
    quantize_(model, Int8WeightOnlyConfig(version=2))
    config = Int8WeightOnlyConfig(version=2)
    ours = registry.handler_of(type(config))(layer, config)
    assert type(ours.weight) is type(model[0].weight) and torch.equal(ours(x), model(x))
    config = MXWeightOnlyConfig()
    layer = registry.handler_of(type(config))(nn.Linear(64, 32), config)
    assert isinstance(layer.weight, MXTensor)
    text = f"torchao {re.escape(torchao.__version__)} has no .* {re.escape(registry.SUPPORTED)}"
    with pytest.raises(NotImplementedError, match=text):
        registry.torchaos_handler(QATConfig)(layer, config)


def test_triton_of_another_release(monkeypatch):
    from torchao_mx.ops.core import launch

    class Kernel:
        """What ``launched`` takes for a compiled one of Triton's."""

        params, calls = (), []

        @staticmethod
        def fn(x_ptr, n):
            pass

        def __getitem__(self, grid):
            return lambda *arguments, **constants: self.calls.append((grid, arguments))

    recorded = []
    monkeypatch.setattr(launch, "LAUNCHES_COMPILED", False)
    monkeypatch.setattr(launch, "capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch.launches, "recording", recorded)
    kernel, x = launch.launched(Kernel()), torch.zeros(4)
    for _ in range(2):
        kernel[(3,)](x, 4)
    assert [grid for grid, _ in Kernel.calls] == [(3,), (3,)]
    assert recorded == [None, None] and not kernel.compiled


def test_transformers_without_its_names(monkeypatch):
    pytest.importorskip("transformers")
    from torchao_mx.hf import transformers_internals as internals

    model = types.SimpleNamespace(config=types.SimpleNamespace(), dtype=torch.bfloat16)
    assert not internals.holds_adapters_of_peft(model)
    assert internals.declared_dtype(model) == torch.bfloat16
    internals.drop_conversions(model, lambda operation: True)
    assert not hasattr(model, "_weight_conversions")
    model.peft_config = {"default": None}
    assert internals.holds_adapters_of_peft(model)
    tied = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert internals.tied_keys(tied) == {"head.weight"}


# --- the bounds -----------------------------------------------------------------------------------


def bounds():
    text = (ROOT.parent / "setup.py").read_text()
    return dict(
        re.findall(r'"(torch|torchao|triton|transformers|peft)((?:[<>=!][^";]*)+)[";]', text)
    )


def test_the_messages_name_the_bounds_of_setup(internals):
    from torchao_mx.nn import registry
    from torchao_mx.ops.core import launch

    declared = bounds()
    for text, library in ((internals.SUPPORTED, "torch"), (registry.SUPPORTED, "torchao")):
        low, high = re.findall(r"(\d+)\.(\d+)", text)
        expected = f">={low[0]}.{low[1]},<{high[0]}.{int(high[1]) + 1}"
        assert declared[library] == expected
    low, high = launch.SUPPORTED[0], launch.SUPPORTED[-1].split(".")
    assert declared["triton"] == f">={low},<{high[0]}.{int(high[1]) + 1}"
