"""Functions run in a forked child: killed at one of its file operations, or without root's permissions."""

import os
import pickle
import signal
import sys

import torch

CHANGES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
NOBODY = 65534


class Killed(Exception):
    pass


def in_child(function, kill_at=None, user=None):
    """(what ``function`` returns, or the error that it raises; the file operations before its end).

    Args:
        kill_at: the number of the operation that the process does not live to make; of ``save_file``, half.
        user: whose permissions it has.

    Raises:
        Killed: it was.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _run(function, kill_at, user, write)
    os.close(write)
    with open(read, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        raise Killed
    return pickle.loads(data)


def _run(function, kill_at, user, write):
    torch.set_num_threads(1)  # the parent's threads are not in a fork
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    operations = []

    def operation(name, file=None):
        if len(operations) == kill_at:
            if file is not None:
                os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        operations.append(name)

    def hook(event, args):
        written = event == "open" and not isinstance(args[0], int) and str(args[1])[0] in "axw"
        if event in CHANGES or written:
            operation(event)

    def counted(save_file):
        def wrapper(tensors, file, **options):
            save_file(tensors, file, **options)  # in Rust, of which no hook hears
            operation("save_file", file)

        return wrapper

    if kill_at is not None:
        from torchao_mx.hf import staging  # with transformers, where there is one

        staging.save_file = counted(staging.save_file)
        sys.addaudithook(hook)
    try:
        if user is not None:
            os.setgroups([])
            os.setegid(user)
            os.seteuid(user)
        result = function()
    except BaseException as error:
        result = error
    if user is not None:
        os.seteuid(0)
    with open(write, "wb") as stream:
        pickle.dump((result, operations), stream)
        stream.flush()
        os._exit(0)
