"""A CUDA device that computes nothing, so that what a pass asks of one can be watched on a machine without any.

Its tensors are torch's ``meta`` tensors under the name of ``cuda:0``: shapes and formats are real, numbers are not
there, and whoever asks for one is a program that would wait for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
META = torch.device("meta")


class Synchronised(BaseException):
    """The host would stop here until the device has caught up. No Exception: the engine's thread must not mend it."""


class StandInGpu(TorchFunctionMode):
    """While ``armed``, whatever would wait for the device raises :class:`Synchronised`."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.log: list[str] = []
        self.stream: Stream | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            result = func(*args)
            return CUDA if result == META else result
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        watch = getattr(self, f"on_{name}", None)
        if watch is not None:
            return watch(func, args, kwargs)
        if name in _WAITS and _on_gpu(args):
            self.wait(name)
        to_gpu = _moved(args) != args or _moved(kwargs) != kwargs
        if name in ("tensor", "as_tensor") and to_gpu:
            self.wait(f"torch.{name} of host memory that is not pinned")
        return func(*_moved(args), **_moved(kwargs))

    def wait(self, why: str) -> None:
        if self.armed:
            raise Synchronised(why)

    def on_pin_memory(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        (tensor,) = args
        tensor.pinned = True
        return tensor

    def on_empty(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        pinned = kwargs.pop("pin_memory", False)
        made = func(*_moved(args), **_moved(kwargs))
        if pinned:
            made.zero_().pinned = True  # what a device would bring
        return made

    def on_to(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        source = args[0]
        target = [value for value in (*args[1:], *kwargs.values()) if _device(value) is not None]
        if target and source.device == META:
            if _device(target[0]) != CUDA:
                self.wait(".to(cpu)")
        elif target and _device(target[0]) == CUDA:
            if not getattr(source, "pinned", False):
                self.wait(".to(cuda) from memory that is not pinned")
            if not kwargs.get("non_blocking"):
                self.wait(".to(cuda) without non_blocking")
            self.log.append("host to device")
        return func(*_moved(args), **_moved(kwargs))

    def on_copy_(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        target, source = args[:2]
        if target.device == META and source.device == META:
            return func(*args, **kwargs)
        if not (getattr(target, "pinned", False) and kwargs.get("non_blocking")):
            self.wait("copy_ across, not pinned or not non_blocking")
        self.log.append(f"device to host on {self.stream}")
        return target

    def on___getitem__(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        self._look_at_index(args)
        return func(*args)

    def on___setitem__(self, func: Any, args: Any, kwargs: Any) -> None:
        self._look_at_index(args)
        func(*args)

    def on_repeat_interleave(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        counted = isinstance(args[-1], int) or kwargs.get("output_size") is not None
        if _on_gpu(args) and not counted:
            self.wait("repeat_interleave without output_size")
        return func(*args, **kwargs)

    def on_segment_reduce(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        data, lengths = args[0], kwargs["lengths"]
        if data.device != META:
            return func(*args, **kwargs)
        if not kwargs.get("unsafe"):
            self.wait("segment_reduce looks at the lengths")
        return data.new_empty(len(lengths), *data.shape[1:])

    def _look_at_index(self, args: Any) -> None:
        tensor, index = args[:2]
        if tensor.device != META:
            return
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list | np.ndarray) or (isinstance(part, torch.Tensor) and part.device != META):
                self.wait("an index from the host")
            elif isinstance(part, torch.Tensor) and part.dtype == torch.bool:
                self.wait("a choice by a mask")


_WAITS = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "any_item", "argwhere", "bincount",
    "cpu", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy", "tolist", "unique",
}  # fmt: skip


def _on_gpu(given: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.device == META for value in given)


def _device(value: Any) -> torch.device | None:
    if isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"):
        value = torch.device(value)
    if not isinstance(value, torch.device):
        return None
    return CUDA if value.type == "cuda" else value


def _moved(given: Any) -> Any:
    """The same arguments, with the real device's name in place of the stand-in's."""
    if isinstance(given, dict):
        return {name: META if _device(value) == CUDA else value for name, value in given.items()}
    return tuple(META if _device(value) == CUDA else value for value in given)


class Stream:
    """In place of ``torch.cuda.Stream``."""

    def __init__(self, gpu: StandInGpu, name: str) -> None:
        self._gpu, self._name = gpu, name

    def __str__(self) -> str:
        return self._name

    def wait_stream(self, other: Stream) -> None:
        self._gpu.log.append(f"{self} waits for {other}")

    def synchronize(self) -> None:
        self._gpu.wait("Stream.synchronize")


class Event:
    """In place of ``torch.cuda.Event``."""

    def __init__(self, gpu: StandInGpu) -> None:
        self._gpu = gpu

    def record(self, stream: Stream) -> None:
        self._gpu.log.append(f"event on {stream}")

    def synchronize(self) -> None:
        self._gpu.wait("Event.synchronize")


@contextlib.contextmanager
def stand_in_gpu(patch: pytest.MonkeyPatch) -> Iterator[StandInGpu]:
    """A machine with one device, as large as one likes, in this thread."""
    gpu = StandInGpu()
    main = Stream(gpu, "the device's thread's stream")

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        gpu.stream, before = chosen, gpu.stream
        try:
            yield
        finally:
            gpu.stream = before

    for name, stand_in in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "Stand-in",
        "get_device_capability": lambda device=None: (9, 0),
        "current_stream": lambda device=None: main,
        "stream": stream,
        "Stream": lambda device=None: Stream(gpu, "the copies' stream"),
        "Event": lambda **_: Event(gpu),
        "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize"),
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
    # It computes nothing, so no model would pass the probe, which runs in a thread of its own besides.
    patch.setattr("chunkmill_workers.engine.engine.require_fit", lambda *parts, **options: None)
    # torch reads this argument before it asks a mode.
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: gpu.log.append(f"kept for {stream}"))
    with gpu:
        yield gpu
