"""Every op takes every layout of every operand, gives results of its own, and unassigned rows influence nothing."""

import pytest
import torch
from _operands import (
    ANY_STRATEGY,
    EIGHT_BITS,
    WAYS_OF_THE_GPU,
    cases,
    check_equal,
    check_owned,
    expanded,
    expanded_axes,
    layouts_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from torchao_mx import MXFP4, NVFP4
from torchao_mx.ops.core.register import implementations
from torchao_mx.ops.moe import combine, narrow
from torchao_mx.ops.packed_mm import op as mm

CPU = cases(torch.float32, ANY_STRATEGY, (("unpack8", 0),), formats=(MXFP4, NVFP4))
# Those that the CPU tests in Triton's interpreter: what is not the vendor's product, nor in 8 bits, nor PTX.
INTERPRETED = {
    name: case
    for name, case in cases(torch.float32, (("fused", 0),), formats=(MXFP4, NVFP4)).items()
    if name.split("-")[0] not in ("matmul", "grouped_mm", "mxfp4_product", "group_outer")
    and "block_scaled" not in name
}
on_gpu = pytest.mark.gpu


@pytest.fixture
def interpreter(monkeypatch):
    """CUDA's entries, with kernels in the place of the reference, on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process, not interpreted")
    for module in (mm, combine):
        monkeypatch.setattr(module, "rows_functions", lambda x: narrow)
    monkeypatch.setattr(mm, "choose_strategy", lambda *args, **kwargs: "fused")
    return "interpreter"


def check_layouts(case, name, drawn, device):
    """The case with its tensors laid out as ``drawn``, {argument: layout}, against itself with dense ones."""
    tensors = {arg: layout(case.args[case.tensors[arg]]) for arg, layout in drawn.items()}
    dense = {
        arg: t.resolve_neg().clone(memory_format=torch.contiguous_format)
        for arg, t in tensors.items()
    }
    before = {arg: t.clone() for arg, t in tensors.items()}
    expected = case.run(device, **dense)
    actual = case.run(device, **tensors)
    told = f"{name} with { ({arg: layout.__name__ for arg, layout in drawn.items()}) }"
    check_equal(actual, expected, told)
    rest = [case.args[i] for arg, i in case.tensors.items() if arg not in tensors]
    check_owned(actual, [*tensors.values(), *rest], told)
    for arg, t in tensors.items():
        check_equal([t], [before[arg]], f"{told}: {arg} was changed")


def expansions(case, name):
    def one(axis):
        def expand(t):
            return expanded(t, axis)

        expand.__name__ = f"expanded_{axis}"
        return expand

    return [one(axis) for axis in expanded_axes(case, name)]


def all_layouts(case, name):
    return [*layouts_of(case.args[case.tensors[name]]), *expansions(case, name)]


def drawn_layouts(case):
    """A layout, or none, for each argument."""
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(all_layouts(case, name)) for name in case.tensors}
    )


def test_every_op_has_a_case():
    ops = {op for op, _ in implementations}
    assert ops == {case.op for case in CPU.values()}


@pytest.mark.parametrize("name", [n for n in CPU if "unpack5000" not in n])
@pytest.mark.usefixtures("poisoned")
def test_each_argument_in_each_layout(name):
    case = CPU[name]
    for argument in case.tensors:
        for layout in all_layouts(case, argument):
            check_layouts(case, name, {argument: layout}, "cpu")


@settings(max_examples=80)
@given(name=st.sampled_from(sorted(CPU)), data=st.data())
def test_all_arguments_at_once(name, data):
    case = CPU[name]
    check_layouts(case, name, data.draw(drawn_layouts(case)), "cpu")


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.usefixtures("poisoned")
def test_kernels(name, interpreter):
    """A layout of each argument, all together; other ones in other cases."""
    case = INTERPRETED[name]
    layouts = {argument: all_layouts(case, argument) for argument in case.tensors}
    turn = list(INTERPRETED).index(name)
    drawn = {a: found[(turn + len(a)) % len(found)] for a, found in layouts.items() if found}
    check_layouts(case, name, drawn, interpreter)


def poisoned_rows(case, value):
    """The case's tensors with ``value`` in what belongs to no expert."""
    tensors = {}
    for name, index in case.unassigned.items():
        t = case.args[case.tensors[name]].clone()
        if t.itemsize == 1:
            t.view(torch.uint8)[index] = 0xFF if value != value else 0x7E
        else:
            t[index] = value
        tensors[name] = t
    return tensors


def check_unassigned(case, name, device, values=(torch.nan, 1e30, -torch.inf)):
    """Whatever unassigned rows hold, results are those of zeros there, bit for bit."""
    zeros = case.run(device, **poisoned_rows(case, 0.0))
    for value in values:
        results = case.run(device, **poisoned_rows(case, value))
        for i, (actual, expected) in enumerate(zip(results, zeros, strict=True)):
            assert torch.equal(actual, expected), f"{name}: {value} changes result {i}"
    for i, index in case.zero.items():
        assert not zeros[i].numel() or not zeros[i][index].any(), f"{name}: result {i} is not zero"


@pytest.mark.parametrize("name", [n for n, c in CPU.items() if c.unassigned])
@pytest.mark.usefixtures("poisoned")
def test_unassigned_rows(name):
    check_unassigned(CPU[name], name, "cpu")


@pytest.mark.parametrize("name", [n for n, c in INTERPRETED.items() if c.unassigned])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's
@pytest.mark.usefixtures("poisoned")
def test_unassigned_rows_of_kernels(name, interpreter):
    check_unassigned(INTERPRETED[name], name, interpreter, (torch.nan,))


def check_by_torch(case):
    utils = ["test_autograd_registration", "test_faketensor"]
    tensors = [case.args[i] for i in case.tensors.values()]
    if not any(t.is_floating_point() and t.itemsize == 1 for t in tensors):
        utils.append("test_schema")  # it multiplies arguments, and torch has no product of such
    opcheck(case.op, case.args, test_utils=utils)


@pytest.mark.parametrize("name", [n for n in CPU if "unpack" not in n])
def test_opcheck(name):
    """What the dispatcher and torch.compile are told of an op is true."""
    check_by_torch(CPU[name])


# --- on the GPU -----------------------------------------------------------------------------------

GPU = cases(torch.bfloat16, WAYS_OF_THE_GPU, EIGHT_BITS)


@on_gpu
@pytest.mark.parametrize("name", GPU)
@pytest.mark.usefixtures("poisoned")
def test_layouts_on_the_gpu(name):
    case = GPU[name].to("cuda")
    layouts = {argument: all_layouts(case, argument) for argument in case.tensors}
    check_layouts(case, name, {}, "cuda")
    for i in range(max(map(len, layouts.values()))):
        drawn = {a: found[i % len(found)] for a, found in layouts.items() if found}
        check_layouts(case, name, drawn, "cuda")


@on_gpu
@pytest.mark.parametrize("name", [n for n, c in GPU.items() if c.unassigned])
@pytest.mark.usefixtures("poisoned")
def test_unassigned_rows_on_the_gpu(name):
    check_unassigned(GPU[name].to("cuda"), name, "cuda")


@on_gpu
@pytest.mark.parametrize("name", GPU)
def test_opcheck_on_the_gpu(name):
    check_by_torch(GPU[name].to("cuda"))
