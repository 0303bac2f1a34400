"""Pods of a PyTorchJob, played by processes on this host: they train together to what one machine trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_run
from sft.launch import free_port
from sft.pods import DEFAULTS, set_network_defaults

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "launch_dlc.py"
FLAGS = ("--max-steps", 12, "--save-steps", 4, "--lr", 5e-3)
POD = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def start_pods(config: Path, work_dir: Path) -> list[subprocess.Popen]:
    """Starts two pods of one rank; each has nothing but its environment to tell it who it is."""
    port, pods = free_port(), []
    for index in range(2):
        own = {"WORLD_SIZE": 2, "RANK": index, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"KUBERNETES_CONTAINER_RESOURCE_GPU": 0, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, SCRIPT, "train_model.py", config, "--work-dir", work_dir]
        with open(work_dir.with_name(f"{work_dir.name}.log"), "ab") as log:
            pods.append(
                subprocess.Popen(
                    [*map(str, command)], env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
    return pods


def codes(pods: list[subprocess.Popen]) -> list[int]:
    try:
        return [pod.wait(timeout=300) for pod in pods]
    finally:
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)


def test_two_pods_stopped_and_started_again_train_to_what_one_machine_trains(tmp_path):
    world = tiny_run.make_world(tmp_path, documents=60)
    config, folder = tiny_run.render(world, "run.py", *FLAGS), world / "pods"
    pods = start_pods(config, folder)
    tiny_run.wait_for_step(pods[0], folder, 6)
    pods[1].terminate()  # one pod is told to go: both save and end
    assert codes(pods) == [75, 75], tiny_run.log(folder)[-3000:]
    assert codes(start_pods(config, folder)) == [0, 0], tiny_run.log(folder)[-3000:]
    tiny_run.train(config, world / "one", processes=2)
    assert tiny_run.curve(folder) == tiny_run.curve(world / "one")
    assert tiny_run.weights_sha256(folder) == tiny_run.weights_sha256(world / "one")


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        ({"MASTER_PORT": None}, (), ["half set: MASTER_PORT missing", "RANK=1", "docs/dlc.md"]),
        ({"KUBERNETES_CONTAINER_RESOURCE_GPU": None}, (), ["RESOURCE_GPU missing", "give --processes"]),
        (
            dict.fromkeys((*POD, "KUBERNETES_CONTAINER_RESOURCE_GPU")),
            (),
            ["not set", "train_model.py --processes"],
        ),
        ({"RANK": "2"}, (), ["RANK cannot be used", "found:    2", "from 0 to 1 (WORLD_SIZE=2)"]),
        ({"WORLD_SIZE": "two"}, (), ["WORLD_SIZE cannot be used", "the number of pods"]),
        ({"KUBERNETES_CONTAINER_RESOURCE_GPU": "512"}, (), ["RESOURCE_GPU=512, but torch sees"]),
        ({}, ("--processes", 0), ["--processes cannot be used"]),
    ],
)
def test_an_environment_that_is_half_set_is_refused(run_script, change, flags, words):
    environment = {**os.environ, **POD, "KUBERNETES_CONTAINER_RESOURCE_GPU": "0", **change}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = run_script("launch_dlc.py", *flags, "train_model.py", "no.py", check=False, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_failing_rank_ends_its_pod_with_its_code(run_script):
    environment = {**os.environ, **POD, "KUBERNETES_CONTAINER_RESOURCE_GPU": "0"}
    done = run_script("launch_dlc.py", "train_model.py", "no.py", check=False, env=environment)
    assert done.returncode == 2
    assert "no.py" in done.stderr and "Rank 1 ended with code 2" in done.stderr


def test_the_guides_settings_yield_to_the_environment(repo_root):
    guide = (repo_root / "docs" / "dlc.md").read_text(encoding="utf-8")
    assert all(f"{name}={value}" in guide for name, value in DEFAULTS.items())
    environment = {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": ""}
    set_network_defaults(environment)
    assert environment["NCCL_DEBUG"] == "WARN"
    assert "NCCL_SOCKET_IFNAME" not in environment
    assert environment["NCCL_IB_GID_INDEX"] == "3"
