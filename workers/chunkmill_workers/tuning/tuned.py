"""Applies a profile of ``chunkmill tune`` to a worker: the process's threads and number of parallel ChunkBatches, and
each engine's backend, number format and TokenBatch size."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chunkmill.errors import ChunkmillError, InvalidSetting, ModelLoadError
from chunkmill.machine import Machine, cores, this_machine
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.settings import Settings
from chunkmill.tuning.profiles import AGAIN, ProfileLookup, find_profile, memory_folder, with_profile

if TYPE_CHECKING:  # it imports torch, and `use_threads` comes before torch
    from chunkmill_workers.engine.engine import Engine

logger = logging.getLogger(__name__)


def machine_for(device: str) -> Machine:
    """This machine, as a worker on ``device`` (``cpu`` or ``cuda:<index>``, after the claim) uses it."""
    if device == "cpu":
        return this_machine()
    import torch  # the device is claimed by now; a CPU worker does not get here

    return this_machine(torch.cuda.get_device_name(device))


def process_settings(settings: Settings, device: str) -> Settings:
    """``settings`` with the values of the whole process: threads, and ChunkBatches at a time.

    The default model's profile gives both if the settings leave them open. A model that cannot be read has no profile
    here; its error is raised when it is loaded.
    """
    try:
        folder = resolve_model(
            settings.embedding_model,
            pooling=settings.embedding_pooling,
            precision=settings.embedding_precision,
            trust=settings.trust,
        )
        lookup = find_profile(settings, folder.spec, machine_for(device))
    except InvalidSetting:
        raise
    except ChunkmillError:
        lookup = ProfileLookup(None)
    chosen = with_profile(settings, lookup.profile)
    changes = {
        "embedding_threads": chosen.embedding_threads or stated_threads() or cores(),
        "embedding_parallel_batches": chosen.embedding_parallel_batches,
    }
    return settings.model_copy(update=changes)


def stated_threads() -> int:
    """OMP_NUM_THREADS, the number for all of OpenMP; 0 if it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(first) if first.isdigit() else 0


def thread_variables(count: int, device: str) -> dict[str, str]:
    """The environment of a process whose torch uses ``count`` threads. On a CPU its tokenizer uses as many.

    Beside a GPU the tokenizer makes its own choice, which is all logical CPUs. OMP_PROC_BIND is not used: it would bind
    the process's first thread to one core, and every later thread would inherit that (docs/decisions/0012).
    """
    return {"OMP_NUM_THREADS": str(count)} | ({"RAYON_NUM_THREADS": str(count)} if device == "cpu" else {})


def use_threads(count: int, device: str) -> None:
    """Set the threads of this process, unless its environment does. Call it before torch: OpenMP reads them once."""
    for name, value in thread_variables(count, device).items():
        os.environ.setdefault(name, value)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)


def load_engine(settings: Settings, folder: ModelFolder, device: str, machine: Machine) -> Engine:
    """Load an engine as the model's profile says, if it has one that fits, and as the settings say otherwise.

    Raises what ``Engine.load`` raises.
    """
    lookup = find_profile(settings, folder.spec, machine)
    if lookup.problem is not None:
        level = logging.INFO if lookup.overridden else logging.WARNING
        logger.log(level, "the profile %s is left out: %s", lookup.path, lookup.problem)
    # A number that the operator states holds over one that was learned. A profile's does not.
    learned = None if settings.embedding_batch_tokens else memory_folder(settings)
    if lookup.profile is None:
        return _load(settings, folder, device, learned)
    logger.info("%s: by its profile %s", folder.name, lookup.profile)
    try:
        return _load(with_profile(settings, lookup.profile), folder, device, learned)
    except (InvalidSetting, ModelLoadError) as error:
        # An export may be missing, for example. If the settings alone fail too, their error is the one to fix.
        logger.warning("the profile %s cannot be followed: %s. Going on without it; %s", lookup.path, error, AGAIN)
        return _load(settings, folder, device, learned)


def _load(settings: Settings, folder: ModelFolder, device: str, learned: Path | None) -> Engine:
    from chunkmill_workers.engine.engine import Engine

    return Engine.load(
        folder,
        device=device,
        dtype=settings.embedding_dtype,
        batch_tokens=settings.embedding_batch_tokens or None,
        precision=folder.spec.precision,
        backend=settings.embedding_backend,
        learned=learned,
        threads=settings.embedding_threads or None,
    )
