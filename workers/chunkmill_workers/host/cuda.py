"""Whether torch can use this machine's GPU, asked before anything else touches CUDA.

``python -m chunkmill_workers.host.cuda`` prints why not. `chunkmill doctor` runs it, because it does not import torch.
"""

from __future__ import annotations

import re
import warnings

from chunkmill.errors import DeviceUnavailable
from chunkmill.machine import nvidia_smi


def require_cuda() -> None:
    """Raise DeviceUnavailable, which no restart fixes, unless torch can compute on the first GPU that it sees."""
    if (problem := cuda_problem()) is not None:
        raise DeviceUnavailable(f"{problem}. To use the CPU meanwhile, set EMBEDDING_DEVICE=cpu")


def cuda_problem() -> str | None:
    """Why torch cannot compute on the first GPU that it sees, and what to do; None if it can."""
    import torch

    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA: install a build "
            "of torch for CUDA in the same environment"
        )
    needs = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver, and the sentence below says it
        usable = torch.cuda.is_available()
    if not usable:
        driver = next(iter(nvidia_smi("driver_version") or []), "unknown")
        return (
            f"{needs} and cannot use the NVIDIA driver of this machine (version {driver}): update the driver, or "
            "install a build of torch for an older CUDA. If both fit, check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    capability = torch.cuda.get_device_capability(0)
    built_for = torch.cuda.get_arch_list()
    if not runs_on(capability, built_for):
        return (
            f"{needs} and has no code for {torch.cuda.get_device_name(0)} (sm_{capability[0]}{capability[1]}; it has "
            f"{', '.join(built_for)}): install a build of torch that has, or use another GPU"
        )
    try:
        torch.ones(1, device="cuda:0").sum().item()
    except RuntimeError as error:
        return (
            f"torch {torch.__version__} sees the GPU but cannot compute on it ({str(error).splitlines()[0]}): check "
            "nvidia-smi, and restart the machine if the GPU was lost"
        )
    return None


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code for the architectures ``built_for`` runs on a GPU of ``capability``; True if there is no list.

    ``sm_86`` is machine code, for GPUs of the same major and no lower minor. ``compute_80`` is compiled by the driver,
    for every later GPU.
    """
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        made = int(match[2]), int(match[3])
        if made <= capability and (match[1] == "compute" or made[0] == capability[0]):
            return True
    return not built_for


if __name__ == "__main__":
    print(cuda_problem() or "")
