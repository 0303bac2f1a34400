"""Pods of a PyTorchJob, simulated by processes on this host: together they train the same as one machine."""

from __future__ import annotations

import os

import pytest

import tiny_run
from pods import exit_codes, start_pods
from snaketune.training.pods import DEFAULTS, set_network_defaults

pytestmark = pytest.mark.slow

FLAGS = ("--max-steps", 12, "--save-steps", 4, "--lr", 5e-3)
POD = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_two_pods_stopped_and_started_again_train_to_what_one_machine_trains(tmp_path):
    world = tiny_run.make_world(tmp_path, documents=60)
    config, folder = tiny_run.render(world, "run.py", *FLAGS), world / "pods"
    log, command = world / "pods.log", ("train_model.py", config, "--work-dir", folder)
    pods = start_pods(log, *command)
    tiny_run.wait_for_step(pods[0], folder, 6)
    pods[1].terminate()  # one pod gets SIGTERM: both save and exit
    assert exit_codes(pods) == [75, 75], tiny_run.log(folder)[-3000:]
    assert exit_codes(start_pods(log, *command)) == [0, 0], tiny_run.log(folder)[-3000:]
    tiny_run.train(config, world / "one", processes=2)
    assert tiny_run.curve(folder) == tiny_run.curve(world / "one")
    assert tiny_run.weights_sha256(folder) == tiny_run.weights_sha256(world / "one")


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        ({"MASTER_PORT": None}, (), ["incomplete: MASTER_PORT missing", "RANK=1", "docs/dlc.md"]),
        ({"KUBERNETES_CONTAINER_RESOURCE_GPU": None}, (), ["RESOURCE_GPU missing", "pass --processes"]),
        (
            dict.fromkeys((*POD, "KUBERNETES_CONTAINER_RESOURCE_GPU")),
            (),
            ["not set", "train_model.py --processes"],
        ),
        (
            {"RANK": "2"},
            (),
            ["invalid environment variable RANK", "found:    2", "from 0 to 1 (WORLD_SIZE=2)"],
        ),
        ({"WORLD_SIZE": "two"}, (), ["invalid environment variable WORLD_SIZE", "the number of pods"]),
        ({"KUBERNETES_CONTAINER_RESOURCE_GPU": "512"}, (), ["RESOURCE_GPU=512, but torch sees"]),
        ({}, ("--processes", 0), ["invalid --processes"]),
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
