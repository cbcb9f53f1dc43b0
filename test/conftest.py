"""Where the tests run: kernels on the GPU, or in Triton's interpreter where there is none."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so before torchao_mx (and torchao) are imported.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker per core already

# Reproducible, and without a folder of examples in the working tree.
hypothesis.settings.register_profile("torchao_mx", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("torchao_mx")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_collection_modifyitems(items):
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
