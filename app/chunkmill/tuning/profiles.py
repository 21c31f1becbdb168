"""Profiles: what ``chunkmill tune`` measured for one model on one machine, stored for the workers of that machine.

``<home>/tuning/profiles`` has a file for each machine and model. ``<home>/tuning/memory`` has what engines learned when
a device ran out of memory (``chunkmill_workers.engine.token_limit``). Home is CHUNKMILL_HOME or the user's data
folder.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from chunkmill.domain.spaces import SpaceSpec
from chunkmill.embedded.paths import default_home
from chunkmill.errors import ChunkmillError, EmbeddedStackError, InvalidSetting
from chunkmill.machine import Machine, versions
from chunkmill.models.files import MOST_JSON_BYTES, parse_json
from chunkmill.settings import Settings
from chunkmill.system.files import read_at_most
from chunkmill.tuning.choose import SHORT, Constraints, Setup, SetupMeasurement

logger = logging.getLogger(__name__)

FORMAT: Final = 1
AGAIN: Final = "run `chunkmill tune` again"
_RUNTIMES: Final = {"onnx": "onnxruntime", "openvino": "openvino"}


@dataclass(frozen=True, slots=True)
class Profile:
    """The winner of one tuning, and everything that it depends on."""

    model: str
    fingerprint: str
    """The fingerprint of the model's full vectors, which includes the precision."""
    setup: Setup
    measured: SetupMeasurement
    constraints: Constraints
    machine: Machine
    versions: dict[str, str]
    made_at: str
    format: int = FORMAT

    def __str__(self) -> str:
        setup, speed = self.setup, self.measured.tokens_per_second or 0
        return (
            f"{setup.kind}, {setup.batch_tokens:,} tokens in a pass, {speed:,.0f} tokens/s, made on {self.made_at[:10]}"
        )


@dataclass(frozen=True, slots=True)
class ProfileLookup:
    """The result of looking for a model's profile on a machine."""

    path: Path | None
    """Where the profile is or would be; None if EMBEDDING_PROFILE is off."""
    profile: Profile | None = None
    """The profile to use."""
    problem: str | None = None
    """Why the profile at ``path`` is not used."""
    overridden: bool = False
    """Whether the profile is valid, but the settings ask for something else."""


def tuning_folder(settings: Settings) -> Path:
    """Raises :class:`EmbeddedStackError` if the user has no home directory and CHUNKMILL_HOME is not set."""
    return (settings.chunkmill_home or default_home()).expanduser() / "tuning"


def memory_folder(settings: Settings) -> Path | None:
    """Where engines store how many tokens fitted into the memory: see ``Engine.load(learned=...)``. None if the user
    has no home directory."""
    try:
        return tuning_folder(settings) / "memory"
    except EmbeddedStackError:
        return None


