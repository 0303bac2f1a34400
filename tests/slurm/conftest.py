"""A real Slurm cluster for the session, and a small project whose trainings run on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from cluster import SlurmCluster, missing_programs
from drill_project import STEPS, Call, SlurmProject
from drills import DRILLS, LATER, mount_full_disk, start_drills

from opencompass_env import opencompass_python

NODE_MB = 64000  # a job that asks for all of a node's memory has the node to itself
_GREETINGS = [
    "hello",
    "how are you",
    "what is 12 * 7",
    "the weather in Shanghai",
    "tell me a story",
    "thank you",
]


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Six nodes of four processors, up as long as the session."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)} missing): `make test-slurm` as root installs it")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it
    cluster = SlurmCluster(folder, nodes=6, memory_mb=NODE_MB)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def opencompass() -> str:
    """The Python of OpenCompass's environment; skips where there is none."""
    return opencompass_python()


@pytest.fixture(scope="session")
def project(request, cluster, repo_root, tiny_model_dir, write_processed, tmp_path_factory) -> SlurmProject:
    """The project, with everything made that a training needs."""
    folder = tmp_path_factory.mktemp("drills")
    talks = [
        [{"role": "user", "content": f"{text}, {n}"}, {"role": "assistant", "content": f"{text} {n} {text}"}]
        for n in range(20)
        for text in _GREETINGS
    ]
    write_processed(folder / "processed", {"chat": talks})
    project = SlurmProject(repo_root, folder, cluster)
    config = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"processed_dir": "processed"},
        "heldout": {"share": 0.1},
        "train": {"max_length": 64, "max_steps": STEPS, "save_steps": 3, "lr": 5.0e-3, "global_batch": 4},
        "cluster": {"cpus_per_process": 1, "mem_mb": 1000, "runtime": 10},
        "turbomind": {"enabled": False},
        "parity": {"enabled": False},
        "runs": {"template": {}},
    }
    project.configure(config)
    project.run("--cores", 2, "--until", "plan_packing", "render_train_config", "--", "train")
    own = (folder / "results/template/train_config.py").read_text()
    own = own.replace("from torch.optim", "from train_hooks import Pace\nfrom torch.optim")
    own = own.replace("custom_hooks = []", "custom_hooks = [dict(type=Pace)]")
    (folder / "own.py").write_text(own)
    # Its ranks refuse it: so many packed sequences are not there.
    greedy = re.sub(r"^(global_batch|max_steps) = \d+", r"\1 = None", own, flags=re.M)
    (folder / "greedy.py").write_text(greedy.replace("global_batch = None", "global_batch = 100_000"))
    config["train"]["config"] = "own.py"
    config["runs"] = {
        "whole": {},
        "rank": {"cluster": {"nodes": 2}},
        **dict.fromkeys(("resubmitted", "requeued"), {"cluster": {"mem_mb": NODE_MB}}),
        "walltime": {"cluster": {"runtime": 2}},
        "local": {"train": {"processes": 2}},
        "refused": {"train": {"config": "greedy.py"}},
    }
    with suppress(pytest.skip.Exception):
        config["environments"] = {"opencompass_python": request.getfixturevalue("opencompass")}
        config["runs"]["whole"] = {"opencompass": write_benchmarks(folder)}
    project.configure(config)
    write_site(folder)
    return project


def write_benchmarks(folder: Path) -> dict:
    """Writes a set of questions; returns the settings of OpenCompass for it."""
    rows = [{"question": f"hello {n}", "answer": f"{n} hello"} for n in range(2)]
    (folder / "hello.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "enabled": True,
        "groups": [],
        "custom": {"hello": "hello.jsonl"},
        "runner": "slurm",
        "partition": LATER,
        "srun_options": "--comment='of the bench'",
        "max_samples": 1,
        "max_out_len": 4,
        "max_seq_len": 128,
    }


def write_site(folder: Path) -> None:
    """Writes the site's file: as any site's, but that Slurm is asked often."""
    partitions = {"main": {"max_runtime": 60}, "long": {"max_runtime": 10000}}
    (folder / "partitions.yaml").write_text(yaml.safe_dump({"partitions": partitions}))
    site = {
        "default-resources": {"constraint": "local"},
        "slurm-partition-config": "partitions.yaml",  # beside the site file
        "seconds-between-status-checks": 3,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))


@pytest.fixture(scope="session")
def full_disk(project) -> Iterator[Path]:
    """The folder of a run's checkpoints, with little room."""
    folder = project.folder / "results/resubmitted/checkpoints"
    refused = mount_full_disk(folder)
    if refused:
        pytest.skip(f"no small file system can be mounted here: {refused}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def drills(request, project) -> Iterator[tuple[Call | None, dict[str, Future]]]:
    """The drills of all chosen tests, which run at once, and the call that serves most of them."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    names = wanted & DRILLS.keys()
    with suppress(pytest.skip.Exception):
        if "full_disk" in wanted:
            request.getfixturevalue("full_disk")
    try:
        request.getfixturevalue("opencompass")
    except pytest.skip.Exception:
        names.discard("benchmarked")
    with start_drills(project, names) as started:
        yield started


@pytest.fixture(scope="session")
def shared(drills) -> Call:
    """The call that serves most drills."""
    return drills[0]


def outcome_of(name: str):
    """A fixture that waits for a drill; where that trains a run of its name, it is what the training came to."""

    @pytest.fixture(scope="session", name=name)
    def outcome(project, drills):
        drills[1][name].result()
        return project.result(name) if (project.folder / project.manifest(name)).is_file() else None

    return outcome


whole = outcome_of("whole")
resubmitted = outcome_of("resubmitted")
requeued = outcome_of("requeued")
rank = outcome_of("rank")
walltime = outcome_of("walltime")
converted = outcome_of("converted")
benchmarked = outcome_of("benchmarked")
preflight = outcome_of("preflight")
refused = outcome_of("refused")


@pytest.fixture(scope="session")
def local(project, drills) -> tuple:
    """What a training of two ranks on this machine comes to, made while the drills run."""
    project.run("--cores", 1, project.manifest("local"))  # as many threads for a rank
    return project.result("local")
