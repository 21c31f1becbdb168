"""From a model folder to transformers' model of it, on the CPU: nothing random, nothing run that should not be."""

from __future__ import annotations

from typing import Any

import torch

from chunkmill.errors import ModelLoadError
from chunkmill.models import ModelFolder


def load_model(folder: ModelFolder, *, dtype: torch.dtype | None = None) -> Any:
    """The transformer in ``folder``; ``dtype`` None keeps the number format of its files.

    Code in the folder is run, and a pickle read (its tensors alone), only where the folder says that the
    operator trusts them by name. Raises ModelLoadError.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # a worker's log is no terminal
    try:
        model, info = AutoModel.from_pretrained(
            str(folder.transformer),
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=folder.remote_code,
            use_safetensors=not folder.pickle,
            # transformers raises "look at the above report" otherwise; the message below names the tensors.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelLoadError(
            f"the model in {folder.transformer} cannot be loaded ({type(error).__name__}: {error}): "
            "check that the folder is whole and its architecture known to transformers"
        ) from error
    # transformers fills what a file lacks with random numbers. BERT's pooler is the one part that is
    # often missing and that no vector passes through.
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise ModelLoadError(
            f"the weights in {folder.transformer} lack {len(missing)} tensors that its config.json asks for, "
            f"{missing[0]} first: copy the folder again"
        )
    if wrong := sorted(info.get("mismatched_keys") or ()):
        raise ModelLoadError(
            f"{len(wrong)} tensors in {folder.transformer} have other shapes than its config.json states, "
            f"{wrong[0][0]} first: copy the folder again"
        )
    return model.eval()
