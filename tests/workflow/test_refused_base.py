"""A base whose documents would not be as they are alone is refused before anything else has run."""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import pairwise


def test_a_base_that_would_train_wrongly_costs_one_job(make_project, tmp_path):
    from transformers import BlenderbotSmallConfig

    project = make_project("refused")
    base = tmp_path / "blenderbot"
    shutil.copytree(project.config["model"]["path"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    values = BlenderbotSmallConfig(vocab_size=32000, architectures=["BlenderbotSmallForCausalLM"]).to_dict()
    (base / "config.json").write_text(json.dumps(values))
    project.configure(model={"path": str(base)}, turbomind={"enabled": False})
    assert project.planned("train")["prove_architecture"] == 1
    done = project.run("train", check=False)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "does not compute blenderbot-small correctly" in output and "found:    logits differ" in output
    assert "to fix:   set packing.mode: single" in output
    started = {path.name for path in (project.folder / "results" / "logs").iterdir()}
    assert started == {"prove_architecture"}
    # With the setting that the message names, the proof passes.
    project.configure(packing={"mode": "single"})
    project.run("plan", "--until", "prove_architecture")
    (proof,) = (project.folder / "results" / "shared" / "models").glob("*/architecture.json")
    assert json.loads(proof.read_text())["attention"] == "packed"


def test_the_first_job_checks_a_hub_model_against_the_limits_of_lmdeploy(make_project):
    """Its config may come to this machine only with that job."""
    project = make_project("hub")
    project.configure(model={"path": None, "hub": "nobody/nothing"})

    def command() -> list[str]:
        done = project.run("--dry-run", "--printshellcmds", "--until", "prove_architecture", "--", "train")
        (line,) = [line for line in done.stdout.splitlines() if "prove_architecture.py" in line]
        return shlex.split(line.partition("2>&1")[0])

    words = command()
    (runs,) = [json.loads(after) for word, after in pairwise(words) if word == "--turbomind-runs"]
    assert runs["demo"]["model"]["hub"] == "nobody/nothing" and "nobody/nothing" in words
    assert runs["demo"]["turbomind"]["enabled"] and runs["demo"]["parity"]["enabled"]
    project.configure(turbomind={"enabled": False})
    assert "--turbomind-runs" not in command()
