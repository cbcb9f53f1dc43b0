"""Repeats a call's work on the device without the Python that planned it.

An op of a handful of small kernels spends more time in Python (tiles, grids, strides, checks) than the GPU
spends in the kernels. That plan depends only on the arguments' shapes, strides, dtypes and alignment. So the
second call of a kind is recorded: its launches of ``launched`` kernels and its calls of torch's ops, in
order, each tensor as a place in "input 3", "output 0" or "scratch 1". An op of this library is recorded as
its launches. Later calls allocate each scratch buffer when it is first needed, launch, call, and drop the
buffer after its last use, as the op itself did. A recording does not depend on values: those stay on the
device, and a call that brings one to the host is not recorded. This is not a CUDA graph: streams, allocator
and capture work as for single launches.

A recording keeps no tensor alive, so the recorded call needs no more memory than any other. If the allocator
hands out an address again, it counts as another buffer from then on.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from torchao_mx.ops.core.launch import Launch, launches, on_device_of, runner
from torchao_mx.ops.core.register import implementations
from torchao_mx.torch_internals import TorchDispatchMode, tree_iter, tree_map

MAX_RECORDINGS = 512  # per op; the oldest is dropped first
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class _Buffer(NamedTuple):
    """The tensor that a storage was allocated as; ``address`` is its first element's while recording."""

    address: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Place(NamedTuple):
    """A tensor ``offset`` bytes into a buffer; ``whole`` if it is the buffer's own tensor."""

    buffer: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    whole: bool

    def of(self, buffers: list[torch.Tensor | None]) -> torch.Tensor:
        base = buffers[self.buffer]
        if self.whole:
            return base
        if self.dtype == base.dtype:
            start = base.storage_offset() + self.offset // base.itemsize
            return base.as_strided(self.size, self.stride, start)
        start = (base.storage_offset() * base.itemsize + self.offset) // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), start, self.size, self.stride)


class _Call(NamedTuple):
    """A call of a torch op: its arguments, which of them hold places, and the buffers of its results."""

    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    filled_args: list[tuple[int, Any]]
    filled_kwargs: list[tuple[str, Any]]
    results: list[tuple[int, int]]

    def __call__(self, buffers: list[torch.Tensor | None]) -> Any:
        args, kwargs = self.args.copy(), self.kwargs.copy()
        for i, tree in self.filled_args:
            args[i] = _filled(tree, buffers)
        for name, tree in self.filled_kwargs:
            kwargs[name] = _filled(tree, buffers)
        return self.func(*args, **kwargs)


class _Launched(NamedTuple):
    """A launch: its flat argument list, the addresses to write into it, and which runs of it are tuples."""

    run: Callable[..., None]
    template: list[Any]
    patches: list[tuple[int, int, int]]  # position, buffer, offset
    tuples: list[tuple[int, int]]  # tuples, by first position and end; the last one first

    def __call__(self, first: list[int], stream: int | None) -> None:
        arguments = self.template.copy()
        for position, buffer, offset in self.patches:
            arguments[position] = first[buffer] + offset
        for begin, end in self.tuples:
            arguments[begin:end] = [tuple(arguments[begin:end])]
        self.run(*arguments, stream=stream)


class _Step(NamedTuple):
    """A launch or a call, the buffers allocated before it, and those dropped after it."""

    allocate: list[tuple[int, _Buffer]]
    launch: _Launched | None
    call: _Call | None
    drop: list[int]


class _Unrepeatable(Exception):
    """The call does something that a recording cannot repeat."""


class _Recording:
    """A repeatable call. Buffers: the inputs, then allocated or returned tensors in order of first use."""

    def __init__(
        self,
        n_inputs: int,
        n_buffers: int,
        steps: list[_Step],
        outputs: list[Any],
        kind: type = tuple,
    ) -> None:
        self.n_inputs = n_inputs
        self.n_buffers = n_buffers
        self.steps = steps
        self.outputs = outputs  # each a _Place, or a _Buffer that was never written to
        self.kind = kind  # tuple, list or, for a single output, Tensor

    def replay(self, inputs: list[torch.Tensor]) -> Any:
        device = inputs[0].device
        buffers = [*inputs, *[None] * (self.n_buffers - self.n_inputs)]
        first = [0 if t is None else t.data_ptr() for t in buffers]
        with on_device_of(inputs[0]):
            stream = None
            if device.type == "cuda":
                stream = torch.cuda.current_stream().cuda_stream
            for allocate, launch, call, drop in self.steps:
                for buffer, (_, size, stride, dtype) in allocate:
                    t = torch.empty_strided(size, stride, dtype=dtype, device=device)
                    buffers[buffer], first[buffer] = t, t.data_ptr()
                if launch is not None:
                    launch(first, stream)
                else:
                    result = call(buffers)
                    flat = result if isinstance(result, (tuple, list)) else (result,)
                    for i, buffer in call.results:
                        buffers[buffer], first[buffer] = flat[i], flat[i].data_ptr()
                for buffer in drop:
                    buffers[buffer] = None
        outputs = [
            output.of(buffers)
            if isinstance(output, _Place)
            else torch.empty_strided(*output[1:3], dtype=output.dtype, device=device)
            for output in self.outputs
        ]
        return self.kind(outputs) if self.kind in (tuple, list) else outputs[0]


