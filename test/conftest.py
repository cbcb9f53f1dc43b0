"""Where the tests run: kernels on the GPU, or in Triton's interpreter where there is none."""

import dataclasses
import functools
import os
import types

import hypothesis
import pytest
import torch


def _quicken_interpreter():
    """Spare the interpreter of Triton 3.7, CI's, what has no effect, most of the time of our kernels:

    - at every call of a device function it goes over ``triton.language`` to patch what is not patched yet,
      which, but for a launch's first call into ``tl.core``, is nothing: a launch patches both here;
    - it computes whether integers overflow and, without its option ``debug``, drops the answer;
    - it builds its table of dtypes anew at every look-up;
    - for every tensor it wraps each size of its shape, twice, and gives the type a name: once a shape here.
    """
    import triton
    from triton import language as tl
    from triton._utils import validate_block_shape
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.7."):  # its internals are no API
        return

    def call(self, *args, **kwargs):
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    patch_lang = interpreter._patch_lang
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch_lang(both)
    interpreter.InterpretedFunction.__call__ = call

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    np_dtype, found = interpreter._get_np_dtype, {}

    def np_dtype_found(tt_dtype):
        if tt_dtype.name not in found:  # not of all kinds is there a hash
            found[tt_dtype.name] = np_dtype(tt_dtype)
        return found[tt_dtype.name]

    interpreter._get_np_dtype = np_dtype_found

    @functools.cache
    def sizes(shape):
        """As a type and as a tensor has them, and their product."""
        wrapped = tl.core.tuple([tl.constexpr(s) for s in shape])
        return tl.core.tuple(shape), wrapped, validate_block_shape(shape)

    def block_type(self, element_ty, shape):
        shape = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if not shape:
            raise TypeError("0d block_type is forbidden")
        self.element_ty = element_ty
        self.shape, self.tensor_shape, self.numel = sizes(shape)

    no_sizes = tl.core.tuple([]), tl.constexpr(1)

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.is_block():
            self.shape, self.numel = type.tensor_shape, tl.constexpr(type.numel)
        else:
            self.shape, self.numel = no_sizes

    tl.core.block_type.__init__ = block_type
    tl.core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.core.tensor.__init__ = tensor

    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_unequal(lhs, rhs):
        left, right = lhs.type, rhs.type
        same = left.is_block() and right.is_block() and left.shape is right.shape
        return (lhs, rhs) if same else broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_unequal

    def patch_attr(obj, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)  # without a check that _semantic is there

        def with_semantic(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, with_semantic)

    interpreter._patch_attr = patch_attr


if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so before torchao_mx (and torchao) are imported.
    os.environ["TRITON_INTERPRET"] = "1"
    _quicken_interpreter()

# A product's rounding may depend on how threads share it, and tests compare two ways to compute one bit for bit.
torch.set_num_threads(1)

# Reproducible, and without a folder of examples in the working tree.
hypothesis.settings.register_profile("torchao_mx", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("torchao_mx")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_addoption(parser):
    group = parser.getgroup("fuzz", "the fuzzers, test_fuzz_*.py")
    group.addoption("--fuzz", type=int, metavar="N", help="cases of each, instead of the few of CI")
    group.addoption(
        "--fuzz-seed", type=int, default=0, metavar="SEED", help="of the cases; default 0"
    )
    group.addoption("--fuzz-case", metavar="CASE", help="one case again, as a report prints it")
    group.addoption("--fuzz-all", action="store_true", help="report every case of a kind, not one")
    parser.addoption(
        "--kills", type=int, default=2, metavar="N",
        help="how often test_kill.py kills each of its saves; many: at every file operation",
    )  # fmt: skip


def pytest_collection_modifyitems(items):
    # Tests on several ranks come first: one of xdist's workers gets them all, and only it starts ranks.
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "run_ranks"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """Where the ops run: the reference on the CPU, Triton on CUDA."""
    return request.param


@pytest.fixture(params=["interpreter", CUDA])
def kernel_device(request):
    """Where a Triton launcher's tensors live: the CPU where kernels are interpreted, else CUDA."""
    if request.param == "cuda":
        return "cuda"
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process, not interpreted")
    return "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Fill what new_empty, empty and their like return, so that elements never written are seen."""

    def poisoning(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.device.type != "meta" and type(out) is torch.Tensor:
                storage = out.untyped_storage()
                torch.tensor([], dtype=torch.uint8, device=out.device).set_(storage).fill_(0xAB)
            return out

        return wrapper

    for owner, name in (
        (torch.Tensor, "new_empty"),
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    assert (torch.zeros(1).new_empty(3).view(torch.uint8) == 0xAB).all()


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")
