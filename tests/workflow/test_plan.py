"""`snakemake -n` ends with a table of what the jobs would cost."""

from __future__ import annotations

import re

from snaketune.common.job_table import planned_job, render_job_table


def rows(text: str) -> dict[str, list[str]]:
    """Returns the table's cells by rule, without empty cells."""
    table = text[text.index("Dry run: ") :].splitlines()[3:-1]
    return {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in table}


def test_the_plan_of_one_machine_and_of_a_cluster(make_project):
    project = make_project("plan")
    benchmark = project.folder / "results" / "benchmarks" / "train_model" / "earlier.tsv"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text("s\th:m:s\n1800.0\t0:30:00\n")
    jobs = project.planned()
    text = project.run("-n", "--quiet", "rules", "--set-resources", "train_model:runtime=60").stdout
    plan = rows(text)
    assert {rule: int(cells[0]) for rule, cells in plan.items() if rule != "total"} == jobs
    assert plan["train_model"] == ["1", "here", "2", "60 min", "2.0", "1.00"]
    profile = ("--profile", project.code / "profiles" / "slurm", "--set-resources", "train_model:gres=gpu:8")
    text = project.run("-n", "--quiet", "rules", *profile, "train_model:nodes=2").stdout
    assert "submitted to the cluster" in text
    plan = rows(text)
    assert plan["train_model"][1] == "cluster" and "16" in plan["train_model"]
    assert plan["total"][-2] == "384.0", "16 GPUs for the 24 hours of the rule's limit"
    assert "Dry run:" not in project.run("-n", "--quiet", "all").stdout


def test_core_hours_and_gpu_hours_of_a_job_of_many_tasks(tmp_path):
    resources = {"tasks": 4, "cpus_per_task": 8, "nodes": 2, "gres": "gpu:a100:2", "runtime": 90}
    train = planned_job("train_model", True, 1, resources, None)
    assert (train.cores, train.gpus, train.minutes) == (32, 4, 90)
    by_node = {**resources, "tasks": 0, "tasks_per_node": 2}
    assert planned_job("train_model", True, 1, by_node, None) == train
    here = planned_job("report", False, 2, {"gpu": 3}, tmp_path / "torn.tsv")
    assert (here.cores, here.gpus, here.minutes) == (2, 3, None)
    (tmp_path / "torn.tsv").write_text("s\n")
    plan = rows(render_job_table([train, here, here], tmp_path))
    assert plan["train_model"] == ["1", "cluster", "32", "4", "90 min", "48.0", "6.0"]
    assert plan["report"][:5] == ["2", "here", "2", "3", "none"]
    assert plan["total"][0] == "3"