class _Recorder(TorchDispatchMode or object):
    """Turns the launches and calls made under it into steps, as they happen."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.device = inputs[0].device
        self.n_inputs = len(inputs)
        self.buffers = [_buffer(t) for t in inputs]
        self.known = {_storage(t): i for i, t in enumerate(inputs) if t.numel()}
        self.allocated: dict[int, _Buffer] = {}  # not used yet
        self.steps: list[_Step] = []
        self.last: dict[int, int] = {}  # the step that uses a buffer last
        self.repeats = True

    def __enter__(self) -> _Recorder:
        launches.recording = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        launches.recording = None
        super().__exit__(*exception)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Implementations run below autograd, where torch's composites are dispatched whole: ``to``, which may
        # copy, would look like a view.
        implementation = implementations.get((func, self.device.type), func.decompose)
        try:
            with self:
                result = implementation(*args, **kwargs)
        finally:
            launches.recording = self
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func in _ALLOCATIONS:
            if result.numel():
                self.known.pop(_storage(result), None)
                self.allocated[_storage(result)] = _buffer(result)
        elif not func.is_view and next(_tensors((args, kwargs, result)), None) is not None:
            self._add(self._call, func, args, kwargs, result)
        return result

    def append(self, launch: Launch | None) -> None:
        """Add a launch of a ``launched`` kernel, or None for one that cannot be repeated."""
        self._add(self._launch, launch)

    def recording(self, outputs: tuple[torch.Tensor, ...], kind: type = tuple) -> _Recording | None:
        """Return the recording of a call that returned ``outputs`` as a ``kind``; None if unrepeatable."""
        if not self.repeats or not all(map(_owns_its_storage, outputs)):
            return None
        results = [
            self._place(t, []) if t.numel() and _storage(t) in self.known else _buffer(t)
            for t in outputs
        ]
        kept = {place.buffer for place in results if isinstance(place, _Place)}
        for buffer, step in self.last.items():
            if buffer >= self.n_inputs and buffer not in kept:
                self.steps[step].drop.append(buffer)
        return _Recording(self.n_inputs, len(self.buffers), self.steps, results, kind)

    def _add(self, make: Callable[..., tuple[_Step, set[int]]], *what: Any) -> None:
        if not self.repeats:
            return
        try:
            step, used = make(*what)
        except _Unrepeatable:
            self.repeats = False
            return
        self.last |= dict.fromkeys(used, len(self.steps))
        self.steps.append(step)

    def _new_buffer(self, storage: int, buffer: _Buffer) -> int:
        self.known[storage] = len(self.buffers)
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def _place(self, t: torch.Tensor, allocate: list[tuple[int, _Buffer]]) -> _Place:
        storage = _storage(t)
        index = self.known.get(storage)
        if index is None:
            buffer = self.allocated.pop(storage, None)
            if buffer is None:  # a tensor from outside the call
                raise _Unrepeatable
            index = self._new_buffer(storage, buffer)
            allocate.append((index, buffer))
        layout = _buffer(t)
        offset = layout.address - self.buffers[index].address
        return _Place(index, offset, *layout[1:], whole=layout == self.buffers[index])

    def _launch(self, launch: Launch | None) -> tuple[_Step, set[int]]:
        if launch is None:
            raise _Unrepeatable
        compiled, grid, arguments = launch
        template: list[Any] = []
        allocate, patches, tuples = [], [], []

        def add(argument: Any) -> None:
            if isinstance(argument, torch.Tensor):
                if argument.numel():
                    place = self._place(argument, allocate)
                    patches.append((len(template), place.buffer, place.offset))
                argument = 0
            elif isinstance(argument, tuple) and next(_tensors(argument), None) is not None:
                raise _Unrepeatable  # a nested tuple may hold only numbers
            template.append(argument)

        for argument in arguments:
            if isinstance(argument, tuple) and next(_tensors(argument), None) is not None:
                first = len(template)
                for part in argument:
                    add(part)
                tuples.insert(0, (first, len(template)))
            else:
                add(argument)
        step = _Step(
            allocate, _Launched(runner(compiled, grid), template, patches, tuples), None, []
        )
        return step, {buffer for _, buffer, _ in patches}

    def _call(self, func: Any, args: Any, kwargs: Any, result: Any) -> tuple[_Step, set[int]]:
        results = list(tree_iter(result))
        repeats = (
            all(isinstance(t, torch.Tensor) for t in results)
            and torch.Tag.dynamic_output_shape not in func.tags
            and all(t.device == self.device and t.numel() for t in _tensors((args, kwargs, result)))
        )
        if not repeats:
            raise _Unrepeatable
        allocate = []

        def placed(leaf: Any) -> Any:
            return self._place(leaf, allocate) if isinstance(leaf, torch.Tensor) else leaf

        given = {_storage(t) for t in _tensors((args, kwargs))}
        args, kwargs = tree_map(placed, args), tree_map(placed, kwargs)
        used = {leaf.buffer for leaf in _places((args, kwargs))}
        buffers = []
        for i, t in enumerate(results):
            if _storage(t) not in given:
                if not _owns_its_storage(t):
                    raise _Unrepeatable
                buffers.append((i, self._new_buffer(_storage(t), _buffer(t))))
        used |= {buffer for _, buffer in buffers}
        filled = [
            [(key, tree) for key, tree in items if next(_places(tree), None) is not None]
            for items in (enumerate(args), kwargs.items())
        ]
        return _Step(allocate, None, _Call(func, list(args), kwargs, *filled, buffers), []), used


def _buffer(t: torch.Tensor) -> _Buffer:
    return _Buffer(t.data_ptr(), t.shape, t.stride(), t.dtype)


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def _is_place(leaf: Any) -> bool:
    return isinstance(leaf, _Place)


def _places(tree: Any) -> Iterator[_Place]:
    return (leaf for leaf in tree_iter(tree, is_leaf=_is_place) if _is_place(leaf))


def _filled(tree: Any, buffers: list[torch.Tensor | None]) -> Any:
    """Replace places by tensors in a call's argument: a place, a plain value, or a tuple or list of these."""
    if isinstance(tree, _Place):
        return tree.of(buffers)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_filled(leaf, buffers) for leaf in tree)
    return tree


