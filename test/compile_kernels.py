"""Compiles every kernel for every GPU that the library supports, on a machine without one.

    python test/compile_kernels.py             # every variant, some 8,000
    python test/compile_kernels.py --spread    # some of each kernel, as CI does
    python test/compile_kernels.py --arch 90 --kernel _fused

1. *Record.* Each op is called as on a GPU (``_operands.py`` has a case of every op), in several sizes, dtypes and
   layouts, once per architecture. Under :class:`PretendedGPU` the tensors are meta tensors, and the library finds
   a GPU of that capability, so it chooses that GPU's strategies and tiles. Triton binds and specialises the
   arguments of each launch; where it would compile, the variant is noted instead.
2. *Compile* each distinct variant to a cubin with the ptxas that Triton brings.
3. *Report* what does not compile, what needs more shared memory or registers than the GPU has, and the kernels
   that nothing launched. Each of these makes the exit status 1.

A kernel decorated under ``TRITON_INTERPRET``, which ``conftest.py`` sets, cannot be compiled: pytest starts this as a
process of its own (``test_compile_kernels.py``).
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import importlib
import io
import multiprocessing
import pkgutil
import re
import resource
import sys
import tempfile
import time
import traceback
import types
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import _operands
import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import torchao_mx.ops
from torchao_mx.ops.core.launch import launched, launches
from torchao_mx.ops.core.register import implementations


class GPU(NamedTuple):
    """What the launchers ask of a GPU, and what it has for a program."""

    arch: int
    multiprocessors: int
    shared: int  # KiB that a program can have

    @property
    def target(self):
        return GPUTarget("cuda", self.arch, 32)


GPUS = [
    GPU(80, 108, 163),  # A100
    GPU(86, 82, 99),  # GeForce RTX 3090
    GPU(89, 128, 99),  # GeForce RTX 4090
    GPU(90, 132, 227),  # H100
    GPU(100, 148, 227),  # B200
    GPU(120, 170, 99),  # GeForce RTX 5090
]
REGISTERS = 2**16  # of a multiprocessor
MINOR = int(triton.__version__.split(".")[1])
TENSOR_MEMORY = 512  # columns, of a multiprocessor of sm_100


class Variant(NamedTuple):
    """What Triton compiles: a kernel and its specialised arguments, for a GPU."""

    gpu: GPU
    kernel: JITFunction
    signature: dict
    constants: dict  # by path, (place of the parameter, places in tuples ...)
    attributes: dict  # likewise
    options: dict
    launched_by: str

    def describe(self):
        names = self.kernel.arg_names
        constants = {names[path[0]]: value for path, value in self.constants.items()}
        types = {name: kind for name, kind in self.signature.items() if kind != "constexpr"}
        aligned = [names[path[0]] for path, value in self.attributes.items() if value]
        options = {k: self.options.get(k) for k in ("num_warps", "num_stages", "maxnreg")}
        return (
            f"{name_of(self.kernel)} on sm_{self.gpu.arch}, of {self.launched_by}\n"
            f"  types: {types}\n  multiples of 16: {aligned}\n"
            f"  constants: {constants}\n  options: {options}"
        )


class Result(NamedTuple):
    """What is wrong with a compiled variant, and what it needs."""

    error: str = ""
    shared: int = 0  # bytes
    registers: int = 0  # of a thread
    spilled: int = 0  # bytes of a thread
    seconds: float = 0.0  # of a processor, ptxas included


def name_of(kernel):
    return f"{kernel.fn.__module__.removeprefix('torchao_mx.ops.')}.{kernel.fn.__name__}"


def entry_kernels(package):
    """The kernels under ``launched`` in all modules of a package."""
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    modules = [package, *map(importlib.import_module, names)]
    return {v.kernel for m in modules for v in vars(m).values() if isinstance(v, launched)}


# --- recording ------------------------------------------------------------------------------------


class PretendedGPU(TorchFunctionMode):
    """Makes every tensor a meta tensor that says it is on a GPU, and notes launches as variants."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu
        # By its index the library remembers what it has asked a device.
        self.device = torch.device("cuda", GPUS.index(gpu))
        self.variants = {}
        self.launched_by = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.data_ptr:  # allocations are aligned
            return args[0].storage_offset() * args[0].itemsize
        if func == torch.Tensor.device.__get__:
            return self.device
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func is torch.Tensor.__float__:  # the error of a product that is compared with another
            return 0.0
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = func.default
        implementation = implementations.get((func, "cuda"))
        if implementation is not None:
            with self:
                return implementation(*args, **kwargs)
        kwargs.pop("generator", None)
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*("meta" if isinstance(a, torch.device) else a for a in args), **kwargs)

    @contextlib.contextmanager
    def in_place(self):
        """What torch, Triton and the library know of the GPU is what is told here."""
        properties = types.SimpleNamespace(multi_processor_count=self.gpu.multiprocessors)
        driver = types.SimpleNamespace(
            get_current_device=lambda: self.device.index,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: self.gpu.target,
        )
        replay_nothing = types.SimpleNamespace(append=lambda launch: None)
        with (
            mock.patch.multiple(
                torch.cuda,
                current_device=lambda: self.device.index,
                get_device_capability=lambda device: divmod(self.gpu.arch, 10),
                get_device_properties=lambda device: properties,
                is_current_stream_capturing=lambda: False,
            ),
            mock.patch.object(triton.runtime.driver, "_active", driver),
            mock.patch.object(JITFunction, "_do_compile", functools.partialmethod(_note, self)),
            mock.patch.object(launches, "recording", replay_nothing),
            warnings.catch_warnings(),
            torch.device("meta"),
            self,
        ):
            # torch's grouped product of block-scaled operands knows no meta tensors.
            warnings.filterwarnings("ignore", ".* is emulated in high precision")
            yield


