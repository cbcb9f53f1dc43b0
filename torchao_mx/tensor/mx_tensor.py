"""MXTensor: packed blocks that PyTorch sees as the tensor they represent.

This file holds the storage: fields and their checks, conversions in and out, and pickling.
``dispatch.py`` registers the operators.

The packed axis is a field, not inferred from the strides: an axis of length 1 makes them ambiguous,
and a wrong guess scrambles the weight without an error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor as TorchAOMXTensor
from torchao.prototype.mx_formats.mx_tensor import QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
from torchao.prototype.mx_formats.utils import from_blocked
from torchao.quantization.quantize_.common import KernelPreference
from torchao.utils import TorchAOBaseTensor

from torchao_mx import ops, torch_internals
from torchao_mx.errors import check_axis, check_blocks, check_high_precision
from torchao_mx.formats import (
    MXFP4,
    NVFP4,
    BlockFormat,
    QuantizeSpec,
    ScaleCalculationMode,
    check_scaling_mode,
    format_by_name,
)
from torchao_mx.tensor.fsdp import UNSAVED, PackedAllGather
from torchao_mx.tensor.storage import not_implemented, wrapper

_OPERATORS: dict[Any, Callable[..., Any]] = {}  # what MXTensor.implements registered


class MXTensor(PackedAllGather, TorchAOBaseTensor):
    """A tensor stored in a block format; it reports the shape, strides and dtype of its values.

    ``value[..., n, k] = element[..., n, k] * scale[..., n, k // block_size] (* per_tensor_scale)``

    Attributes:
        qdata: the elements, ``[..., N, K / elems_per_byte]``, of dtype ``format.qdata_dtype``.
        scale: the block scales, ``[..., N, K / block_size]``, of dtype ``format.scale_dtype``.
        format: the :class:`BlockFormat`.
        orig_dtype: the logical dtype: bfloat16, float16 or float32.
        packed_axis: the axis that blocks run along: -1, or -2 after a transpose. Then both tensors are
            transposed views, ``[..., K / elems_per_byte, N]`` and ``[..., K / block_size, N]``.
        per_tensor_scale: fp32, 0-d or one per expert ``[E, 1, 1]``, for NVFP4; otherwise None.
        activation: how a matmul quantizes its other operand on the fly; None does not quantize it.

    ``nbytes`` and ``element_size()`` count packed bytes and scales; ``share_memory_()`` shares them.
    Use ``torch.export`` rather than ``torch.jit.save``, whose files with such a weight cannot be loaded.

    Raises:
        TypeError: a field has the wrong type or dtype.
        ValueError: the fields do not fit together.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4
        >>> from torchao_mx.tensor import MXTensor
        >>> w = MXTensor.from_hp(torch.randn(128, 256, dtype=torch.bfloat16), MXFP4)
        >>> w
        MXTensor(shape=(128, 256), mxfp4, orig_dtype=bfloat16, device=cpu)
        >>> w.t()[:64]
        MXTensor(shape=(64, 128), mxfp4, orig_dtype=bfloat16, packed_axis=-2, device=cpu)
        >>> w.qdata.shape, w.dequantize().shape
        (torch.Size([128, 128]), torch.Size([128, 256]))
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["format", "orig_dtype", "packed_axis"]
    optional_tensor_data_names = ["per_tensor_scale"]
    optional_tensor_attribute_names = ["activation"]

    def __new__(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        format: BlockFormat,
        orig_dtype: torch.dtype,
        packed_axis: int,
        per_tensor_scale: torch.Tensor | None = None,
        activation: QuantizeSpec | None = None,
    ):
        _check_types(qdata, scale, format, orig_dtype, packed_axis, per_tensor_scale, activation)
        shape = _logical_shape(qdata, scale, format, packed_axis, per_tensor_scale)
        width = format.elems_per_byte
        strides = [s * width for s in qdata.stride()]
        strides[packed_axis] = qdata.stride(packed_axis)
        offset = qdata.storage_offset() * width
        self = wrapper(cls, shape, strides, orig_dtype, qdata.device, offset)
        self.qdata = qdata
        self.scale = scale
        self.format = format
        self.orig_dtype = orig_dtype
        self.packed_axis = packed_axis
        self.per_tensor_scale = per_tensor_scale
        self.activation = activation
        return self

    @classmethod
    def from_hp(
        cls,
        data: torch.Tensor,
        fmt: BlockFormat,
        scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL,
        *,
        activation: QuantizeSpec | None = None,
    ) -> MXTensor:
        """Quantize ``data [..., N, K]`` (bfloat16, float16 or float32) in blocks along K.

        NVFP4's per-tensor scale is computed from the data: one per leading index for 3-D data, else one.

        Raises:
            TypeError: ``data`` has another dtype, or ``fmt``, ``scaling_mode`` or ``activation``
                has another type.
            ValueError: ``data`` has fewer than two dimensions, is empty, or K is not whole blocks.
        """
        _check_format(fmt)
        check_scaling_mode(scaling_mode)
        _check_activation(activation)
        check_high_precision(data.dtype, "data")
        _check_rank(data.shape, "data")
        check_blocks(data.shape, fmt, -1, "data")
        data = data.detach()
        pts = None
        if fmt.has_per_tensor_scale:
            pts = ops.per_tensor_scale(data, fmt, data.dim() == 3)
        qdata, scale = ops.quantize(data, fmt, scaling_mode, axis=-1, per_tensor_scale=pts)
        return cls(qdata, scale, fmt, data.dtype, -1, pts, activation)

    @classmethod
    def from_torchao(cls, tensor: TorchAOMXTensor | NVFP4Tensor) -> MXTensor:
        """Convert torchao's MXTensor or NVFP4Tensor, transposed or not, sharing its memory.

        Only swizzled scales are copied, to un-swizzle them. Dynamic ``act_quant_kwargs`` become
        ``activation``; kernel preferences are dropped.

        Raises:
            TypeError: ``tensor`` is neither.
            ValueError: the block format is not supported (fp6, other block sizes).
            NotImplementedError: the activation scale is static or missing.
        """
        pts = None
        if isinstance(tensor, NVFP4Tensor):
            fmt = _format_from_torchao(NVFP4.elem_dtype, tensor.block_size)
            pts = tensor.per_tensor_scale
        elif isinstance(tensor, TorchAOMXTensor):
            fmt = _format_from_torchao(tensor.elem_dtype, tensor.block_size)
        else:
            raise TypeError(
                f"from_torchao got a {type(tensor).__name__}; it takes torchao's MXTensor or "
                f"NVFP4Tensor: quantize plain tensors with MXTensor.from_hp"
            )
        qdata = tensor.qdata.view(fmt.qdata_dtype)
        if tensor.is_swizzled_scales:
            # The shape of padded scales does not reveal the axis; torchao infers it from strides too.
            packed_axis = -1 if qdata.stride(-2) > qdata.stride(-1) else -2
            scale = _unswizzle(tensor.scale, qdata, fmt, packed_axis)
        else:
            scale, packed_axis = _scale_from_torchao(tensor.scale, qdata, fmt)
        activation = _activation_from_torchao(tensor.act_quant_kwargs)
        return cls(qdata, scale, fmt, tensor.orig_dtype, packed_axis, pts, activation)

    def to_torchao(
        self, kernel_preference: KernelPreference = KernelPreference.EMULATED
    ) -> TorchAOMXTensor | NVFP4Tensor:
        """Return torchao's tensor over the same memory: NVFP4Tensor for NVFP4, otherwise MXTensor.

        ``kernel_preference`` applies to the tensor and its activation (NVFP4Tensor has none). torchao
        multiplies only by activations in the weight's own format; other formats still convert.

        Raises:
            TypeError: ``kernel_preference`` is not a KernelPreference.
            ValueError: qdata is not dense, or is transposed and 3-D: torchao infers the packed axis
                from the strides and would get it wrong.
        """
        if not isinstance(kernel_preference, KernelPreference):
            raise TypeError(f"{kernel_preference=} is not a KernelPreference; use one of torchao's")
        transposed = self.packed_axis == -2
        data = [t.mT if transposed else t for t in (self.qdata, self.scale)]
        ambiguous = transposed and (self.dim() > 2 or self.qdata.is_contiguous())
        if ambiguous or not all(t.is_contiguous() for t in data):
            raise ValueError(
                f"{self} has qdata of strides {self.qdata.stride()}, from which torchao would infer "
                f"the wrong packed_axis: call .contiguous(), and .mT if packed_axis is -2"
            )
        fmt, kwargs = self.format, _activation_to_torchao(self.activation, kernel_preference)
        if fmt.has_per_tensor_scale:
            return NVFP4Tensor(
                self.qdata,
                self.scale,
                fmt.block_size,
                self.orig_dtype,
                per_tensor_scale=self.per_tensor_scale,
                act_quant_kwargs=kwargs,
            )
        return TorchAOMXTensor(
            self.qdata,
            self.scale,
            elem_dtype=fmt.elem_dtype,
            block_size=fmt.block_size,
            orig_dtype=self.orig_dtype,
            kernel_preference=kernel_preference,
            act_quant_kwargs=kwargs,
            is_swizzled_scales=False,
        )

    @classmethod
    def from_blocks(
        cls, blocks: torch.Tensor, scales: torch.Tensor, orig_dtype: torch.dtype = torch.bfloat16
    ) -> MXTensor:
        """Wrap gpt-oss's MXFP4 without a copy: uint8 ``[..., N, K/32, 16]`` and ``[..., N, K/32]``.

        Raises:
            TypeError: blocks are not uint8, or scales are neither uint8 nor float8_e8m0fnu.
            ValueError: the shapes do not match, or the blocks' strides allow no view.
        """
        check_high_precision(orig_dtype, "orig_dtype")
        if blocks.dtype != torch.uint8 or scales.dtype not in (torch.uint8, MXFP4.scale_dtype):
            raise TypeError(
                f"blocks have dtype {blocks.dtype} and scales {scales.dtype}; both must be uint8, as "
                f"gpt-oss stores them (scales may be {MXFP4.scale_dtype}): use .view(torch.uint8)"
            )
        block_bytes = MXFP4.block_size // MXFP4.elems_per_byte
        shapes = tuple(blocks.shape), tuple(scales.shape)
        if len(shapes[0]) < 3 or shapes[0][-1] != block_bytes or shapes[1] != shapes[0][:-1]:
            raise ValueError(
                f"blocks have shape {shapes[0]} and scales {shapes[1]}; expected [..., N, "
                f"K/{MXFP4.block_size}, {block_bytes}] and, for these blocks, {shapes[0][:-1]}: "
                f"pass both tensors of one weight as stored in the checkpoint"
            )
        try:
            qdata = blocks.view(*blocks.shape[:-2], -1)
        except RuntimeError:
            raise ValueError(
                f"blocks have strides {blocks.stride()}, so no view can join their last two axes: "
                f"call .contiguous() on them"
            ) from None
        return cls(qdata, scales.view(MXFP4.scale_dtype), MXFP4, orig_dtype, -1)

    def to_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 views ``(blocks [..., N, K/32, 16], scales [..., N, K/32])``; undo from_blocks.

        Raises:
            ValueError: the format is not MXFP4, or the tensor is transposed.
        """
        if self.format != MXFP4 or self.packed_axis != -1:
            raise ValueError(
                f"{self} has no gpt-oss blocks; it must be {MXFP4}, packed along the last axis: "
                f"undo a transpose with .mT, or requantize .dequantize() with MXTensor.from_hp"
            )
        block_bytes = MXFP4.block_size // MXFP4.elems_per_byte
        return self.qdata.unflatten(-1, (-1, block_bytes)), self.scale.view(torch.uint8)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values in ``output_dtype``, by default ``orig_dtype``; transposed if this is.

        Raises:
            TypeError: ``output_dtype`` is not bfloat16, float16 or float32.
        """
        dtype = self.orig_dtype if output_dtype is None else output_dtype
        check_high_precision(dtype, "output_dtype")
        qdata, scale, pts = self.qdata, self.scale, self.per_tensor_scale
        if self.packed_axis == -1:
            return ops.dequantize(qdata, scale, self.format, dtype, per_tensor_scale=pts)
        return ops.dequantize(qdata.mT, scale.mT, self.format, dtype, per_tensor_scale=pts).mT

    def packed_as(self, fmt: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return ``(qdata, scale, per_tensor_scale)`` for a layer that quantizes its weight to ``fmt``.

        Raises:
            ValueError: this weight, gathered packed or shared with another layer, is packed differently.
        """
        if self.format.name != fmt or self.packed_axis != -1:
            raise ValueError(
                f"{self} is the weight of a layer that needs {fmt}, packed along the last axis: give the "
                f"layer a weight in that format, or its .dequantize() values in high precision"
            )
        return self.qdata, self.scale, self.per_tensor_scale

    def parts(self) -> list[torch.Tensor]:
        """Return the tensors that hold the bytes: qdata, scale and any per_tensor_scale."""
        return [getattr(self, name) for name in self.__tensor_flatten__()[0]]

    def fields(self) -> dict:
        """Return the constructor's arguments by name."""
        return {name: getattr(self, name) for name in _FIELDS}

    def replace(self, **fields) -> MXTensor:
        """Return this tensor with some of its fields replaced; the class lists them.

        Raises:
            TypeError: a name is not a field.
        """
        return type(self)(**self.fields() | fields)

    @classmethod
    def implements(cls, operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register ``(func, types, args, kwargs)`` for operators: a table of our own beside torchao's."""

        def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
            single = not isinstance(operators, (list, tuple))
            _OPERATORS.update(dict.fromkeys([operators] if single else operators, function))
            return function

        return decorator

    def __repr__(self, *, tensor_contents: object = None) -> str:
        fields = [f"shape={tuple(self.shape)}", self._quantization_type(), f"device={self.device}"]
        return f"{type(self).__name__}({', '.join(fields)})"

    __str__ = __repr__

    def _quantization_type(self) -> str:
        """Return the text that torchao prints for this weight in a module's ``extra_repr``."""
        fields = [self.format.name, f"orig_dtype={str(self.orig_dtype).removeprefix('torch.')}"]
        if self.packed_axis != -1:
            fields.append(f"packed_axis={self.packed_axis}")
        if self.activation is not None:
            fields.append(f"activation={self.activation}")
        return ", ".join(fields)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        implementation = _OPERATORS.get(func)
        if implementation is not None:
            return implementation(func, types, args, kwargs)
        # In inference_mode, composite operators (reshape, chunk) arrive here undecomposed.
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        raise not_implemented(func, args, kwargs, MXTensor)

    def __deepcopy__(self, memo: dict) -> MXTensor:
        # torch's own version tests data_ptr() == 0, which fails for a view with a storage offset.
        if id(self) in memo:
            return memo[id(self)]
        names = (*self.tensor_data_names, *self.optional_tensor_data_names)
        new = self.replace(**{name: copy.deepcopy(getattr(self, name), memo) for name in names})
        new.requires_grad_(self.requires_grad)
        for name in self.__dict__.keys() - set(_FIELDS):  # nn.Parameter's mark, a user's own
            setattr(new, name, copy.deepcopy(self.__dict__[name], memo))
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol):
        # Reduce as torch does for wrapper subclasses; torch itself does so only if data_ptr() == 0.
        wrapper = (type(self), self.dtype, self.size(), self.stride(), self.storage_offset())
        wrapper += (self.layout, self.device, self.requires_grad)
        args = (torch_internals.rebuild_wrapper, type(self), wrapper, self.__getstate__())
        return torch_internals.rebuild, args

    def __getstate__(self) -> dict:
        """Return the fields as plain types, so that loading needs to trust only this class.

        Formats are saved by name, 1-byte dtypes as uint8 (the standard pickle cannot load float8).
        """
        state = {k: v for k, v in self.__dict__.items() if k not in UNSAVED}
        state["format"] = self.format.name
        state.update(qdata=self.qdata.view(torch.uint8), scale=self.scale.view(torch.uint8))
        if self.activation is not None:
            mode = self.activation.scaling_mode.value
            state["activation"] = (self.activation.format.name, mode)
        return state


_FIELDS = (
    *MXTensor.tensor_data_names,
    *MXTensor.tensor_attribute_names,
    *MXTensor.optional_tensor_data_names,
    *MXTensor.optional_tensor_attribute_names,
)


def _set_state(self: MXTensor, state: dict) -> None:
    """Set the fields from a file, checked as in the constructor because kernels trust them."""
    fmt = format_by_name(state["format"])
    state = dict(state, format=fmt)
    for name, dtype in (("qdata", fmt.qdata_dtype), ("scale", fmt.scale_dtype)):
        state[name] = state[name].view(dtype)
    if state["activation"] is not None:
        name, mode = state["activation"]
        state["activation"] = QuantizeSpec(format_by_name(name), ScaleCalculationMode(mode))
    checked = type(self)(**{name: state[name] for name in _FIELDS})
    if (checked.shape, checked.dtype, checked.stride()) != (self.shape, self.dtype, self.stride()):
        raise ValueError(
            f"the file declares a tensor of shape {tuple(self.shape)} and {self.dtype} but holds "
            f"{checked}: it is corrupt, write it again"
        )
    self.__dict__.update(state)


# Set here because TorchAOBaseTensor installs its own, which checks nothing, when the class is created.
MXTensor.__setstate__ = _set_state
torch.serialization.add_safe_globals([MXTensor])


def _check_format(fmt: object) -> None:
    if not isinstance(fmt, BlockFormat):
        raise TypeError(
            f"format={fmt!r} is not a BlockFormat; use MXFP4, MXFP8_E4M3, MXFP8_E5M2 or NVFP4"
        )


def _check_activation(activation: object) -> None:
    if activation is not None and not isinstance(activation, QuantizeSpec):
        raise TypeError(
            f"activation={activation} is a {type(activation).__name__}; it must be a QuantizeSpec or "
            f"None: wrap a format, QuantizeSpec(MXFP8_E4M3)"
        )


def _check_rank(shape: torch.Size, what: str) -> None:
    if len(shape) < 2:
        raise ValueError(
            f"{what} has shape {tuple(shape)}; an MXTensor needs two or more dimensions: unsqueeze it"
        )


def _check_types(qdata, scale, fmt, orig_dtype, packed_axis, pts, activation) -> None:
    _check_format(fmt)
    _check_activation(activation)
    check_high_precision(orig_dtype, "orig_dtype")
    check_axis(packed_axis)
    wanted = [("qdata", qdata, fmt.qdata_dtype), ("scale", scale, fmt.scale_dtype)]
    if pts is not None:
        wanted.append(("per_tensor_scale", pts, torch.float32))
    for name, tensor, dtype in wanted:
        if tensor.dtype != dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; {fmt} needs {dtype}: view the bytes as that dtype, "
                f"or quantize with MXTensor.from_hp"
            )
        if tensor.device != qdata.device:
            raise ValueError(
                f"{name} is on {tensor.device} and qdata on {qdata.device}; move them to one device"
            )


def _logical_shape(qdata, scale, fmt, packed_axis, pts) -> list[int]:
    shape = list(qdata.shape)
    _check_rank(shape, "qdata")
    shape[packed_axis] *= fmt.elems_per_byte
    scale_shape = list(shape)
    scale_shape[packed_axis] //= fmt.block_size
    if shape[packed_axis] % fmt.block_size or list(scale.shape) != scale_shape:
        block_bytes = fmt.block_size // fmt.elems_per_byte
        raise ValueError(
            f"qdata has shape {tuple(qdata.shape)} and scale {tuple(scale.shape)}; {fmt} needs "
            f"{block_bytes} bytes of qdata per scale along packed_axis={packed_axis}, and equal "
            f"other axes: check that they belong to one weight"
        )
    if pts is not None:
        if not fmt.has_per_tensor_scale:
            raise ValueError(f"{fmt} has no per_tensor_scale; leave it None")
        if pts.dim() and (len(shape) != 3 or tuple(pts.shape) != (shape[0], 1, 1)):
            raise ValueError(
                f"per_tensor_scale has shape {tuple(pts.shape)}; for a tensor of shape {tuple(shape)} "
                f"it must be 0-d, or [E, 1, 1] if the tensor is [E, N, K]: reshape it"
            )
    return shape


def _format_from_torchao(elem_dtype: torch.dtype | str, block_size: int) -> BlockFormat:
    if isinstance(elem_dtype, str):  # torchao's fp6
        raise ValueError(f"torchao's {elem_dtype} is not supported: requantize .dequantize()")
    return BlockFormat.from_dtype(elem_dtype, block_size)


def _scale_from_torchao(scale, qdata, fmt: BlockFormat) -> tuple[torch.Tensor, int]:
    """Return the scale in qdata's layout and the packed axis, which the two shapes determine."""
    block_bytes = fmt.block_size // fmt.elems_per_byte
    for packed_axis in (-1, -2):
        shape = list(qdata.shape)
        shape[packed_axis] //= block_bytes
        if list(scale.shape) == shape:
            return scale, packed_axis
    # torchao's view() reshapes only qdata, and only if the last axis is packed.
    return scale.view(*qdata.shape[:-1], -1), -1


def _unswizzle(scale, qdata, fmt: BlockFormat, packed_axis: int) -> torch.Tensor:
    if packed_axis == -2:
        return _unswizzle(scale.mT, qdata.mT, fmt, -1).mT
    rows = qdata.shape[:-1]
    columns = qdata.shape[-1] * fmt.elems_per_byte // fmt.block_size
    plain = from_blocked(scale.view(torch.uint8).contiguous(), math.prod(rows), columns)
    return plain.reshape(*rows, columns).contiguous().view(fmt.scale_dtype)


def _activation_from_torchao(kwargs: object) -> QuantizeSpec | None:
    if kwargs is None:
        return None
    if isinstance(kwargs, QuantizeTensorToMXKwargs):
        fmt = _format_from_torchao(kwargs.elem_dtype, kwargs.block_size)
        return QuantizeSpec(fmt, kwargs.scaling_mode)
    if isinstance(kwargs, QuantizeTensorToNVFP4Kwargs) and kwargs.use_dynamic_per_tensor_scale:
        return QuantizeSpec(_format_from_torchao(NVFP4.elem_dtype, kwargs.block_size))
    raise NotImplementedError(
        f"act_quant_kwargs={kwargs} has no dynamic per-tensor scale, the only kind supported for "
        f"activations: set use_dynamic_per_tensor_scale=True, or act_quant_kwargs=None"
    )


def _activation_to_torchao(spec: QuantizeSpec | None, kernel_preference: KernelPreference):
    if spec is None:
        return None
    if spec.format.has_per_tensor_scale:
        return QuantizeTensorToNVFP4Kwargs(
            block_size=spec.format.block_size, use_dynamic_per_tensor_scale=True
        )
    return QuantizeTensorToMXKwargs(
        elem_dtype=spec.format.elem_dtype,
        block_size=spec.format.block_size,
        scaling_mode=spec.scaling_mode,
        kernel_preference=kernel_preference,
    )
