"""Kernel launches, and the questions that every launcher asks about the device and its operands' layout."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from torchao_mx.formats import MXFP8_E4M3, BlockFormat


# Triton's own versions also serve kernels, and cost the host some microseconds per call.
def cdiv(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache
def capability(index: int) -> tuple[int, int]:
    """Return a GPU's compute capability; refuse GPUs older than Ampere, and AMD's."""
    if torch.version.hip is not None:  # inline PTX kills the process in Triton's AMD back end
        raise NotImplementedError(
            f"cuda:{index} is a GPU of a ROCm build of torch ({torch.version.hip}); the Triton kernels need an "
            f"NVIDIA GPU of compute capability 8.0 (Ampere) or newer: move the tensors to the CPU, which has a "
            f"reference path"
        )
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise NotImplementedError(
            f"cuda:{index} has compute capability {major}.{minor}; the Triton kernels "
            f"need 8.0 (Ampere) or newer: move the tensors to the CPU, which has a reference path"
        )
    return major, minor


@torch.compiler.assume_constant_result
def has_fp8_instructions(device: torch.device) -> bool:
    """Whether the device has instructions that convert to and from fp8 (Ada, Hopper and newer).

    False on the CPU, where the kernels run in Triton's interpreter.
    """
    return device.type == "cuda" and capability(device.index) >= (8, 9)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run at once, at least; 1 on the CPU, in Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# Triton's undocumented parts (``compiled[grid]``, its ``run``, knobs) are used in this file only. The argument
# passing of these releases is known; others get Triton's own ``kernel[grid]``, and no recordings.
SUPPORTED = ("3.6", "3.7")
LAUNCHES_COMPILED = ".".join(triton.__version__.split(".")[:2]) in SUPPORTED

Launch = tuple[Any, tuple[int, ...], list[Any]]  # compiled kernel, grid, all arguments


class _Launches(threading.local):
    """This thread's recorder of ``launched`` kernels, if any. It takes None for an unrepeatable launch."""

    recording: Any = None  # anything with append(Launch | None)


launches = _Launches()


class launched:
    """``triton.jit`` with less Python per launch: ``kernel[grid](*arguments, **constants_and_options)``.

    Triton binds and specialises the arguments at every launch. Here the arguments are reduced to the key that
    Triton specialises on, which finds its compiled kernel. Constexpr parameters come last and are given by
    name, all others by position. An argument may be a tuple of tensors, numbers and None, or of numbers and
    tuples of numbers; Triton specialises the parts of a tuple in spite of ``do_not_specialize``.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Any, Any] = {}
        # Triton's interpreter exposes only the function.
        parameters = list(inspect.signature(kernel.fn).parameters.values())
        are_constants = ["constexpr" in str(p.annotation) for p in parameters]
        self.n_arguments = are_constants.index(True) if True in are_constants else len(parameters)
        if not all(are_constants[self.n_arguments :]):
            raise TypeError(f"{kernel}: its constexpr parameters must come last")
        self.constants = [p.name for p in parameters[self.n_arguments :]]
        self.is_interpreted = not hasattr(kernel, "params")
        functools.update_wrapper(self, kernel, updated=())

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if len(arguments) != self.n_arguments:
            raise TypeError(
                f"{self.__name__} takes {self.n_arguments} arguments by position and got "
                f"{len(arguments)}; give constexpr parameters and options by name"
            )
        recording = launches.recording
        if self.is_interpreted:
            self.kernel[grid](*arguments, **constants)
            if recording is not None:
                recording.append(None)
            return
        # A kernel's tuples are always as long: one list of their parts tells launches apart, and is quicker than a
        # tuple each.
        parts: list[Any] = []
        for argument in arguments:
            if isinstance(argument, tuple):
                parts.extend(argument)
            else:
                parts.append(argument)
        key = (
            torch.cuda.current_device(),
            *constants,
            *constants.values(),
            *[_specialisation(part) for part in parts],
        )
        compiled = self.compiled.get(key)
        values = [constants[name] for name in self.constants]
        if compiled is None:
            capability(torch.cuda.current_device())  # refuse the GPU before Triton sees the kernel
            compiled = self.kernel[grid](*arguments, **constants)
            if LAUNCHES_COMPILED:
                self.compiled[key] = compiled
        else:
            compiled[(*grid, 1, 1)](*arguments, *values)
        if recording is not None:
            recorded = (compiled, grid, [*arguments, *values])
            recording.append(recorded if LAUNCHES_COMPILED else None)


def runner(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return ``launch(*arguments, stream)`` of a compiled kernel: ``compiled[grid]`` without hook records.

    Triton builds that record at each launch for any profiler that listens. Without a profiler, the record is
    a third of the launch's cost on the host.
    """
    size = (*grid, 1, 1)[:3]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    recorded, hooks = compiled[size], triton.knobs.runtime

    def launch(*arguments: Any, stream: int) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            recorded(*arguments, stream=stream)
        else:
            run(*size, stream, function, metadata, None, None, None, *arguments)

    return launch


