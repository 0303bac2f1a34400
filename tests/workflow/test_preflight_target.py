"""`snakemake preflight` on the finished main job: it passes, and its disk forecast matches the files."""

from __future__ import annotations

import json

from snaketune.preflight.sizes import run_bytes


def test_preflight_passes_and_looks_again_each_time(finished):
    done = finished.run("preflight")
    assert "preflight: pass" in done.stdout + done.stderr
    folder = finished.folder / "results" / "shared" / "preflight"
    checks = {check["name"]: check for check in json.loads((folder / "report.json").read_text())}
    assert {
        "shared files",
        "packages",
        "TurboMind's packages",
        "GPUs",
        "dtype",
        "disk",
        "tokenizer of demo",
        "positions of demo",
        "all-reduce",
    } == set(checks)
    assert "<|im_start|> 32005; 32,006 ids" in checks["tokenizer of demo"]["found"]
    assert finished.planned("preflight") == {"begin_preflight": 1, "probe_partition": 1, "preflight": 1}
    assert finished.planned() == {}


def test_a_training_waits_for_preflight_where_the_config_asks_for_it(make_project):
    project = make_project("gated")
    assert "pass_preflight" not in project.planned("train")
    project.configure(preflight={"required": True})
    planned = project.planned("train")
    assert planned["begin_preflight"] == planned["probe_partition"] == planned["pass_preflight"] == 1


def test_the_expected_sizes_are_those_on_the_disk(finished):
    run = {"model": finished.config["model"]["path"], "trust_remote_code": False, "dtype": "float32"}
    run |= {"hf_dtype": "float32", "zero_stage": 2, "save_optimizer": True, "save_total_limit": 2}
    run |= {"turbomind": True, "lora_rank": None}
    expected = run_bytes(run)
    results = finished.folder / "results" / "demo"
    manifest = json.loads((results / "train.json").read_text())

    def size(folder, pattern="*"):
        return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())

    for name, found in {
        "checkpoints": size(results / manifest["checkpoint"]) * 3,
        "hf": size(results / "hf", "*.safetensors"),
        "turbomind": size(results / "turbomind", "*.weight"),
    }.items():
        assert 0.95 * found < expected[name] < 1.05 * found, name
    lora = run_bytes({**run, "lora_rank": 8})
    assert lora["checkpoints"] < 0.1 * expected["checkpoints"] and lora["hf"] == expected["hf"]
