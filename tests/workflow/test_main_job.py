"""The main job makes every promised file, and a change reruns only the necessary jobs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from kept import kept

TOKENIZE = {"tokenize_dataset": 1, "merge_tokenized": 1}
AFTER_TRAINING = {
    "convert_pth_to_hf": 1,
    "convert_hf_to_turbomind": 1,
    "encode_prompts": 1,
    "check_parity": 1,
    "render_report": 1,
}


def jsonl(project, dataset):
    return project.folder / "processed" / dataset / "processed" / "sft_chat" / f"{dataset}.jsonl"


def test_every_promised_file_is_there(finished):
    results = finished.folder / "results"
    run = results / "demo"
    for name in (
        "hf/model.safetensors",
        "hf/tokenizer.json",
        "hf/generation_config.json",
        "turbomind",
        "evaluation/tool_calls.base.json",
        "evaluation/tool_calls.tuned.json",
        "report.html",
    ):
        assert (run / name).exists(), name
    train = json.loads((run / "train.json").read_text())
    assert train["steps"] == 6
    assert (run / train["checkpoint"]).is_dir()
    lines = [
        json.loads(line) for line in (run / train["run_folder"] / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    order = next(results.glob("shared/data/*/data_order.txt"))
    train_folder = order.parent / "chatml_llamav13_32k" / "train"
    names = order.read_text().splitlines()
    assert names == ["cn/plain_chat/plain_chat.bin", "cn/tool_calls/tool_calls.bin"]
    assert all((train_folder / name).is_file() for name in names)
    plan = json.loads(next(results.glob("shared/data/*/packs/best_fit-128-*/plan.json")).read_text())
    assert plan["plan_sha256"] == train["plan_sha256"]
    assert [file["name"] for file in plan["files"]] == names


def test_the_manifest_of_a_dataset_names_its_source_by_content(finished):
    manifest = json.loads(
        next(finished.folder.glob("results/shared/data/*/manifests/tool_calls.json")).read_text()
    )
    (file,) = manifest["files"]
    source = jsonl(finished, "tool_calls").read_bytes()
    assert file["source_sha256"] == hashlib.sha256(source).hexdigest()
    assert file["samples"] + file["heldout"] == len(source.splitlines())


def test_a_line_is_trained_on_or_held_out_and_never_both(finished):
    heldout = next(finished.folder.glob("results/shared/data/*/heldout/tool_calls/processed/**/*.jsonl"))
    lines = set(jsonl(finished, "tool_calls").read_bytes().splitlines())
    aside = set(heldout.read_bytes().splitlines())
    manifest = json.loads(
        next(finished.folder.glob("results/shared/data/*/manifests/tool_calls.json")).read_text()
    )
    assert aside < lines
    assert 0 < len(aside) == manifest["totals"]["heldout"]


def test_nothing_is_left_to_do(finished):
    assert finished.planned() == {}


def test_touching_the_data_costs_nothing(finished):
    with kept(jsonl(finished, "tool_calls")) as path:
        os.utime(path)
        assert finished.planned() == {}


def test_editing_one_file_costs_its_folder_and_what_follows(finished):
    with kept(jsonl(finished, "tool_calls")) as path:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[1:] + lines[:1]), encoding="utf-8")
        planned = finished.planned()
        assert planned == AFTER_TRAINING | {
            "split_heldout": 1,
            "tokenize_dataset": 1,
            "merge_tokenized": 1,
            "write_data_order": 1,
            "plan_packing": 1,
            "plan_run": 1,
            "train_model": 1,
            "evaluate_model": 2,
            "evaluate_tool_calls": 2,
        }
        assert finished.planned("tokenize") == TOKENIZE
    assert finished.planned() == {}


def test_another_learning_rate_costs_the_training_and_what_follows(finished):
    with kept(finished.config_file):
        finished.configure(train={"lr": 1.0e-3})
        assert finished.planned() == AFTER_TRAINING | {
            "render_train_config": 1,
            "train_model": 1,
            "evaluate_model": 1,
            "evaluate_tool_calls": 1,
            "write_run_config": 1,
            "plan_run": 1,
        }


def test_rows_without_a_token_cost_the_conversion_and_no_training(finished):
    """As in results of releases that wrote them by default."""
    with kept(finished.config_file):
        finished.configure(hf={"padded_vocab": "keep"})
        assert finished.planned() == AFTER_TRAINING | {
            "evaluate_model": 1,
            "evaluate_tool_calls": 1,
            "write_run_config": 1,
            "plan_run": 1,
        }


@pytest.mark.parametrize(
    "sections", [{"packing": {"mode": "xtuner"}}, {"train": {"max_length": 256}}], ids=str
)
def test_another_packing_costs_its_plan_and_what_follows(finished, sections):
    with kept(finished.config_file):
        finished.configure(**sections)
        assert finished.planned() == AFTER_TRAINING | {
            "prove_architecture": 1,
            "plan_packing": 1,
            "plan_run": 1,
            "render_train_config": 1,
            "train_model": 1,
            "evaluate_model": 1,
            "evaluate_tool_calls": 1,
            "write_run_config": 1,
        }


def test_a_comment_in_a_script_costs_nothing(finished):
    for name in ("train_model.py", "tokenize_dataset.py"):
        with kept(finished.code / "workflow_scripts" / name) as path:
            path.write_text(path.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")
            assert finished.planned() == {}


def test_naming_a_target_redoes_only_what_it_needs(finished):
    with kept(finished.config_file):
        finished.configure(turbomind={"dtype": "bfloat16"})
        assert finished.planned("results/demo/hf") == {}
        assert finished.planned("results/demo/turbomind") == {"convert_hf_to_turbomind": 1}
        # The tuned model is evaluated after the gate; the base model has none.
        gate = {"convert_hf_to_turbomind": 1, "encode_prompts": 1, "check_parity": 1}
        assert finished.planned("results/demo/evaluation/tuned.json") == gate | {"evaluate_model": 1}
        assert finished.planned("results/demo/evaluation/base.json") == {}
        finished.configure(turbomind={"mode": "direct"})
        assert finished.planned("results/demo/turbomind") == {"link_serving_folder": 1}


def test_the_conversions_are_proved(finished):
    parity = json.loads((finished.folder / "results/demo/parity.json").read_text())
    assert [row["of"].split()[0] for row in parity["logits"]] == ["Hugging", "transformers", "TurboMind"]
    assert parity["unread"] == []
    assert all(row["top1_agreement"] == 1.0 for row in parity["logits"])
    assert {row["reader"].split()[0] for row in parity["ids"]} == {"transformers", "lmdeploy"}


def test_models_are_evaluated_with_the_attention_of_their_training(finished):
    with kept(finished.config_file):
        finished.configure(train={"attention": "eager"})
        done = finished.run("--dry-run", "--printshellcmds", "evaluate")
    commands = re.findall(
        r"(evaluate_(?:model|tool_calls)\.py) .*( --attention \w+)", done.stdout + done.stderr
    )
    assert {name for name, _ in commands} == {"evaluate_model.py", "evaluate_tool_calls.py"}
    assert {given for _, given in commands} == {" --attention eager"}


def test_two_runs_share_their_tokenised_files(finished):
    with kept(finished.config_file):
        finished.configure(runs={"demo": {}, "slow": {"train": {"lr": 1.0e-4}}})
        planned = finished.planned("train")
        assert planned == {"render_train_config": 1, "train_model": 1}


def test_runs_whose_tokenised_bytes_differ_have_files_of_their_own(finished):
    others = {
        "short": {"data": {"max_tokens": 64}},
        "compat": {"tokenize": {"mask": "compat"}},
        "control": {"tokenize": {"control_tokens": "control"}},
        "valid": {"tokenize": {"valid": "copy"}},
    }
    with kept(finished.config_file):
        finished.configure(runs={"demo": {}, **others})
        # Both dataset folders are small, so one job tokenises them.
        assert finished.planned("tokenize") == {rule: len(others) for rule in TOKENIZE}


def test_the_size_of_jobs_decides_no_bytes(finished):
    with kept(finished.config_file):
        finished.configure(tokenize={"shard_mb": 1, "batch_mb": 1})
        assert finished.planned() == {"write_run_config": 1, "plan_run": 1, "render_report": 1}


def test_editing_one_file_redoes_this_file_alone(finished):
    bins = sorted(finished.folder.glob("results/shared/data/*/chatml_llamav13_32k/train/cn/*/*.bin"))
    before = [path.stat().st_mtime_ns for path in bins]
    assert [path.name for path in bins] == ["plain_chat.bin", "tool_calls.bin"]
    with kept(jsonl(finished, "tool_calls")) as path:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[1:] + lines[:1]), encoding="utf-8")
        finished.run("tokenize")
        assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(bins, before, strict=True)] == [
            True,
            False,
        ]
    finished.run("tokenize")
    assert bins[0].stat().st_mtime_ns == before[0]
    # The bytes are the original ones, so no later job is due.
    assert "train_model" not in finished.planned()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"learning_rate": 1}}, ["unknown key train.learning_rate"]),
        ({"train": {"lr": "1e-5"}}, ["train.lr", "write 1.0e-5"]),
        ({"data": {"processed_dir": "missing"}}, ["data.processed_dir", "missing"]),
        ({"data": {"datasets": ["nope"]}}, ["dataset nope not found", "plain_chat, tool_calls"]),
        ({"model": {"path": "missing"}}, ["model.path", "missing"]),
        ({"environments": {"turbomind_python": "missing/python"}}, ["turbomind_python", "make setup"]),
    ],
)
def test_a_mistake_in_the_config_stops_before_any_job(finished, sections, words):
    with kept(finished.config_file):
        finished.configure(**sections)
        done = finished.run(check=False)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert "rule " not in text
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_what_turbomind_cannot_serve_stops_before_any_job(finished, tmp_path):
    """A base with another architecture, and one with a window shorter than the wanted session."""
    model = Path(finished.config["model"]["path"])
    base = tmp_path / "base"
    shutil.copytree(model, base)
    config = json.loads((model / "config.json").read_text())

    def planned(turbomind: dict, **changes) -> str:
        (base / "config.json").write_text(json.dumps(config | changes))
        with kept(finished.config_file):
            finished.configure(model={"path": str(base)}, turbomind=turbomind)
            done = finished.run("--dry-run", "--quiet", "rules", check=False)
        text = done.stdout + done.stderr
        assert "Traceback" not in text
        return text

    other = {"architectures": ["GraniteForCausalLM"]}
    refused = planned({}, **other)
    assert "config: run 'demo': TurboMind" in refused and "GraniteForCausalLM" in refused
    assert "turbomind.enabled: false" in refused and "train_model" not in refused
    assert "train_model" in planned({"enabled": False}, **other)
    refused = planned({"session_len": 4097}, sliding_window=4096)
    assert "turbomind.session_len" in refused and "at most 4096" in refused and "train_model" not in refused
    assert "train_model" in planned({}, sliding_window=4096)


def test_what_the_run_took_was_planned(finished):
    """Memory is within 15% of the kernel's peak; tokens are those of the mean packed sequence."""
    results = finished.folder / "results"
    plan, train = (
        json.loads((results / "demo" / name).read_text()) for name in ("run_plan.json", "train.json")
    )
    assert plan["steps"] == train["steps"] and plan["epochs"] == pytest.approx(train["epochs"], abs=1e-4)
    assert plan["tokens"] == pytest.approx(train["tokens"], rel=0.1)
    (chosen,) = (row for row in plan["memory"] if row["chosen"])
    metrics = (results / "demo" / train["run_folder"] / "metrics.jsonl").read_text().splitlines()
    assert chosen["device_gib"] * 1024 == pytest.approx(json.loads(metrics[-1])["cpu_memory_mib"], rel=0.15)
