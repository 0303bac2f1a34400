"""Starts this pod's ranks of a training, or of preflight, in a PyTorchJob: Aliyun DLC, or Kubernetes with Kubeflow.

Every pod runs the same command; its place comes from the environment alone: WORLD_SIZE (number of pods), RANK (index
of this pod), MASTER_ADDR, MASTER_PORT, and KUBERNETES_CONTAINER_RESOURCE_GPU (ranks in each pod). The guide's
NCCL settings are set where the environment has none; an empty variable leaves one to NCCL. See docs/dlc.md.

The exit code is that of the first rank that fails, else the ranks' own: 0 finished, 75 saved to go on.
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
        help=f"ranks in each pod (default: {GPUS}, and one where that is 0)",
    )
    parser.add_argument("script", choices=["train_model.py", "preflight.py"], help="what each rank runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args()


def check_gpus(processes: int) -> None:
    """Refuses a pod whose GPUs torch does not see: it would train on the CPUs without a word.

    Raises:
        UserError: There are fewer than the environment says.
    """
    import torch

    found = torch.cuda.device_count()
    if found < processes:
        raise UserError(
            f"{GPUS}={processes}, but torch sees {found} GPUs",
            found=f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
            fix="take an image with this GPU's driver and a CUDA build of torch; on CPUs give --processes",
        )


def main() -> int:
    """Runs the pod's ranks."""
    arguments = parse_arguments()
    if arguments.processes is not None and arguments.processes < 1:
        raise UserError("--processes cannot be used", found=arguments.processes, expected="a number from 1")
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
