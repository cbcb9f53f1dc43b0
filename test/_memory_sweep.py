"""Every method of torch.Tensor and every overridable torch function, called on tensors without memory of their own.

A call is made where the same call on a plain tensor of the same values succeeds; its arguments are tried from a
list. So what torch adds later is covered without being named here. Calls run in another process, as some may end
it: such a call is reported, and a new process does the rest.
"""

import faulthandler
import inspect
import multiprocessing as mp
import os
import warnings

import numpy as np
import torch
from _ranks import PRELOADED
from torch.overrides import get_overridable_functions

from torchao_mx import MXFP4, MXTensor, QuantizeSpec
from torchao_mx.tensor import LoRATensor
from torchao_mx.tensor.master_tensor import MasterTensor

N, SECONDS = 32, 120
_W = torch.randn(N, N, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(N)
VALUES = MXTensor.from_hp(_W, MXFP4).dequantize()
KINDS = {
    "mx": lambda: MXTensor.from_hp(VALUES, MXFP4),
    "lora": lambda: LoRATensor(KINDS["mx"](), torch.zeros(4, N), torch.zeros(N, 4), 1.0),
    "master": lambda: MasterTensor(VALUES.clone(), QuantizeSpec(MXFP4)),
}
SKIPPED = {
    "Tensor.__class__", "Tensor.__dict__", "Tensor.__getattribute__", "Tensor.__init__",
    "Tensor.__init_subclass__", "Tensor.__new__", "Tensor.__subclasshook__", "torch.lobpcg",
}  # fmt: skip
STORAGES = {
    "untyped_storage().data_ptr": lambda x: x.untyped_storage().data_ptr(),
    "untyped_storage().tolist": lambda x: x.untyped_storage().tolist(),
    "untyped_storage().copy_": lambda x: x.untyped_storage().copy_(VALUES.untyped_storage()),
    "untyped_storage().byteswap": lambda x: x.untyped_storage().byteswap(torch.float32),
    "storage()[0]": lambda x: x.storage()[0],
    "set_(storage)": lambda x: torch.empty(0).set_(x.storage()).sum(),
    "set_(tensor)": lambda x: torch.empty(0).set_(x),
    "numpy.asarray": np.asarray,
    "numpy.from_dlpack": np.from_dlpack,
    "torch.from_dlpack": torch.from_dlpack,
    "torch.to_dlpack": torch.to_dlpack,
}


def _calls(kind):
    """``{name: function of a tensor and of more arguments}``; for MXTensors functions too, beside methods."""
    found = {}
    for name in dir(torch.Tensor):
        if callable(inspect.getattr_static(torch.Tensor, name)):
            found[f"Tensor.{name}"] = lambda x, *args, name=name: getattr(x, name)(*args)
        else:
            found[f"Tensor.{name}"] = lambda x, name=name: getattr(x, name)
    for owner, functions in get_overridable_functions().items():
        if inspect.ismodule(owner) and kind == "mx":
            found.update({f"{owner.__name__}.{f.__name__}": f for f in functions})
    return {name: call for name, call in (found | STORAGES).items() if name not in SKIPPED}


def _arguments(x):
    index, row = torch.tensor([0, 1]), torch.zeros(N)
    return [
        (), (0,), (0, 1), (2.0,), (x,), (x, x), (index,), (0, index), (x.shape,), (-1,), (lambda v: v,),
        (x, lambda v, w: w), (x, x, lambda v, w, z: z), (torch.float32,), ("cpu",), (row,), (0, index, x[:2]),
        (x > 0,), (x > 0, 1.0), (1, -1), (None,),
    ]  # fmt: skip


def _is_same(result, want):
    if isinstance(want, torch.Tensor) and want.layout == torch.strided:
        result = getattr(result, "data_", result)
        result = result.dequantize() if hasattr(result, "parts") else result
        return result.shape == want.shape and torch.allclose(
            result.double(), want.double(), 1e-2, 1e-2, equal_nan=True
        )
    return True


def _serve(kind, names, pipe, trace):
    faulthandler.enable(open(trace, "w"))  # noqa: SIM115
    os.chdir(os.path.dirname(trace))  # where what takes a path may write
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    calls = _calls(kind)
    for name in names:
        for args in _arguments(VALUES):
            try:
                torch.manual_seed(0)
                want = calls[name](VALUES.clone(), *args)
            except Exception:
                continue
            if want is NotImplemented:
                continue
            pipe.send((name, "died", ""))
            try:
                torch.manual_seed(0)
                result = calls[name](KINDS[kind](), *args)
            except Exception as error:
                pipe.send((name, type(error).__name__, str(error)))
            else:
                same = "empty" in name or _is_same(result, want)
                pipe.send(
                    (name, "returned" if same else "returned other values", str(type(result)))
                )
            break
    pipe.send(None)


def sweep(kind, folder):
    """``[(name, outcome, text), ...]``; the outcome is "returned", an error's name, or that the process died."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    names, ends = sorted(_calls(kind)), []
    while names:
        theirs, ours = context.Pipe()
        trace = os.path.join(folder, f"trace_{kind}")
        process = context.Process(target=_serve, args=(kind, names, ours, trace), daemon=True)
        process.start()
        ours.close()
        line = ("the start", "died", "")
        while True:
            try:
                new = theirs.recv() if theirs.poll(SECONDS) else line
            except EOFError:
                new = line
            if new is None:
                process.join()
                return ends
            if new is line:  # nothing new: dead, or at the same call for too long
                break
            line = new
            if line[1] != "died":
                ends.append(line)
        process.kill()
        process.join()
        with open(trace) as f:
            ends.append((line[0], f"died ({process.exitcode})", f.read()))
        names = names[names.index(line[0]) + 1 :]
    return ends
