"""What a profile of ``chunkmill tune`` changes in a worker: threads and ChunkBatches at a time of the process, and
backend, number format and token budget of each engine."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from chunkmill.errors import ChunkmillError, InvalidSetting, ModelLoadError
from chunkmill.machine import Machine, cores, this_machine
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.settings import Settings
from chunkmill.tuning.profiles import AGAIN, ProfileLookup, find_profile, memory_folder, with_profile

if TYPE_CHECKING:  # torch comes with it, and `use_threads` before torch
    from chunkmill_workers.engine.engine import Engine

logger = logging.getLogger(__name__)


def machine_for(device: str) -> Machine:
    """This machine, as a worker on ``device`` (``cpu`` or ``cuda:<index>``, after the claim) uses it."""
    if device == "cpu":
        return this_machine()
    import torch  # the claim is made; a CPU worker sets its threads before it gets here

    return this_machine(torch.cuda.get_device_name(device))


def process_settings(settings: Settings, device: str) -> Settings:
    """``settings`` with what holds for the whole process: threads, and ChunkBatches at a time.

    Both are the default model's profile's where the settings leave them open. A model that cannot be read has no
    profile here, and an error of its own when it is loaded.
    """
    try:
        folder = resolve_model(
            settings.embedding_model,
            pooling=settings.embedding_pooling,
            precision=settings.embedding_precision,
            trust=settings.trust,
        )
        found = find_profile(settings, folder.spec, machine_for(device))
    except InvalidSetting:
        raise
    except ChunkmillError:
        found = ProfileLookup(None)
    chosen = with_profile(settings, found.profile)
    changes = {
        "embedding_threads": chosen.embedding_threads or stated_threads() or cores(),
        "embedding_parallel_batches": chosen.embedding_parallel_batches,
    }
    return settings.model_copy(update=changes)


def stated_threads() -> int:
    """OMP_NUM_THREADS, for all of OpenMP; 0 where it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(first) if first.isdigit() else 0


def thread_variables(count: int, device: str) -> dict[str, str]:
    """The environment of a process whose torch uses ``count`` threads, and on a CPU the tokenizer as many.

    Beside a GPU the tokenizer keeps its own choice, all logical CPUs. Threads are not pinned with OMP_PROC_BIND:
    it binds the process's first thread to one core, which every thread that is started later inherits
    (docs/decisions/0012).
    """
    return {"OMP_NUM_THREADS": str(count)} | ({"RAYON_NUM_THREADS": str(count)} if device == "cpu" else {})


def use_threads(count: int, device: str) -> None:
    """For this process, what it does not state itself. Best before torch is imported: OpenMP looks once."""
    for name, value in thread_variables(count, device).items():
        os.environ.setdefault(name, value)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)


def load_engine(settings: Settings, folder: ModelFolder, device: str, machine: Machine) -> Engine:
    """An engine as the model's profile says, if it has one that fits, and as the settings say otherwise.

    Raises what ``Engine.load`` raises.
    """
    found = find_profile(settings, folder.spec, machine)
    if found.problem is not None:
        level = logging.INFO if found.overridden else logging.WARNING
        logger.log(level, "the profile %s is left out: %s", found.path, found.problem)
    if found.profile is None:
        return _load(settings, folder, device)
    logger.info("%s: by its profile %s", folder.name, found.profile)
    try:
        return _load(with_profile(settings, found.profile), folder, device)
    except (InvalidSetting, ModelLoadError) as error:
        # An export that is gone, say. The settings alone may do; if not, their error is the one to mend.
        logger.warning("the profile %s cannot be followed: %s. Going on without it; %s", found.path, error, AGAIN)
        return _load(settings, folder, device)


def _load(settings: Settings, folder: ModelFolder, device: str) -> Engine:
    from chunkmill_workers.engine.engine import Engine

    return Engine.load(
        folder,
        device=device,
        dtype=settings.embedding_dtype,
        batch_tokens=settings.embedding_batch_tokens or None,
        precision=folder.spec.precision,
        backend=settings.embedding_backend,
        learned=memory_folder(settings),
        threads=settings.embedding_threads or None,
    )
