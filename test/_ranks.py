"""Tests on several processes: one function, run by each rank of a process group.

``run_ranks`` runs a function of a module's top level as every rank; ``each_backend`` gives a test its backend,
gloo on the CPU or, marked ``gpu``, NCCL. A rank's error fails the test with its traceback. Processes are kept
for the tests that follow, as starting them takes longer than most tests do; after a failure new ones start.

A rank that a signal ends writes where it was, and the run is made once more, with a warning that has the traceback:
two collectives of gloo's that are under way at once, as FSDP2 can have them, corrupt the heap now and then.
"""

import atexit
import faulthandler
import multiprocessing as mp
import os
import pathlib
import pickle
import queue
import shutil
import tempfile
import time
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 180  # seconds for all ranks together
# What tests import or torch imports where it first compiles, seconds a rank.
PRELOADED = [
    "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "fsspec", "pytest", "hypothesis",
    "torch._dynamo.testing", "torch._inductor.lowering", "torchao_mx.distributed",
    "transformers.models.gpt_oss.modeling_gpt_oss", "peft",  # where there are such
]  # fmt: skip
PATIENCE = 2  # seconds in which ranks that failed with the first are heard
each_backend = pytest.mark.parametrize(
    "backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)]
)
_kept = {}


def run_ranks(function, ranks, *args, backend="gloo", timeout=TIMEOUT):
    """``[function(device, *args) of each rank]``, of ``ranks`` processes that form a group.

    What it takes and returns has to pickle. Skips where NCCL has fewer GPUs than ranks.
    """
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, there are {torch.cuda.device_count()}")
    try:
        return _run(ranks, backend, function, args, timeout)
    except Killed as error:
        warnings.warn(f"once more, as a rank was killed: {error}", stacklevel=2)
    try:
        return _run(ranks, backend, function, args, timeout)
    except Killed as error:
        pytest.fail(str(error), pytrace=False)


class Killed(Exception):
    """A signal ended a rank; the message says where it was."""


def _run(ranks, backend, function, args, timeout):
    key = ranks, backend
    if key not in _kept:
        _kept[key] = Ranks(ranks, backend)
        atexit.register(_kept[key].stop)
    try:
        return _kept[key].run(function, args, timeout)
    except BaseException:
        _kept.pop(key).stop()
        raise


class Ranks:
    """``ranks`` processes in a group of ``backend``."""

    def __init__(self, ranks, backend="gloo"):
        # From a process that has imported PRELOADED, and may have looked for GPUs, none can use one.
        context = mp.get_context("spawn" if backend == "nccl" else "forkserver")
        if backend != "nccl":
            context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.mkdtemp()
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(ranks)]
        store = os.path.join(self.folder, "store")
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, ranks, backend, store, self.trace(rank), tasks, self.results),
                daemon=True,
            )
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def trace(self, rank):
        return os.path.join(self.folder, f"trace{rank}")

    def killed(self):
        """What the ranks that a signal ended have written."""
        return [
            f"rank {rank}, signal {-process.exitcode}:\n{pathlib.Path(self.trace(rank)).read_text()}"
            for rank, process in enumerate(self.processes)
            if process.exitcode is not None and process.exitcode < 0
        ]

    def start(self, function, *args):
        for tasks in self.tasks:
            tasks.put((function, args))

    def run(self, function, args=(), timeout=TIMEOUT):
        self.start(function, *args)
        deadline, results, errors = time.monotonic() + timeout, {}, []
        while len(results) + len(errors) < len(self.processes):
            if not self.results.empty():
                rank, result, error = self.results.get()
                if error is None:
                    results[rank] = pickle.loads(result)
                else:
                    errors.append(f"rank {rank}:\n{error}")
                    # The others now wait for this one in vain.
                    deadline = min(deadline, time.monotonic() + PATIENCE)
            elif killed := self.killed():
                raise Killed("\n".join(killed))
            elif any(p.exitcode is not None for p in self.processes):
                errors.append(f"exit codes: {[p.exitcode for p in self.processes]}")
                break
            elif time.monotonic() > deadline:
                late = sorted(set(range(len(self.processes))) - results.keys())
                errors.append(f"ranks {late} have not finished in time")
                break
            else:
                time.sleep(0.01)
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)
        return [results[rank] for rank in sorted(results)]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(rank, ranks, backend, store, trace, tasks, results):
    faulthandler.enable(open(trace, "w"))  # noqa: SIM115
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    while mp.parent_process().is_alive():
        try:
            function, args = tasks.get(timeout=PATIENCE)
        except queue.Empty:
            continue
        try:
            result = function("cuda" if backend == "nccl" else "cpu", *args)
            dist.barrier()
            # Bytes, as tensors would live in this process's memory.
            results.put((rank, pickle.dumps(result), None))
        except BaseException:  # those of pytest.raises and of torch's checkpoints are no Exceptions
            results.put((rank, None, traceback.format_exc()))
