"""What launchers of products take: a packed weight, which rows meet which expert, and what is added."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchao_mx.formats import BlockFormat
from torchao_mx.reference import Added, Rows  # defined where they are explained

__all__ = ["Added", "Packed", "Rows", "aligned_rows"]


class Packed(NamedTuple):
    """A packed ``W [N, K]`` or ``[E, N, K]``: qdata ``[.., N, K / elems_per_byte]`` and its scales."""

    qdata: torch.Tensor
    scale: torch.Tensor
    per_tensor_scale: torch.Tensor | None
    fmt: BlockFormat

    @property
    def n(self) -> int:
        return self.qdata.shape[-2]

    @property
    def k(self) -> int:
        return self.qdata.shape[-1] * self.fmt.elems_per_byte

    def slice_n(self, first: int, end: int) -> Packed:
        return self._replace(
            qdata=self.qdata[..., first:end, :], scale=self.scale[..., first:end, :]
        )

    def slice_k(self, first: int, end: int) -> Packed:
        """Of whole blocks."""
        per_byte, block = self.fmt.elems_per_byte, self.fmt.block_size
        return self._replace(
            qdata=self.qdata[..., first // per_byte : end // per_byte],
            scale=self.scale[..., first // block : end // block],
        )


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x [R, C]`` as ``torch._grouped_mm`` needs it: contiguous rows, aligned to 16 bytes."""
    starts_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and starts_aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)