def _specialisation(argument: Any) -> Any:
    """Return the part of an argument that makes Triton compile a kernel anew."""
    kind = type(argument)
    if kind is int:
        fits = -0x80000000 <= argument <= 0x7FFFFFFF
        return (argument & 15 == 0) + 2 * (argument == 1) + 4 * fits
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    if isinstance(argument, tuple):
        return tuple([_specialisation(a) for a in argument])
    return kind


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Launch on ``x``'s device, which need not be the current one."""
    if x.device.type != "cuda":
        return contextlib.nullcontext()
    capability(x.device.index)
    if x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    """View a one-byte dtype as uint8, which every kernel accepts."""
    return t if t.dtype == torch.uint8 else t.view(torch.uint8)


def in_words(t: torch.Tensor, size: int) -> torch.Tensor:
    """Return the bytes of ``t``, copied unless each row can be read as words of ``size`` bytes."""
    t = bytes_of(t)
    places = (t.data_ptr(), t.storage_offset(), *t.stride()[:-1])
    if t.stride(-1) == 1 and all(place % size == 0 for place in places):
        return t
    return t.clone(memory_format=torch.contiguous_format)


class KernelFormat(NamedTuple):
    """A format in the form that kernels take: the constexpr ``FORMAT``.

    In a kernel a field is a plain value. Where a constexpr is needed (a string or a format as an argument, in
    Triton 3.6; ``tl.static_range``) it is given a name as one first: ``SCALE: tl.constexpr = FORMAT.scale``.

    ``scale`` is the format of the block scales' elements, or None for E8M0.
    """

    exponent_bits: int
    mantissa_bits: int
    max_exponent: int
    elem_max: float
    block_size: int
    has_fp8_instructions: bool
    scale: KernelFormat | None = None

    @property
    def elem_bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def nan_scale(self) -> int:
        """The scale byte of a NaN block."""
        return 0xFF if self.scale is None else 0x7F


def kernel_format(fmt: BlockFormat, has_fp8_instructions: bool) -> KernelFormat:
    """Describe ``fmt`` for a device with or without instructions that convert to and from fp8."""
    elements = KernelFormat(
        fmt.exponent_bits,
        fmt.mantissa_bits,
        fmt.max_exponent,
        fmt.elem_max,
        fmt.block_size,
        has_fp8_instructions,
    )
    if fmt.scale_dtype == torch.float8_e8m0fnu:
        return elements
    return elements._replace(scale=kernel_format(MXFP8_E4M3, has_fp8_instructions))


def format_on(device: torch.device, fmt: BlockFormat) -> KernelFormat:
    """Describe ``fmt`` for kernels on ``device``."""
    return kernel_format(fmt, has_fp8_instructions(device))


def batched_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x [..., M, K]`` as ``[B, M, K]``; copies only if no strides can express the leading axes."""
    if x.dim() == 1:
        x = x.unsqueeze(0)
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)


def quantized_axis_is_contiguous(x_BMK: torch.Tensor) -> bool:
    """Whether blocks along the last axis lie in neighbouring addresses (otherwise: along the middle axis)."""
    return x_BMK.stride(2) == 1 or x_BMK.stride(1) != 1


class RowLayout(NamedTuple):
    """An operand ``x [B, M, K]`` whose blocks, along K, are contiguous runs in evenly spaced rows."""

    x: torch.Tensor
    n_blocks: int
    blocks_per_row: int
    blocks_per_batch: int
    contiguous: bool


def row_layout(x_BMK: torch.Tensor, block_size: int) -> RowLayout:
    """Describe an operand's rows, copying the operand unless its rows are evenly spaced runs."""
    batch, m, k = x_BMK.shape
    stride_b, stride_m, stride_k = x_BMK.stride()
    if stride_k != 1 or (batch > 1 and stride_b != m * stride_m):
        x_BMK = x_BMK.contiguous()
    per_row = k // block_size
    contiguous = x_BMK.is_contiguous()
    return RowLayout(x_BMK, batch * m * per_row, per_row, m * per_row, contiguous)


def holds_bf16_pairs(x_BMK: torch.Tensor) -> bool:
    """Whether a kernel can read ``x`` as int32 words of two bf16 values (the interpreter cannot)."""
    return (
        x_BMK.is_cuda
        and x_BMK.dtype == torch.bfloat16
        and x_BMK.storage_offset() % 2 == 0
        and x_BMK.data_ptr() % 4 == 0
        and all(stride % 2 == 0 for stride in x_BMK.stride()[:2])
    )


def per_tensor_kind(per_tensor_scale: torch.Tensor | None) -> str:
    """Name the kind of per-tensor scale for kernels: ``"none"``, one per ``"tensor"`` or per ``"expert"``."""
    if per_tensor_scale is None:
        return "none"
    return "expert" if per_tensor_scale.dim() else "tensor"


def rounds_products(fmt: BlockFormat) -> bool:
    """Whether a value times its multiplier is rounded, so that an fma must not skip the rounding."""
    return fmt.scale_dtype != torch.float8_e8m0fnu
