"""Models: from a name to a folder, and from the folder's files to the embedding space of its vectors.

Standard library only: a producer reads the space of a model here without torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from app.domain.spaces import OnLong, Pooling, SpaceSpec, long_text_for
from app.models.folder import PROVIDER, DenseLayer, ModelFolder, check_pooling, read_folder
from app.models.locate import DEFAULT_MODEL, DEFAULT_NAMES, bundled_folder, locate_folder

__all__ = ["DEFAULT_MODEL", "DEFAULT_SPEC", "DenseLayer", "ModelFolder", "resolve_model", "resolve_spec"]

# What reading the package's folder gives (tests/unit/test_models.py holds the two equal), so that a
# producer without the worker's packages knows the default space too.
DEFAULT_SPEC: Final = SpaceSpec(
    provider=PROVIDER,
    model=DEFAULT_MODEL,
    revision="sha256:508661683600909917412bc80bd55be3",
    dimensions=384,
    max_tokens=256,
    pooling=Pooling.MEAN,
    normalize=True,
)


def resolve_model(
    name: str, *, pooling: str | None = None, on_long: OnLong = OnLong.TRUNCATE, download: bool = False
) -> ModelFolder:
    """Find a model and read it. ``name`` is ``all-MiniLM-L6-v2``, a folder, or ``org/name@revision``.

    ``pooling`` is for a plain transformers folder, which does not state its own. ``download=True`` fetches
    a Hugging Face model that is not on this machine yet; without it nothing here uses the network.
    Raises UnknownModel, saying what to do.
    """
    label = DEFAULT_MODEL if name in DEFAULT_NAMES else name
    return read_folder(label, locate_folder(name, download=download), pooling=pooling, on_long=on_long)


def resolve_spec(name: str, *, pooling: str | None = None, on_long: OnLong = OnLong.TRUNCATE) -> SpaceSpec:
    """The space of a model; of the default one also where the worker's packages are not installed."""
    if name in DEFAULT_NAMES and bundled_folder() is None:
        check_pooling(name, DEFAULT_SPEC.pooling, pooling)
        return replace(DEFAULT_SPEC, long_text=long_text_for(on_long))
    return resolve_model(name, pooling=pooling, on_long=on_long).spec
