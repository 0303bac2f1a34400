"""The configuration: defaults, merging of runs, and errors that name the fix."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from snaketune.common.cli import UserError
from snaketune.settings.load import load_settings
from snaketune.settings.schema import load_schema


@pytest.fixture(scope="module")
def schema():
    return load_schema()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The smallest valid configuration, with real folders in the working folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return {"model": {"path": "model"}, "data": {"processed_dir": "data"}, "runs": {"one": {}}}


def test_defaults_are_filled(config, schema):
    run = load_settings(config, schema).runs["one"]
    assert run["train"]["lr"] == 4e-5
    assert run["train"]["betas"] == [0.9, 0.95]
    assert run["data"]["max_tokens"] == 32768


def test_a_run_goes_before_the_shared_section_and_that_before_the_default(config, schema):
    config["train"] = {"lr": 1e-4, "zero_stage": 3}
    config["runs"] = {"one": {"train": {"lr": 2e-4}}, "two": None}
    runs = load_settings(config, schema).runs
    assert (runs["one"]["train"]["lr"], runs["one"]["train"]["zero_stage"]) == (2e-4, 3)
    assert (runs["two"]["train"]["lr"], runs["two"]["train"]["zero_stage"]) == (1e-4, 3)


def test_runs_do_not_share_mutable_defaults(config, schema):
    config["runs"] = {"one": {}, "two": {}}
    runs = load_settings(config, schema).runs
    runs["one"]["train"]["betas"].append(0.5)
    assert runs["two"]["train"]["betas"] == [0.9, 0.95]


def test_the_template_is_there_and_its_mask_exists(config, schema):
    config["tokenize"] = {"template": "chatml", "mask": "compat"}
    with pytest.raises(UserError, match=r"template chatml with mask compat(.|\n)*set tokenize\.mask: exact"):
        load_settings(config, schema)
    del config["tokenize"]["mask"]
    assert load_settings(config, schema).runs["one"]["tokenize"]["template"] == "chatml"
    config["tokenize"]["template"] = "chatlm"
    with pytest.raises(UserError, match=r"no chat template 'chatlm'(.|\n)*tokenize\.template"):
        load_settings(config, schema)


def change(config, path, value):
    config = copy.deepcopy(config)
    *parents, key = path.split(".")
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
    place[key] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.learning_rate", 1e-4, ["train.learning_rate", "unknown key"]),
        ("train.max_lenght", 512, ["train.max_lenght", "did you mean 'max_length'"]),
        ("trian", {}, ["unknown key trian", "did you mean 'train'"]),
        ("runs.one.train.l_r", 1e-4, ["runs.one.train.l_r", "unknown key"]),
        ("runs.one.results_dir", "x", ["runs.one.results_dir", "unknown key"]),
        ("train.lr", "1e-5", ["train.lr", "'1e-5' (string)", "1.0e-5"]),
        ("runs.one.train.lr", "2e-4", ["runs.one.train.lr", "2.0e-4"]),
        ("train.lr", -1, ["train.lr", "more than 0"]),
        ("train.zero_stage", 4, ["train.zero_stage", "one of 0, 1, 2, 3"]),
        ("train.save_optimizer", "no", ["train.save_optimizer", "boolean"]),
        ("train.max_steps", True, ["train.max_steps", "boolean", "integer or null"]),
        ("train.betas", [0.9], ["train.betas"]),
        ("train.lora", {"alpha": 8}, ["train.lora.rank is missing"]),
        ("train.lora", {"rank": 4, "alfa": 8}, ["train.lora.alfa", "did you mean 'alpha'"]),
        ("train", {"lora": {"rank": 4}, "zero3_init": True}, ["LoRA with zero3_init", "zero3_init: false"]),
        ("train.generate_steps", 5, ["train.generate_steps, but no prompts", "evaluate.prompts"]),
        ("train.loggers", ["comet"], ["train.loggers", "wandb, mlflow"]),
        ("runs", {"shared": {}}, ["run name 'shared'"]),
        ("runs", {"a/b": {}}, ["run name 'a/b'"]),
        ("runs", {}, ["runs"]),
        ("data.processed_dir", "nowhere", ["data.processed_dir", "does not exist", "nowhere"]),
        ("runs.one.data.processed_dir", "nowhere", ["data.processed_dir", "nowhere"]),
        ("model.path", "nowhere", ["model.path", "nowhere"]),
        ("model.path", "data", ["model.path", "config.json"]),
        ("model.hub", "some/model", ["exactly one of model.path and model.hub"]),
        ("tokenizer.path", "data", ["tokenizer", "tokenizer.json"]),
        ("heldout.share", 0, ["nothing to evaluate on"]),
        ("train.config", "my.py", ["train.config", "my.py"]),
    ],
)
def test_a_mistake_is_one_clear_error(config, schema, path, value, words):
    with pytest.raises(UserError) as caught:
        load_settings(change(config, path, value), schema)
    for word in words:
        assert word in str(caught.value)


def with_datasets(config, *names):
    for name in names:
        file = Path("data") / name / "processed" / "x" / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("[]\n")
    return config


def test_a_matrix_becomes_ordinary_runs(config, schema):
    config["train"] = {"lora": {"rank": 4, "alpha": 8}}
    config["runs"] = {
        "one": {},
        "sweep": {
            "train": {"max_steps": 7},
            "matrix": {"train.lr": [1e-5, 4e-5], "train.zero_stage": [1, 2], "train.lora.rank": [2]},
        },
        "mix": {"matrix": {"packing.weights": [None, {"a": 2, "b": 0.5}], "train.offload": ["none"]}},
    }
    runs = load_settings(config, schema).runs
    assert list(runs) == [
        "one",
        "sweep-lr1e-05-zero_stage1-rank2",
        "sweep-lr1e-05-zero_stage2-rank2",
        "sweep-lr4e-05-zero_stage1-rank2",
        "sweep-lr4e-05-zero_stage2-rank2",
        "mix-weights_none-offload_none",
        "mix-weights_a2_b0.5-offload_none",
    ]
    run = runs["sweep-lr4e-05-zero_stage1-rank2"]["train"]
    assert (run["lr"], run["zero_stage"], run["max_steps"]) == (4e-5, 1, 7)
    assert run["lora"] == {"rank": 2, "alpha": 8} and runs["one"]["train"]["lora"]["rank"] == 4
    assert runs["mix-weights_a2_b0.5-offload_none"]["packing"]["weights"] == {"a": 2, "b": 0.5}


def test_each_dataset_is_left_out_once(config, schema):
    with_datasets(config, "a", "b", "c d")
    config["packing"] = {"weights": {"a": 2}}
    config["runs"] = {"ablate": {"leave_one_out": "datasets", "matrix": {"train.seed": [1, 2]}}}
    runs = load_settings(config, schema).runs
    assert len(runs) == 8 and list(runs)[::2] == [
        f"ablate-{name}-seed1" for name in ("all", "without-a", "without-b", "without-c-d")
    ]
    weights = {name: run["packing"]["weights"] for name, run in runs.items() if name.endswith("seed2")}
    assert list(weights.values()) == [{"a": 2}, {"a": 0}, {"a": 2, "b": 0}, {"a": 2, "c d": 0}]
    config["runs"]["ablate"]["leave_one_out"] = ["b"]
    assert [name for name in load_settings(config, schema).runs if "without" in name] == [
        "ablate-without-b-seed1",
        "ablate-without-b-seed2",
    ]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"s": {"matrix": {"train.l_r": [1]}}}, "unknown key runs.s.matrix.train.l_r"),
        ({"s": {"matrix": {"trian.lr": [1]}}}, "unknown key runs.s.matrix.trian.lr(.|\n)*'train'"),
        ({"s": {"matrix": {"train.lora.rnk": [1]}}}, "unknown key runs.s.matrix.train.lora.rnk(.|\n)*'rank'"),
        ({"s": {"matrix": {"train.lr": []}}}, "invalid value for runs.s.matrix.train.lr"),
        ({"s": {"matrix": {"train.lr": 1e-5}}}, "invalid value for runs.s.matrix.train.lr(.|\n)*array"),
        ({"s": {"matrix": {"train.lr": ["1e-5"]}}}, "invalid value for runs.s-lr_1e-5.train.lr(.|\n)*1.0e-5"),
        ({"s": {"matrix": {"train.lr": [1, 1.0]}}}, "two runs are named s-lr1"),
        ({"s": {"matrix": {"train.seed": [1]}}, "s-seed1": {}}, "two runs are named s-seed1"),
        ({"s": {"matrix": {"train.seed": list(range(65))}}}, "runs.s defines 65 runs"),
        (
            {"s": {"train": {"seed": 3}, "matrix": {"train.seed": [1]}}},
            "train.seed has a list in runs.s.matrix and is also set",
        ),
        (
            {"s": {"matrix": {"packing.weights": [{}], "packing.weights.a": [1]}}},
            "packing.weights.a has a list in runs.s.matrix and is also set",
        ),
        ({"s": {"leave_one_out": ["d"]}}, "unknown key runs.s.leave_one_out.d"),
        ({"s": {"leave_one_out": "all"}}, "invalid value for runs.s.leave_one_out"),
        ({"s": {"data": {"datasets": ["a"]}, "leave_one_out": "datasets"}}, "leave nothing to train on"),
        ({"s": {"matrx": {"train.seed": [1]}}}, "unknown key runs.s.matrx(.|\n)*'matrix'"),
    ],
)
def test_a_mistake_in_several_runs_is_one_clear_error(config, schema, runs, words):
    with_datasets(config, "a", "b")
    with pytest.raises(UserError, match=words):
        load_settings(config | {"runs": runs}, schema)


def test_what_is_compared(config, schema):
    config["runs"] = {"one": {}, "s": {"matrix": {"train.seed": [1, 2]}}}
    assert load_settings(config, schema).compared == ["one", "s-seed1", "s-seed2"]
    config["compare"] = {"runs": ["s", "one"], "baseline": "s-seed2"}
    assert load_settings(config, schema).compared == ["s-seed2", "s-seed1", "one"]
    with pytest.raises(UserError, match=r"unknown key compare\.baseline\.s"):
        load_settings(config | {"compare": {"baseline": "s"}}, schema)


def test_a_missing_required_key_is_named(config, schema):
    del config["data"]
    with pytest.raises(UserError, match=r"data\.processed_dir is missing"):
        load_settings(config, schema)


@pytest.mark.parametrize("file", ["config.yaml", "docs/examples/smollm2.yaml"])
def test_the_shipped_configs_are_valid(repo_root, schema, file, monkeypatch, tmp_path):
    config = yaml.safe_load((repo_root / file).read_text(encoding="utf-8"))
    folder = tmp_path / config["model"]["path"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "docs").symlink_to(repo_root / "docs")
    monkeypatch.chdir(tmp_path)
    assert load_settings(config, schema).runs


@pytest.mark.parametrize("script", ["workflow_scripts/render_config_docs.py", "envs/render.py"])
def test_generated_files_are_in_step(repo_root, script):
    done = subprocess.run([sys.executable, repo_root / script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_conda_environments_hold_the_pins_of_pip(repo_root):
    for name in ("snaketune", "turbomind"):
        environment = yaml.safe_load((repo_root / "envs" / f"{name}.yaml").read_text(encoding="utf-8"))
        conda = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
        lines = (repo_root / "envs" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert conda == [line for line in lines if not line.startswith("#")]
        assert all("==" in pin for pin in conda)