def memory_limit(settings: Settings, fingerprint: str, setup: Setup) -> tuple[Path, int] | None:
    """The file and the number of tokens that an engine learned to fit, if that is less than the setup's tokens."""
    folder = memory_folder(settings)
    if folder is None:
        return None
    for file in sorted(folder.glob(f"*-{fingerprint[:16]}-{setup.backend}-{setup.dtype}.json")):
        try:
            tokens = int(parse_json(read_at_most(file, MOST_JSON_BYTES))["batch_tokens"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue  # the engine logs this, and ignores the file
        if tokens < setup.batch_tokens:
            return file, tokens
    return None


def profile_path(settings: Settings, fingerprint: str, machine: Machine) -> Path:
    return tuning_folder(settings) / "profiles" / f"{machine.slug}-{fingerprint[:16]}.json"


def find_profile(settings: Settings, spec: SpaceSpec, machine: Machine) -> ProfileLookup:
    """The profile that EMBEDDING_PROFILE selects for the model of ``spec`` on ``machine``.

    Raises InvalidSetting if it names a file that does not exist or is not a profile.
    """
    word = settings.embedding_profile
    if word == "off":
        return ProfileLookup(None)
    named = word != "auto"
    try:
        path = Path(word).expanduser() if named else profile_path(settings, spec.fingerprint, machine)
    except EmbeddedStackError:
        return ProfileLookup(None)  # `tune` could not have written one
    try:
        profile = read_profile(path)
    except FileNotFoundError:
        if named:
            raise InvalidSetting(
                f"EMBEDDING_PROFILE is {word}, but there is no such file. Set it to auto, off or the path of a profile"
            ) from None
        return ProfileLookup(path)
    except (OSError, ValueError) as error:
        if named:
            raise InvalidSetting(f"EMBEDDING_PROFILE is {word}: {error}. Set it to auto, off or another path") from None
        return ProfileLookup(path, problem=f"{error}: {AGAIN}")
    if problem := refusal(profile, spec.fingerprint, machine, versions()):
        return ProfileLookup(path, problem=problem)
    if problem := _overridden(profile.setup, settings):
        return ProfileLookup(path, problem=problem, overridden=True)
    return ProfileLookup(path, profile)


def refusal(profile: Profile, fingerprint: str, machine: Machine, installed: Mapping[str, str]) -> str | None:
    """Why a profile is not valid for this model, machine and versions; None if it is valid. Pure."""
    if profile.fingerprint != fingerprint:
        return f"it was made for the model {profile.model!r} with fingerprint {profile.fingerprint[:12]}: {AGAIN}"
    if profile.machine != machine:
        there, here = _described(profile.machine), _described(machine)
        return f"it was made on another machine ({there}), and this is {here}: {AGAIN}"
    wanted = ["chunkmill", "torch", *([_RUNTIMES[profile.setup.backend]] if profile.setup.backend in _RUNTIMES else [])]
    for package in wanted:
        then, now = profile.versions.get(package), installed.get(package)
        if _release(package, then) != _release(package, now):
            return f"it was made with {package} {then or 'absent'}, but {now or 'none'} is installed: {AGAIN}"
    return None


def with_profile(settings: Settings, profile: Profile | None) -> Settings:
    """The settings with the profile's values. A value that the settings state explicitly is kept."""
    if profile is None:
        return settings
    setup = profile.setup
    changes: dict[str, object] = {"embedding_backend": setup.backend, "embedding_dtype": setup.dtype}
    if settings.embedding_batch_tokens == 0:
        changes["embedding_batch_tokens"] = setup.batch_tokens
    if settings.embedding_threads == 0 and "OMP_NUM_THREADS" not in os.environ:
        changes["embedding_threads"] = setup.threads
    if "embedding_parallel_batches" not in settings.model_fields_set:
        changes["embedding_parallel_batches"] = setup.parallel_batches
    return settings.model_copy(update=changes)


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises OSError, or ValueError if the file is not a profile of this format."""
    text = read_at_most(path, MOST_JSON_BYTES)
    try:
        profile = TypeAdapter(Profile).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is not a profile ({where}: {first['msg']})") from None
    if profile.format != FORMAT:
        raise ValueError(f"{path} is a profile of another format ({profile.format} instead of {FORMAT})")
    setup = profile.setup
    if min(setup.batch_tokens, setup.threads, setup.parallel_batches) < 1:
        raise ValueError(f"{path} is not a profile (its setup contains a number below 1)")
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile completely or not at all. Raises :class:`ProfileNotWritten`."""
    write_whole(path, json.dumps(asdict(profile), indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file of the tuning folder completely or not at all. Raises :class:`ProfileNotWritten`."""
    try:
        path.parents[2].mkdir(
            mode=0o700, parents=True, exist_ok=True
        )  # the home, with the mode that the embedded stack uses
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(name).chmod(0o644)  # with mkstemp's 0600, a worker that runs as another user could not read it
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ProfileNotWritten(
            f"{path} cannot be written ({error.strerror}): make the folder writable, or set CHUNKMILL_HOME to another "
            "folder, also for the worker"
        ) from error


class ProfileNotWritten(ChunkmillError):
    code = "profile_not_written"


def _overridden(setup: Setup, settings: Settings) -> str | None:
    """Why the settings override the setup, or None. What is best for one backend and number format says little about
    another."""
    if settings.embedding_backend not in ("auto", setup.backend):
        return f"EMBEDDING_BACKEND is {settings.embedding_backend}, but the profile was measured with {setup.backend}"
    asked = SHORT.get(settings.embedding_dtype, settings.embedding_dtype)
    if asked not in ("auto", SHORT.get(setup.dtype, setup.dtype)):
        return f"EMBEDDING_DTYPE is {settings.embedding_dtype}, but the profile was measured in {setup.dtype}"
    return None


def _release(package: str, version: str | None) -> str | None:
    """The part of a version that matters: kernels of libraries change with a minor release, ours with every release."""
    if version is None or package == "chunkmill":
        return version
    return ".".join(version.split(".")[:2])


def _described(machine: Machine) -> str:
    where = f"{machine.gpu}, " if machine.gpu else ""
    return f"{where}{machine.cpu}, {machine.cores} cores, {' '.join(machine.features) or 'no known features'}"
