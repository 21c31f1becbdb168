"""Loads a model folder with transformers, on the CPU. No weight stays random, and no code runs that is not trusted."""

from __future__ import annotations

import os
from typing import Any

import torch

from chunkmill.errors import ModelLoadError
from chunkmill.models import ModelFolder
from chunkmill.models.files import read_json
from chunkmill.models.transformer import ENCODERS_OF_T5
from chunkmill.models.weights import n_elements, weight_files

# With the package `kernels`, some architectures would fetch compiled code from the Hugging Face Hub.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

_SLACK = 2**27
"""How many numbers a model may have besides those in its files: tables of positions and masks, half a gigabyte."""


def load_model(folder: ModelFolder, *, dtype: torch.dtype | None = None) -> Any:
    """The transformer in ``folder``, in ``dtype``; None keeps the number format of its files.

    Code in the folder is run, and a pickle is read (only its tensors), only if the operator trusts this model by its
    name. Raises ModelLoadError.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # the output is a worker's log
    try:
        kind = _class_of(folder)
        if not folder.remote_code and not folder.pickle:
            _require_stored(folder, kind)
        model, info = kind.from_pretrained(
            str(folder.transformer),
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=folder.remote_code,
            use_safetensors=not folder.pickle,
            # Without this, transformers raises "look at the above report". The message below names the tensors.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"the model in {folder.transformer} cannot be loaded ({type(error).__name__}: {error}): "
            "check that the folder is complete and that transformers knows the architecture"
        ) from error
    # transformers fills tensors that a file lacks with random numbers. Only BERT's pooler is allowed to be missing: it
    # often is, and the vectors do not depend on it.
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise ModelLoadError(
            f"the weights in {folder.transformer} lack {len(missing)} tensors that its config.json asks for, "
            f"{missing[0]} first: copy the folder again"
        )
    # transformers before 5 gives the names alone, and later releases the shapes beside them.
    if wrong := sorted(key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys") or ()):
        raise ModelLoadError(
            f"{len(wrong)} tensors in {folder.transformer} do not have the shapes that its config.json states, "
            f"{wrong[0]} first: copy the folder again"
        )
    return model.eval()


def _class_of(folder: ModelFolder) -> Any:
    """The class of transformers that loads the model. Raises ModelLoadError if this release lacks the architecture."""
    import transformers

    kind = read_json(folder.transformer / "config.json").get("model_type")
    if not folder.remote_code and kind not in transformers.CONFIG_MAPPING:
        raise ModelLoadError(
            f"the model in {folder.transformer} has the architecture {kind}, which transformers "
            f"{transformers.__version__} does not have: install a newer transformers, or choose another model"
        )
    return getattr(transformers, ENCODERS_OF_T5.get(kind, "AutoModel"))


def _require_stored(folder: ModelFolder, kind: Any) -> None:
    """Raise ModelLoadError if config.json asks for much more than the files hold, because transformers makes up the
    rest, whatever its size. Without memory for it a worker would be killed."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder.transformer), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False) if hasattr(kind, "from_config") else kind(config)
    asked = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    held = n_elements(weight_files(folder.name, folder.transformer, pickle=False))
    if asked > 2 * held + _SLACK:
        raise ModelLoadError(
            f"config.json in {folder.transformer} asks for {asked:,} numbers, and the weights hold {held:,}, so they "
            "belong to two models: copy the folder again"
        )
