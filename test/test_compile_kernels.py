"""Kernels compile for every GPU that the library supports; ``compile_kernels.py`` does it, in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent

WRONG_KERNELS = """
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    from torchao_mx.ops.core.launch import launched


    @launched
    @triton.jit
    def right(x_ptr, TILE: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, TILE), 0.0)


    @launched
    @triton.jit
    def three_wide(x_ptr, TILE: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, TILE), 0.0)


    @launched
    @gluon.jit
    def wide(x_ptr, TILE: gl.constexpr):
        rows: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        memory = gl.allocate_shared_memory(gl.float32, [TILE], shared)
        memory.store(gl.zeros([TILE], gl.float32, rows))
        gl.store(x_ptr + gl.arange(0, TILE, rows), memory.load(rows))


    @launched
    @triton.jit
    def no_ptx(x_ptr, TILE: tl.constexpr):
        i = tl.arange(0, TILE)
        one = tl.inline_asm_elementwise("no.such.op $0, $1;", "=r,r", [i], tl.int32, True, 1)
        tl.store(x_ptr + i, one.to(tl.float32))


    @launched
    @triton.jit
    def without_launch(x_ptr):
        tl.store(x_ptr, 0.0)
"""

CHECK_WRONG_KERNELS = """
    import functools

    import compile_kernels
    import torch
    import wrong_kernels as wrong


    def table():
        for kernel, tile in (
            (wrong.right, 32), (wrong.three_wide, 3), (wrong.wide, 32768), (wrong.no_ptx, 32)
        ):
            yield kernel.__name__, functools.partial(kernel[(1,)], torch.empty(tile), TILE=tile)


    gpus = [gpu for gpu in compile_kernels.GPUS if gpu.arch in (86, 90)]
    assert not compile_kernels.check(wrong, lambda gpu: [table], gpus)
"""


def run(*command, path=()):
    """A Python process that compiles, with this one's library and Triton."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    places = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=900,
        env=inherited | {"PYTHONPATH": os.pathsep.join(places)},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_kernels_compile():
    status, told = run(HERE / "compile_kernels.py", "--spread")
    print(told)
    assert status == 0, told


def test_what_is_wrong_is_reported(tmp_path):
    package = tmp_path / "wrong_kernels"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(WRONG_KERNELS))
    status, told = run("-c", textwrap.dedent(CHECK_WRONG_KERNELS), path=(tmp_path, HERE))
    assert status == 0, told
    failed = {line for line in told.splitlines() if line.startswith(("FAILED", "MISSING"))}
    assert failed == {
        *(f"FAILED: wrong_kernels.{name} on sm_{arch}, of {name}"
          for name in ("three_wide", "no_ptx") for arch in (86, 90)),
        "FAILED: wrong_kernels.wide on sm_86, of wide",
        "MISSING: nothing launched wrong_kernels.without_launch: add a case to _operands.py",
    }  # fmt: skip
    assert "needs 131072 bytes of shared memory of 101376" in told