def _note(kernel, gpu, key, signature, device, constants, options, attributes, warmup):
    """In the place of the method by which Triton compiles a kernel for new arguments."""
    variant = Variant(
        gpu.gpu, kernel, signature, constants, attributes, options.__dict__, gpu.launched_by
    )
    gpu.variants.setdefault((kernel, key), variant)


def record(gpu, tables):
    """The variants that the calls of ``tables`` launch on a GPU, and how many calls were refused there."""
    pretended, refused = PretendedGPU(gpu), 0
    with pretended.in_place():
        for table in tables:
            for name, call in table():
                pretended.launched_by = name
                try:
                    call()
                except (RuntimeError, TypeError, ValueError) as error:
                    if not _is_refusal(error):
                        raise RuntimeError(f"{name} on sm_{gpu.arch}") from error
                    refused += 1
    return list(pretended.variants.values()), refused


def _is_refusal(error):
    """Whether the library raised it, or torch's grouped product, which takes bfloat16 alone."""
    *_, last = traceback.extract_tb(error.__traceback__)
    ours = Path(torchao_mx.__file__).parent in Path(last.filename).parents
    return ours or str(error).startswith("Expected inputs of BF16 type")


# --- calls ----------------------------------------------------------------------------------------


def cases(label, dtype=torch.bfloat16, **sizes):
    """Calls of every op, in the sizes of ``_operands.py`` or in these."""
    if sizes:
        rows = sizes["T"] * sizes["TOP_K"]
        ends = [*[0] * (sizes["E"] - 1), rows - 1]
        sizes |= {"R": rows, "ENDS": ends, "ORDER": list(range(rows))}
    ways, eight_bits = (("auto", 0), *_operands.WAYS_OF_THE_GPU), _operands.EIGHT_BITS
    if sizes:  # a small scratch would take thousands of slices
        ways, eight_bits = ([w for w in found if w[1] == 0] for found in (ways, eight_bits))
    if dtype != torch.bfloat16:
        eight_bits = ()
    with mock.patch.dict(vars(_operands), sizes):
        found = _operands.cases(dtype, ways, eight_bits)
    return {f"{name} ({label})": case for name, case in found.items()}


