"""`opencompass.runner: slurm`: the tasks are Slurm jobs of their own, asked for from within a job of the workflow."""

from __future__ import annotations

import json
import subprocess

import pytest
from drill_project import PATIENCE, SlurmProject

from opencompass_env import opencompass_python

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def benchmarked(cluster, repo_root, tiny_model_dir, write_processed, tmp_path_factory):
    """(a project whose model has been trained and converted on this machine, its config)."""
    python = opencompass_python()
    folder = tmp_path_factory.mktemp("benchmarked")
    talks = [
        [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": f"{n} hello"}]
        for n in range(40)
    ]
    write_processed(folder / "processed", {"chat": talks})
    for name in ("first", "second"):
        rows = [{"question": f"hello {n}", "answer": f"{n} hello"} for n in range(2)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"processed_dir": "processed"},
        "train": {"max_length": 64, "max_steps": 2},
        "parity": {"enabled": False},
        "turbomind": {"enabled": False},
        "opencompass": {
            "enabled": True,
            "groups": [],
            "custom": {name: f"{name}.jsonl" for name in ("first", "second")},
            "runner": "slurm",
            "srun_options": "--comment='of the bench'",
            "max_num_workers": 2,
            "datasets_per_task": 1,
            "max_samples": 1,
            "max_out_len": 4,
            "max_seq_len": 128,
        },
        "environments": {"opencompass_python": str(python)},
        "runs": {"bench": {}},
    }
    project = SlurmProject(repo_root, folder, cluster)
    project.configure(config)
    made = project.command("--cores", 2, "--", "results/bench/hf")
    done = subprocess.run(made, capture_output=True, text=True, cwd=repo_root, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return project, config


def test_tasks_are_jobs_and_failed_ones_are_told_with_their_log(benchmarked):
    project, config = benchmarked
    target = "results/bench/evaluation/opencompass.json"
    config["opencompass"]["partition"] = "nowhere"
    project.configure(config)
    assert project.start("--retries", 0, "--", target).wait(timeout=PATIENCE) != 0
    assert not (project.folder / target).exists()
    assert "2 of 2 datasets have no score" in project.said() and "invalid partition" in project.said()

    config["opencompass"]["partition"] = "urgent"
    project.configure(config)
    assert project.start("--", target).wait(timeout=PATIENCE) == 0, project.said()[-6000:]
    rows = json.loads((project.folder / target).read_text())["scores"]
    assert [row["dataset"] for row in rows] == ["first", "second"]
    assert all(0 <= row["score"] <= 100 for row in rows)
    jobs = project.cluster.run("squeue", "-h", "-t", "all", "-o", "%P %T %k %j").stdout.splitlines()
    for stage in ("Infer", "Eval"):
        for name in ("first", "second"):
            task = f"urgent COMPLETED of the bench OpenICL{stage}[bench@iter_2-custom/{name}]"
            assert any(job.startswith(task) for job in jobs), jobs
