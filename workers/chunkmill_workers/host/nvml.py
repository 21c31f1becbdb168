"""Says how busy and how full a GPU is. The driver's library takes microseconds for it, and nvidia-smi a second."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
"""A part of the driver."""


@dataclass(frozen=True, slots=True)
class GpuUse:
    """``busy`` is the share, from 0 to 1, of the driver's last sample of up to a second in which a kernel ran. It is
    None if the device does not say, like a MIG slice. The memory is that of all processes on the device, in bytes."""

    busy: float | None
    memory_used: int | None
    memory_total: int | None


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpu:
    """One device. It is only read and never changed."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library = library
        self._handle = handle

    @classmethod
    def open(cls, name: str, library: Any = None) -> Gpu | None:
        """The GPU that CUDA_VISIBLE_DEVICES calls ``name``, by UUID or index. None without a driver or such a GPU."""
        try:
            library = library or ctypes.CDLL(LIBRARY)
            if library.nvmlInit_v2() != 0:
                return None
            handle = ctypes.c_void_p()
            if name.isdigit():
                code = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
            else:
                code = library.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(name.encode()), ctypes.byref(handle))
        except (OSError, AttributeError):  # no library, or one that is too old
            return None
        return cls(library, handle) if code == 0 else None

    def use(self) -> GpuUse:
        """Read how busy and how full the device is now."""
        utilization, memory = _Utilization(), _Memory()
        knows_busy = self._library.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(utilization)) == 0
        knows_memory = self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) == 0
        return GpuUse(
            utilization.gpu / 100 if knows_busy else None,
            int(memory.used) if knows_memory else None,
            int(memory.total) if knows_memory else None,
        )