def dense(label, **options):
    """A table: a function to calls by name, since their tensors are made on the pretended GPU."""

    def table():
        for name, case in cases(label, **options).items():
            yield name, functools.partial(case.run, "interpreter")

    return table


def strided():
    """The small cases with their arguments in two mixtures of layouts."""
    for name, case in cases("strided").items():
        layouts = {a: _operands.layouts_of(case.args[i]) for a, i in case.tensors.items()}
        for turn in range(2):
            drawn = {a: found[(turn + len(a)) % len(found)] for a, found in layouts.items()}
            tensors = {a: drawn[a](case.args[i]) for a, i in case.tensors.items()}
            yield name, functools.partial(case.run, "interpreter", **tensors)


# Average rows per expert on both sides of every limit in the tables of tiles.
GPT_OSS = dict(E=32, N=2880, K=2880, TOP_K=4)
QWEN3 = dict(E=128, N=768, K=2048, TOP_K=8)
TOKENS = {
    1: 16,
    6: 8,
    16: 32,
    32: 64,
    80: 128,
    128: 256,
    256: 16,
    512: 32,
    1024: 4,
    4096: 64,
    16384: 16,
}
SMALL = dense("small")
SIZED = [
    *(dense(f"gpt-oss, {t} tokens", T=t, RANK=rank, **GPT_OSS) for t, rank in TOKENS.items()),
    *(dense(f"Qwen3-MoE, {t} tokens", T=t, RANK=32, **QWEN3) for t in (1, 64, 512, 4096)),
]
OTHERS = [
    *(dense(f"small, {dtype}", dtype=dtype) for dtype in (torch.float16, torch.float32)),
    *(
        dense(f"gpt-oss, {t} tokens, {dtype}", dtype=dtype, T=t, RANK=16, **GPT_OSS)
        for t in (16, 512)
        for dtype in (torch.float16, torch.float32)
    ),
    strided,
]


def all_tables(gpu):
    return [SMALL, *SIZED, *OTHERS]


def some_tables(gpu):
    """The small one and a sized one, which no other GPU has, nor Triton's next minor release."""
    return [SMALL, SIZED[2 * GPUS.index(gpu) + MINOR % 2]]


def spread(variants):
    """Of each kernel one, and one more of every 40, from all GPUs; Triton's next minor release takes others."""
    by_kernel = collections.defaultdict(list)
    for variant in variants:
        by_kernel[variant.kernel].append(variant)
    chosen = []
    for turn, found in enumerate(by_kernel.values()):
        n = 1 + len(found) // 40
        start = (turn * 0.618 + MINOR / 2) % 1  # of the golden ratio, which fills the circle evenly
        chosen += [found[int((i + start) * len(found) / n)] for i in range(n)]
    return chosen


# --- compiling ------------------------------------------------------------------------------------


def _seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compile_variant(variant):
    start, log = _seconds(), io.StringIO()
    kernel, gpu = variant.kernel, variant.gpu
    try:
        source = kernel.ASTSource(kernel, variant.signature, variant.constants, variant.attributes)
        with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope():
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=gpu.target, options=variant.options).metadata
    except Exception as error:
        return Result(
            "".join(traceback.format_exception_only(error)).strip(), seconds=_seconds() - start
        )
    [registers] = map(int, re.findall(r"Used (\d+) registers", log.getvalue()))
    [spilled] = map(int, re.findall(r"(\d+) bytes spill stores", log.getvalue()))
    all_registers = registers * 32 * compiled.num_warps
    needs = [
        ("bytes of shared memory", compiled.shared, gpu.shared * 1024),
        ("registers", all_registers, REGISTERS),
        ("columns of tensor memory", compiled.tmem_size or 0, TENSOR_MEMORY),
    ]
    error = ", ".join(f"needs {n} {what} of {has}" for what, n, has in needs if n > has)
    return Result(error, compiled.shared, registers, spilled, _seconds() - start)


_variants = []  # which forked processes compile


