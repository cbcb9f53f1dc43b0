"""``_ranks.py`` reports a rank that a signal kills."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from _ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def _crash(device, times, count):
    """The rank 1 crashes while ``count`` holds fewer bytes than ``times``."""
    if dist.get_rank() == 1 and os.path.getsize(count) < times:
        with open(count, "a") as file:
            file.write(".")
        os.kill(os.getpid(), signal.SIGSEGV)
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def test_once_is_a_warning_with_the_traceback(tmp_path):
    count = tmp_path / "count"
    count.touch()
    with pytest.warns(UserWarning, match=r"(?s)rank 1, signal 11:.*in _crash"):
        assert run_ranks(_crash, 2, 1, count) == [2.0, 2.0]


def test_twice_is_a_failure(tmp_path):
    count = tmp_path / "count"
    count.touch()
    with (
        pytest.warns(UserWarning, match="once more"),
        pytest.raises(pytest.fail.Exception, match=r"(?s)rank 1, signal 11:.*in _crash"),
    ):
        run_ranks(_crash, 2, 9, count)
