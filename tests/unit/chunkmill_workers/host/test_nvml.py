"""The driver's library as it answers: a stand-in with its calling convention, for machines without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from chunkmill_workers.host.nvml import Gpu, GpuUse


class Library:
    """Answers by writing through the pointers that it is given, as libnvidia-ml does; 0 is success."""

    def __init__(self, *, knows_busy: bool = True) -> None:
        self.asked: list[Any] = []
        self._knows_busy = knows_busy

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: ctypes.c_char_p, handle: Any) -> int:  # noqa: N802
        self.asked.append(name.value)
        handle._obj.value = 7
        return 0 if name.value == b"GPU-1b2f" else 6

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:  # noqa: N802
        self.asked.append(index.value)
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, use: Any) -> int:  # noqa: N802
        assert handle.value == 7
        use._obj.gpu = 93
        return 0 if self._knows_busy else 3

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.free, memory._obj.used = 80 << 30, 50 << 30, 30 << 30
        return 0


@pytest.mark.parametrize(("name", "asked"), [("GPU-1b2f", b"GPU-1b2f"), ("3", 3)])
def test_a_gpu_by_its_uuid_or_its_index(name: str, asked: object) -> None:
    library = Library()
    gpu = Gpu.open(name, library)
    assert gpu is not None
    assert library.asked == [asked]
    assert gpu.use() == GpuUse(0.93, 30 << 30, 80 << 30)


def test_what_a_device_does_not_say_is_not_known() -> None:
    gpu = Gpu.open("0", Library(knows_busy=False))
    assert gpu is not None
    assert gpu.use() == GpuUse(None, 30 << 30, 80 << 30)


def test_a_gpu_that_is_not_there_and_a_machine_without_a_driver() -> None:
    assert Gpu.open("GPU-ffff", Library()) is None
    assert Gpu.open("0", object()) is None
