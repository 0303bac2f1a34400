"""Reads a pod's ranks in a PyTorchJob (Aliyun DLC, Kubeflow), and sets NCCL defaults for DLC's network."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from snaketune.common.cli import UserError

GPUS = "KUBERNETES_CONTAINER_RESOURCE_GPU"
_NEEDED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")

# From step 5 of the guide. bond0 and mlx5 are DLC's network devices.
DEFAULTS = {
    "NCCL_IB_TC": "136",
    "NCCL_IB_SL": "5",
    "NCCL_IB_GID_INDEX": "3",
    "NCCL_SOCKET_IFNAME": "bond0",
    "NCCL_DEBUG": "INFO",
    "NCCL_IB_HCA": "mlx5",
    "NCCL_IB_TIMEOUT": "22",
    "NCCL_IB_QPS_PER_CONNECTION": "8",
    "NCCL_NET_PLUGIN": "none",
    "NCCL_BUFFSIZE": "2097152",
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
}


@dataclass(frozen=True)
class Pod:
    """A pod's place in its job.

    Attributes:
        pods: Number of pods.
        index: Index of this pod, from 0.
        processes: Ranks per pod.
        master: Host and port where the ranks meet: pod 0.
    """

    pods: int
    index: int
    processes: int
    master: tuple[str, int]


def read_pod(environment: Mapping[str, str], processes: int | None = None) -> Pod:
    """Reads a pod's place in its job from the environment.

    Args:
        environment: WORLD_SIZE (pods, not ranks), RANK (this pod), MASTER_ADDR, MASTER_PORT and, for the
            number of ranks per pod, KUBERNETES_CONTAINER_RESOURCE_GPU; 0 GPUs means one rank on CPUs.
        processes: Ranks per pod, overriding the number of GPUs.

    Raises:
        UserError: A variable is missing or invalid.
    """
    needed = (*_NEEDED, GPUS) if processes is None else _NEEDED
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        there = [f"{name}={environment[name]}" for name in needed if environment.get(name)]
        raise UserError(
            f"the environment of a pod is {'incomplete' if there else 'not set'}: {', '.join(missing)} missing",
            found=", ".join(there) or "none of these variables",
            expected=", ".join(needed),
            fix=f"on pods without GPUs, pass --processes instead of setting {GPUS}"
            if missing == [GPUS]
            else "use a PyTorchJob, which sets them (docs/dlc.md); on one machine, train_model.py --processes",
        )
    pods = _number(environment, "WORLD_SIZE", 1, "the number of pods, at least 1")
    if processes is None:
        processes = max(1, _number(environment, GPUS, 0, "the number of GPUs of a pod, at least 0"))
    return Pod(
        pods,
        _number(
            environment,
            "RANK",
            0,
            f"the index of this pod, from 0 to {pods - 1} (WORLD_SIZE={pods})",
            pods - 1,
        ),
        processes,
        (environment["MASTER_ADDR"], _number(environment, "MASTER_PORT", 1, "a port from 1 to 65535", 65535)),
    )


def _number(
    environment: Mapping[str, str], name: str, least: int, expected: str, most: int | None = None
) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        raise UserError(f"invalid environment variable {name}", found=text, expected=expected)
    return int(text)


def set_network_defaults(environment: MutableMapping[str, str]) -> None:
    """Sets the guide's variables unless the environment already has them. Removes empty ones."""
    for name, value in DEFAULTS.items():
        if environment.setdefault(name, value) == "":
            del environment[name]