def _compile_nth(n):
    return compile_variant(_variants[n])


def _tell(variant, result, done):
    """What of a long run should not wait for its end."""
    if result.error:
        print(f"FAILED: {variant.describe()}\n  {result.error}", flush=True)
    elif done % 200 == 0:
        print(f"{done} compiled", flush=True)


def compile_all(variants, jobs):
    """A result for each variant, in parallel; one that ends its process costs that variant alone."""
    _variants[:] = variants
    fork = multiprocessing.get_context("fork")
    results = [None] * len(variants)

    def run(numbers, workers):
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=fork) as pool:
            futures = {pool.submit(_compile_nth, n): n for n in numbers}
            for future in concurrent.futures.as_completed(futures):
                n = futures[future]
                with contextlib.suppress(concurrent.futures.process.BrokenProcessPool):
                    results[n] = future.result()
                    _tell(variants[n], results[n], len(results) - results.count(None))

    run(range(len(variants)), jobs)
    for n, variant in enumerate(variants):
        if results[n] is None:
            run([n], 1)
        if results[n] is None:
            results[n] = Result("the compiler ended its process")
            _tell(variant, results[n], 0)
    return results


# --- reporting ------------------------------------------------------------------------------------


def largest(results, field):
    """``value (kernel)`` of the variant that needs most."""
    variant, result = max(results, key=lambda found: getattr(found[1], field))
    value = getattr(result, field)
    return f"{value} ({name_of(variant.kernel)})" if value else "0"


def check(package, tables, gpus, choose=lambda variants: variants, jobs=2):
    """Record, compile and print; whether all went well.

    Args:
        package: whose kernels have to be launched.
        tables: of a GPU, functions to pairs of a name and a call.
        choose: which variants are compiled, of all.
    """
    start = time.monotonic()
    recorded = {gpu: record(gpu, tables(gpu)) for gpu in gpus}
    variants = [variant for found, _ in recorded.values() for variant in found]
    chosen = choose(variants)
    print(
        f"Triton {triton.__version__}: {len(variants)} variants recorded in {_seconds():.0f} s of a processor, "
        f"{len(chosen)} to compile",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        results = list(zip(chosen, compile_all(chosen, jobs), strict=True))
    failed = [variant for variant, result in results if result.error]
    for gpu, (found, refused) in recorded.items():
        of_gpu = [(variant, result) for variant, result in results if variant.gpu == gpu]
        if not of_gpu:
            continue
        print(
            f"sm_{gpu.arch}: {len(of_gpu)} of {len(found)} variants compiled ({refused} calls refused), "
            f"{sum(variant.gpu == gpu for variant in failed)} failed, "
            f"{sum(result.seconds for _, result in of_gpu):.0f} s of a processor; at most: shared memory "
            f"{largest(of_gpu, 'shared')} of {gpu.shared * 1024}, registers {largest(of_gpu, 'registers')}, "
            f"spilled {largest(of_gpu, 'spilled')}, {sum(result.spilled > 0 for _, result in of_gpu)} with spills"
        )
    missing = entry_kernels(package) - {variant.kernel for variant in variants}
    for name in sorted(map(name_of, missing)):
        print(f"MISSING: nothing launched {name}: add a case to _operands.py")
    print(f"{len(failed)} of {len(results)} failed, in {time.monotonic() - start:.0f} s")
    return not failed and not missing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spread", action="store_true", help="some variants of each kernel")
    archs = [gpu.arch for gpu in GPUS]
    parser.add_argument("--arch", type=int, nargs="+", choices=archs, default=archs)
    parser.add_argument("--kernel", default="", help="a part of its name")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    gpus = [gpu for gpu in GPUS if gpu.arch in options.arch]

    def choose(variants):
        found = [variant for variant in variants if options.kernel in name_of(variant.kernel)]
        return spread(found) if options.spread else found

    tables = some_tables if options.spread else all_tables
    return 0 if check(torchao_mx.ops, tables, gpus, choose, options.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
