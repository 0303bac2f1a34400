"""The proof of ZeRO-3 against a plain loop: kinds of models that train correctly, and broken ones, which it sees."""

from __future__ import annotations

import json
import os

import pytest
from transformers import LlamaConfig

from warm import PARENT

pytestmark = pytest.mark.slow


@pytest.fixture
def proof(tmp_path, repo_root):
    """Returns a function that runs a case of tests/zero3_cases.py."""

    def run(case: str) -> dict:
        paths = os.pathsep.join(map(str, [repo_root / "workflow_scripts", repo_root / "tests"]))
        own = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = PARENT.run([repo_root / "tests/zero3_cases.py", case, tmp_path], timeout=600, env=own)
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    "case",
    [
        "dense",
        "mixture",
        "recurrent",
        "experts as modules",
        "weights that the layer reads, not their module",
    ],
)
def test_two_ranks_train_like_a_plain_loop(case, proof):
    found = proof(case)
    assert "refused" not in found, found
    assert found["difference"] < found["bound"] / 10


@pytest.mark.parametrize(
    ("case", "found"),
    [
        # gloo sees that two experts have different shares; NCCL would wait.
        ("experts as modules, gathered one at a time", "the ranks do not gather the same weights"),
        ("a rank that waits", "hangs: the ranks wait for each other"),
        # Outside its module a weight is empty and its sum 0: nothing fails.
        ("a weight kept in a list", "loss "),
        # The losses of two steps hardly show it.
        ("a gradient that ranks halve", "model.layers."),
        (
            "a weight that ranks freeze",
            "the checkpoint lacks 1 weights, model.embed_tokens.weight among them",
        ),
    ],
)
def test_what_goes_wrong_is_seen(case, found, proof):
    refused = proof(case)["refused"]
    assert f"  found:    {found}" in refused
    assert " cannot be trained with ZeRO-3\n" in refused and "to fix:   set train.zero_stage: 2" in refused


def test_the_table_of_families_has_it(repo_root, tmp_path):
    """Families in processes of their own, each of which starts two ranks; nothing trains an encoder."""
    program = (
        "import sys, json, dataclasses; from snaketune.preflight.model_families import describe_families as describe; "
        "json.dump([dataclasses.asdict(each) for each in describe(['mamba2', 'bert', 'llama'])], open(sys.argv[1], 'w'))"
    )
    own = {**os.environ, "PYTHONPATH": str(repo_root / "workflow_scripts"), "OMP_NUM_THREADS": "1"}
    done = PARENT.run(["-c", program, tmp_path / "found.json"], timeout=600, env=own)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(each["name"], each["zero_3"]) for each in found] == [
        ("mamba2", "yes"),
        ("bert", None),
        ("llama", "yes"),
    ]


def test_a_run_with_zero_3_is_proved(tmp_path, run_script):
    """The rule that everything waits for gives the script the run's ZeRO stage."""
    LlamaConfig().save_pretrained(tmp_path)
    for stage, more in ((2, 0), (3, 1)):
        output = tmp_path / f"{stage}.json"
        run_script("prove_architecture.py", tmp_path, "--zero-stage", stage, "--output", output)
        names = [check["name"] for check in json.loads(output.read_text())["checks"]]
        assert sum("ZeRO-3" in name for name in names) == more
