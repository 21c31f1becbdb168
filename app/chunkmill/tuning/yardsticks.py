"""What `chunkmill tune` measured on this machine, for models of the table of known ones."""

from __future__ import annotations

from typing import Final

from chunkmill.errors import EmbeddedStackError
from chunkmill.machine import gpu_names, this_machine, versions
from chunkmill.models.known import find_known
from chunkmill.settings import Settings
from chunkmill.tuning.presets import Yardstick
from chunkmill.tuning.profiles import Profile, read_profile, refusal, tuning_folder

_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def yardsticks(settings: Settings) -> list[Yardstick]:
    """One for each known model with a profile that holds for this machine and the installed versions.

    Profiles of models that the table does not have, of another machine, or that cannot be read are left out.
    """
    try:
        folder = tuning_folder(settings) / "profiles"
    except EmbeddedStackError:
        return []  # without a home, nothing was ever measured
    best: dict[str, Yardstick] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            profile = read_profile(file)
        except (OSError, ValueError):
            continue  # a worker that would use it says so
        measured = _yardstick(profile)
        if measured is None:
            continue
        known = best.get(measured.model.name)
        if known is None or measured.tokens_per_second > known.tokens_per_second:
            best[measured.model.name] = measured
    return list(best.values())


def _yardstick(profile: Profile) -> Yardstick | None:
    model, measured, gpu = find_known(profile.model), profile.measured, profile.machine.gpu
    if model is None or (gpu is not None and gpu not in gpu_names()):
        return None
    if refusal(profile, profile.fingerprint, this_machine(gpu), versions()) is not None:
        return None
    if measured.tokens_per_second is None or measured.latency_ms is None or measured.peak_mib is None:
        return None
    return Yardstick(
        model, measured.tokens_per_second, measured.latency_ms, measured.peak_mib, _BYTES[profile.setup.dtype]
    )