def _owns_its_storage(t: torch.Tensor) -> bool:
    """Whether ``empty_strided`` with t's shape and strides makes a storage like t's."""
    return t.storage_offset() == 0 and t.untyped_storage().nbytes() == t.numel() * t.itemsize


def _distinct(tensors: list[torch.Tensor]) -> bool:
    storages = [_storage(t) for t in tensors if t.numel()]
    return len(set(storages)) == len(storages)


def replayed(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``op`` so that repeated calls are replayed, as the module docstring describes.

    ``op`` maps tensors on one GPU, plain values and lists of those to one new tensor, or to a tuple or list
    of them. Call ``forget()`` on the result after changing what the op launches (for example tile sizes).
    """
    recordings: OrderedDict[Any, _Recording | bool] = OrderedDict()

    @functools.wraps(op)
    def call(*args: Any) -> Any:
        # The second case: the op runs inside another op, which records its launches.
        if TorchDispatchMode is None or launches.recording is not None:
            return op(*args)
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        key = tuple(
            [
                (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15)
                if isinstance(a, torch.Tensor)
                else tuple(a)
                if isinstance(a, list)
                else a
                for a in args
            ]
        )
        recording = recordings.get(key)
        if isinstance(recording, _Recording):
            return recording.replay(inputs)
        if recording is None:
            # The first call of a kind compiles its kernels; the second is recorded.
            recordings[key] = True
            if len(recordings) > MAX_RECORDINGS:
                recordings.popitem(last=False)
        if not recording:
            return op(*args)
        with _Recorder(inputs) as recorder:
            outputs = op(*args)
        results = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        recorded = None
        if _distinct([*inputs, *results]):
            recorded = recorder.recording(results, type(outputs))
        recordings[key] = recorded or False
        return outputs

    call.forget = recordings.clear  # type: ignore[attr-defined]
    return call
