"""Each failing check of `preflight`, and the fix it reports."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from pods import exit_codes, start_pods
from snaketune.preflight.checks import check_gpus
from snaketune.preflight.ranks import check_all_reduce, check_shared_files
from snaketune.training.launch import free_port
from warm import PARENT

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tiny_model_dir, tmp_path):
    """Settings of one valid run."""
    run = {"run": "demo", "model": str(tiny_model_dir), "tokenizer": str(tiny_model_dir)}
    run |= {"extended": str(tmp_path / "extended"), "template": "internlm2_chat", "trust_remote_code": False}
    run |= {
        "dtype": "auto",
        "hf_dtype": "auto",
        "zero_stage": 2,
        "save_optimizer": True,
        "save_total_limit": 2,
    }
    run |= {"processes": None, "turbomind": True, "lora_rank": None, "longest": 2048}
    return {"runs": [run], "jsonl_bytes": 1000, "turbomind_python": None}


def probe(run_script, folder, settings, envs, **options):
    flags = ("--settings", json.dumps(settings), "--envs", envs)
    return run_script("preflight.py", "probe", "--folder", folder, *flags, **options)


def test_everything_that_can_be_wrong_on_one_machine_is_told(
    run_script, settings, tmp_path, repo_root, tiny_model_dir
):
    envs = shutil.copytree(repo_root / "envs", tmp_path / "envs")
    lock = (envs / "snaketune.txt").read_text()
    (envs / "snaketune.txt").write_text(lock.replace("numpy==", "numpy==0") + "no-such-package==1.0\n")
    settings["turbomind_python"] = str(tmp_path / "bin" / "python")
    good = settings["runs"][0]
    greedy = {**good, "run": "greedy", "save_total_limit": 10**9}
    small = shutil.copytree(tiny_model_dir, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(
        json.dumps({**config, "vocab_size": 300, "max_position_embeddings": 1024})
    )
    foreign = {**good, "run": "foreign", "model": str(small)}
    swapped = shutil.copytree(tiny_model_dir, tmp_path / "swapped")
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = {**good, "run": "other", "tokenizer": str(swapped)}
    made = {**good, "run": "made", "extended": str(tmp_path / "made")}
    flags = ("--tokenizer-path", swapped, "--tokenizer-w-special-tokens-save-dir", tmp_path / "made")
    run_script("extend_tokenizer.py", *flags)
    settings["runs"] = [good, greedy, foreign, other, made]
    folder = tmp_path / "preflight"
    run_script("preflight.py", "begin", "--folder", folder)
    probe(run_script, folder, settings, envs)
    done = run_script("preflight.py", "report", "--folder", folder, check=False)
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads((folder / "report.json").read_text())}
    failed = {name for name, check in checks.items() if not check["passed"]}
    assert failed == {
        *("packages", "TurboMind's packages", "disk"),
        *("tokenizer of foreign", "tokenizer of other", "tokenizer of made"),
    }
    assert "no-such-package missing (not 1.0)" in checks["packages"]["found"]
    assert "numpy" in checks["packages"]["found"] and "pip install -r" in checks["packages"]["fix"]
    assert checks["TurboMind's packages"]["fix"] == "make setup"
    assert "lower train.save_total_limit" in checks["disk"]["fix"]
    assert "embedding rows" in checks["tokenizer of foreign"]["found"]
    assert "the base was made for only 1,024: snakemake plan" in checks["positions of foreign"]["found"]
    assert "the base was made for 4,096" in checks["positions of demo and 3 more"]["found"]
    assert "2 tokens" in checks["tokenizer of other"]["found"]
    assert "made from a different base" in checks["tokenizer of made"]["found"]
    assert "GB/s" in checks["all-reduce"]["found"]
    assert not (folder / "passed.json").exists()
    assert "6 of 13 checks failed" in done.stdout and "to do" in done.stdout
    assert done.stdout == (folder / "report.txt").read_text()
    again = run_script("preflight.py", "report", "--folder", folder, check=False)
    assert again.returncode == 2 and "preflight.py begin" in again.stderr, "each report needs its own begin"


def test_a_rank_with_another_file_system_is_missed(run_script, settings, tmp_path, repo_root):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        run_script("preflight.py", "begin", "--folder", folder)
    port, ranks = free_port(), []
    for rank, folder in enumerate((mine, theirs)):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [repo_root / "workflow_scripts/preflight.py", "probe", "--folder", folder]
        command += ["--settings", json.dumps(settings), "--envs", repo_root / "envs", "--launcher", "pytorch"]
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        ranks.append(PARENT.start(command, env=environment))
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    done = run_script("preflight.py", "report", "--folder", mine, check=False)
    assert done.returncode == 1
    assert "no answer from rank 1 of 2" in done.stdout and "at the same path" in done.stdout


def test_pods_look_at_what_begin_was_told(run_script, settings, tmp_path, repo_root):
    folder = tmp_path / "preflight"
    run_script("preflight.py", "begin", "--folder", folder, "--settings", json.dumps(settings))
    log = tmp_path / "pods.log"
    pods = start_pods(log, "preflight.py", "probe", "--folder", folder, "--envs", repo_root / "envs")
    assert exit_codes(pods) == [0, 0], log.read_text()[-3000:]
    run_script("preflight.py", "report", "--folder", folder)
    report = json.loads((folder / "report.json").read_text())
    found = {check["name"]: check["found"] for check in report}
    assert found["all-reduce"].startswith("gloo, 2 ranks: ") and "tokenizer of demo" in found
    assert (folder / "passed.json").is_file()


def test_a_rank_that_reads_another_word_is_named():
    answer = {"rank": 0, "world_size": 1, "host": "n1", "folder": "/data/preflight", "nonce": "b"}
    check = check_shared_files({"nonce": "a", "host": "login"}, [answer])
    assert not check.passed
    assert check.found == "/data/preflight differs from that on login: rank 0 on n1"


def test_ranks_that_do_not_meet_are_told_where_to_look(monkeypatch):
    own = {
        "RANK": 1,
        "LOCAL_RANK": 1,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    for name, value in own.items():
        monkeypatch.setenv(name, str(value))
    check = check_all_reduce(patience=2)
    assert signal.alarm(0) == 0
    assert not check.passed
    assert f"127.0.0.1:{own['MASTER_PORT']}" in check.fix and "SOCKET_IFNAME" in check.fix


def test_gpus_that_torch_cannot_see_are_told(monkeypatch, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees the GPUs of this machine")
    assert check_gpus(None).passed
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = check_gpus(None)
    assert not check.passed and "CUDA build" in check.fix
