"""Gives each worker process one GPU without a coordinator, by a file lock per device.

A device is claimed before torch is imported, because CUDA reads CUDA_VISIBLE_DEVICES only once. The kernel releases the
lock when its process ends, however that ends, so no crash can keep a device.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from chunkmill.errors import DeviceTaken, DeviceUnavailable, InvalidSetting
from chunkmill.machine import nvidia_smi


@dataclass(frozen=True, slots=True)
class ClaimedDevice:
    """A device for torch. Keep this object, because the claim ends when ``lock`` is closed."""

    device: str
    """``cuda:0`` (the only device this process sees from now on) or ``cpu``."""
    gpu: str | None = None
    """The claimed GPU as CUDA_VISIBLE_DEVICES names it: a UUID or an index."""
    lock: IO[str] | None = None

    @property
    def worker_name(self) -> str:
        """A name that no other worker process of this machine has: ``gpu-1b2f43ad``, ``cpu-4711``."""
        if self.gpu is None:
            return f"cpu-{os.getpid()}"
        short = short_name(self.gpu)
        return short if self.lock is not None else f"{short}-{os.getpid()}"

    def release(self) -> None:
        """Give the device back before the process ends."""
        if self.lock is not None:
            self.lock.close()


def short_name(gpu: str) -> str:
    """A short name for a GPU that CUDA_VISIBLE_DEVICES names: ``gpu-1b2f43ad``, ``gpu-0``; ``mig-41b35357``."""
    name = gpu.lower()
    if name.startswith("mig-gpu-"):  # drivers before 470 name it so: MIG-GPU-<UUID>/1/0
        uuid, *slice_of_it = name.removeprefix("mig-gpu-").split("/")
        return "-".join(["mig", uuid.partition("-")[0], *slice_of_it])
    kind, _, uuid = name.partition("-") if name.startswith(("gpu-", "mig-")) else ("gpu", "", name)
    return f"{kind}-{uuid.partition('-')[0]}"


def claim_device(
    requested: str, *, share: bool, lock_dir: Path | None = None, devices: Sequence[str] | None = None
) -> ClaimedDevice:
    """Claim a free GPU for this process and set CUDA_VISIBLE_DEVICES to it.

    ``requested`` is EMBEDDING_DEVICE: ``auto`` (a GPU if there is one, else the CPU), ``cuda``,
    ``cuda:<n>`` (the n-th GPU that this process sees, and no other) or ``cpu``. ``share`` is
    EMBEDDING_SHARE_GPU: several processes may hold one device. ``devices`` are UUIDs or indices as
    CUDA_VISIBLE_DEVICES takes them; if omitted, they are looked up. Raises DeviceUnavailable or InvalidSetting.
    """
    kind, _, index = requested.partition(":")
    if kind not in ("auto", "cuda", "cpu") or (index and not (kind == "cuda" and index.isdigit())):
        raise InvalidSetting(f"EMBEDDING_DEVICE is {requested!r}: it must be auto, cpu, cuda or cuda:<index>")
    if kind == "cpu":
        return ClaimedDevice("cpu")
    visible = list(visible_gpus() if devices is None else devices)
    if not visible and kind == "auto":
        return ClaimedDevice("cpu")
    if not visible or int(index or 0) >= len(visible):
        raise DeviceUnavailable(
            f"EMBEDDING_DEVICE is {requested} and this process sees {len(visible)} NVIDIA devices: check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES, or set EMBEDDING_DEVICE=auto"
        )
    if index:
        visible = [visible[int(index)]]
    folder = lock_dir or _lock_dir()
    lock, gpu = _first_free(visible, folder)
    if gpu is None:
        if not share:
            holders = ", ".join(f"{gpu} (process {_holder(folder, gpu)})" for gpu in visible)
            raise DeviceTaken(
                f"every NVIDIA device is taken: {holders}. One worker process per GPU is the fastest; stop "
                "one, or set EMBEDDING_SHARE_GPU=1 to let this one join"
            )
        gpu = visible[os.getpid() % len(visible)]  # spreads processes that are started one after the other
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return ClaimedDevice("cuda:0", gpu, lock)


def visible_gpus() -> list[str]:
    """The UUIDs of this machine's NVIDIA devices, without those that CUDA_VISIBLE_DEVICES hides.

    nvidia-smi lists them, because asking torch would start CUDA with every device. Without nvidia-smi, what
    CUDA_VISIBLE_DEVICES lists is believed. nvidia-smi does not list MIG slices, so name them there.
    """
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    pairs = (line.split(",") for line in nvidia_smi("index", "uuid") or [] if line.count(",") == 1)
    listed = {index.strip(): uuid.strip() for index, uuid in pairs}
    if allowed is None:
        return list(listed.values())
    # An index or a UUID (CUDA also takes a unique beginning of one); CUDA stops at the first invalid entry.
    visible = []
    for entry in allowed.split(","):
        name = entry.strip()
        uuid = listed.get(name) or next((gpu for gpu in listed.values() if name and gpu.startswith(name)), None)
        if uuid is None:
            if listed and not name.startswith("MIG-"):
                break
            uuid = name
        if not uuid or uuid == "-1":
            break
        visible.append(uuid)
    return visible


def _lock_dir() -> Path:
    """/run/lock, which all users share and a boot empties; else the folder for temporary files."""
    shared = Path("/run/lock")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _first_free(gpus: Sequence[str], folder: Path) -> tuple[IO[str] | None, str | None]:
    for gpu in gpus:
        lock = _open(_lock_path(folder, gpu))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock, gpu
    return None, None


def _open(path: Path) -> IO[str]:
    """Open a lock file, which is created writable for every user so that two users can share a machine."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # First without O_CREAT: with it, Linux refuses another user's file in a sticky folder such as /tmp
        # (fs.protected_regular).
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
    if os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, 0o666)  # past the umask
    return os.fdopen(descriptor, "r+", encoding="ascii")


def _holder(folder: Path, gpu: str) -> str:
    try:
        return _lock_path(folder, gpu).read_text(encoding="ascii").strip() or "unknown"
    except OSError:
        return "unknown"


def _lock_path(folder: Path, gpu: str) -> Path:
    return folder / f"chunkmill-gpu-{gpu.replace('/', '_')}.lock"
