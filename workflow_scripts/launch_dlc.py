"""Starts this pod's ranks of a training, or of preflight, in a PyTorchJob: Aliyun DLC, or Kubernetes with Kubeflow.

Every pod runs the same command and reads its place from the environment: WORLD_SIZE (number of pods), RANK
(index of this pod), MASTER_ADDR, MASTER_PORT, and KUBERNETES_CONTAINER_RESOURCE_GPU (ranks per pod). Sets the
guide's NCCL settings unless the environment has them; set a variable to an empty string to use NCCL's
default. See docs/dlc.md.

The exit code is that of the first rank that fails, else that of all ranks: 0 finished, 75 saved, start again
to resume.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from sft import import_for_training
from snaketune.common.cli import UserError, run
from snaketune.training.early_stop import STARTED
from snaketune.training.launch import run_ranks
from snaketune.training.pods import GPUS, read_pod, set_network_defaults


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--processes",
        type=int,
        help=f"ranks per pod (default: {GPUS}, or 1 if that is 0)",
    )
    parser.add_argument(
        "script", choices=["train_model.py", "preflight.py"], help="script that each rank runs"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser.parse_args()


def check_gpus(processes: int) -> None:
    """Refuses a pod if torch does not see its GPUs. It would silently train on the CPUs.

    Raises:
        UserError: torch sees fewer GPUs than the environment promises.
    """
    import torch

    found = torch.cuda.device_count()
    if found < processes:
        raise UserError(
            f"{GPUS}={processes}, but torch sees {found} GPUs",
            found=f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
            fix="use an image with this GPU's driver and a CUDA build of torch; to train on CPUs, pass --processes",
        )


def main() -> int:
    """Runs the pod's ranks."""
    arguments = parse_arguments()
    if arguments.processes is not None and arguments.processes < 1:
        raise UserError("invalid --processes", found=arguments.processes, expected="1 or more")
    pod = read_pod(os.environ, arguments.processes)
    if arguments.processes is None and os.environ[GPUS] != "0":
        check_gpus(pod.processes)
    set_network_defaults(os.environ)
    os.environ.setdefault(STARTED, str(time.time()))
    print(
        f"Pod {pod.index} of {pod.pods}: {pod.processes} ranks, meeting at {pod.master[0]}:{pod.master[1]}",
        flush=True,
    )
    script = Path(__file__).with_name(arguments.script)
    command = [sys.executable, str(script), *arguments.arguments, "--launcher", "pytorch"]
    if arguments.script == "train_model.py":
        import_for_training()
    return run_ranks(command, pod.processes, pod.pods, pod.index, pod.master)


if __name__ == "__main__":
    run(main)
