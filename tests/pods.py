"""Simulates two pods of a PyTorchJob with two processes on this host."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from snaketune.training.launch import free_port
from warm import PARENT
from warm_client import WarmProcess

LAUNCHER = Path(__file__).parents[1] / "workflow_scripts" / "launch_dlc.py"


def start_pods(
    log: Path, *command: object, cwd: Path | None = None, **variables: object
) -> list[WarmProcess]:
    """Starts two pods with one rank each, which know their place only from the environment."""
    port, pods = free_port(), []
    for index in range(2):
        own = {"WORLD_SIZE": 2, "RANK": index, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
        own |= {"KUBERNETES_CONTAINER_RESOURCE_GPU": 0, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        with open(log, "ab") as output:
            pods.append(
                PARENT.start(
                    [LAUNCHER, *command],
                    env=environment,
                    stdout=output.fileno(),
                    stderr=output.fileno(),
                    start_new_session=True,
                    cwd=cwd,
                )
            )
    return pods


def exit_codes(pods: list[WarmProcess]) -> list[int]:
    """Waits for the pods and returns their exit codes. Kills those that time out."""
    try:
        return [pod.wait(timeout=300) for pod in pods]
    finally:
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
