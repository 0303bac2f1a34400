"""A real Slurm cluster for the session, and a small project whose trainings run on it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SlurmCluster, missing_programs
from drill_project import STEPS, SlurmProject

ON_TWO_NODES = ["whole_2", "rank"]
ON_ONE = ["whole", "scancel", "preempted", "not_requeued", "node", "slurmctld", "controller", "disk", "twice"]
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
    """Four nodes of four processors, up as long as the session."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)} missing): `make test-slurm` as root installs it")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def project(cluster, repo_root, tiny_model_dir, write_processed, tmp_path_factory) -> SlurmProject:
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
        "runs": {"template": {}},
    }
    project.configure(config)
    made = project.command("--cores", 2, "--until", "plan_packing", "render_train_config", "--", "train")
    done = subprocess.run(made, capture_output=True, text=True, cwd=repo_root, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    own = (folder / "results/template/train_config.py").read_text()
    own = own.replace("from torch.optim", "from train_hooks import Slow\nfrom torch.optim")
    (folder / "own.py").write_text(own.replace("custom_hooks = []", "custom_hooks = [dict(type=Slow)]"))
    config["train"]["config"] = "own.py"
    short = {"cluster": {"runtime": 2}}
    config["runs"] = dict.fromkeys(ON_TWO_NODES, {"cluster": {"nodes": 2}}) | dict.fromkeys(ON_ONE)
    config["runs"] |= {"walltime": short, "local": {"train": {"processes": 2}}}
    project.configure(config)
    return project
