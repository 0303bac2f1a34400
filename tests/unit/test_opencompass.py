"""The real OpenCompass: it loads the whole config and scores small sets. A failed task is an error that names its log,
and the model gets the same prompt as in training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from export_models import extend_tokenizer, write_base
from opencompass_env import opencompass_python, run_there
from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.opencompass.eval_config import EvalSettings, check_custom_set, render_eval_config
from snaketune.settings.command_line import defaults_of

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SUMS = [("What is 1 + 1?", "2"), ("What is 2 + 2?", "4"), ("你好", "你好")]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer_dir):
    """(tiny model with its extended tokenizer, train.json)."""
    import shutil

    folder = tmp_path_factory.mktemp("benchmarked")
    extend_tokenizer(tiny_tokenizer_dir, folder / "tokenizer")
    hf = write_base(folder / "hf", folder / "tokenizer")
    for path in (folder / "tokenizer").iterdir():
        shutil.copy(path, hf)
    # As written by a conversion: transformers 4 reads these two keys.
    config = read_json(hf / "config.json") | {"torch_dtype": "float32", "rope_theta": 54321.0}
    (hf / "config.json").write_text(json.dumps(config))
    (hf / "manifest.json").write_text(json.dumps({"weights_sha256": "ab" * 32}))
    (folder / "train.json").write_text(json.dumps({"checkpoint": "checkpoints/x/iter_7.pth"}))
    return folder


@pytest.fixture
def render(model, tmp_path, run_script):
    """Writes a config of the model and returns its path."""

    def run(*args):
        paths = ("--model", model / "hf", "--tokenizer-path", model / "tokenizer", "--abbr", "demo")
        config = tmp_path / "config.py"
        run_script(
            *(
                "render_eval_config.py",
                "--output",
                config,
                *paths,
                "--train-manifest",
                model / "train.json",
                *args,
            )
        )
        return config

    return run


def write_set(path: Path, rows=SUMS) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return path


def evaluate(repo_root, config, tmp_path):
    script = repo_root / "workflow_scripts" / "evaluate_opencompass.py"
    return run_there(script, config, "--output", tmp_path / "scores.json", "--work-dir", tmp_path / "work")


def test_the_full_config_loads_and_gives_the_tasks_of_each_group_offline(render, tmp_path):
    opencompass_python()
    groups = ("base", "longtext", "math_agent", "cibench", "plugin_eval")
    config = render("--groups", *groups, "--runner", "slurm", "--partition", "llmit2", "--quotatype", "auto")
    code = """
import json, sys
from collections import Counter
from pathlib import Path
from snaketune.opencompass.eval_run import _MAIN, load_config
from opencompass.registry import PARTITIONERS
path = Path(sys.argv[1])
config = load_config(path)
counts = {}
for stage in ("infer", "eval"):
    assert config[stage].runner.partition == "llmit2" and config[stage].runner.quotatype == "auto"
    partitioner = PARTITIONERS.build(dict(config[stage].partitioner, out_dir="out"))
    tasks = partitioner({**config, "work_dir": "."})
    counts[stage] = Counter(task["models"][0]["abbr"] for task in tasks)
Path("counts.json").write_text(json.dumps(counts))
sys.argv = ["opencompass", str(path), "-w", "out", "-r", "run", "--dry-run"]
exec(_MAIN)
"""
    done = run_there("-c", code, config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = (done.stdout + done.stderr).count("Partitioned into 81 tasks")
    assert told == 3  # twice here, and once in OpenCompass's dry run, which ends before scoring
    counts = read_json(tmp_path / "counts.json")
    assert counts["infer"] == counts["eval"]
    # The agents come before the base group, as in the guide.
    assert list(counts["infer"].items()) == [
        ("demo@iter_7-longtext", 10),
        ("demo@iter_7-math-react", 1),
        ("demo@iter_7-cibench-react", 7),
        ("demo@iter_7-plugin-eval", 4),
        ("demo@iter_7", 59),
    ]


def test_own_sets_are_asked_and_a_task_that_fails_is_an_error_that_shows_its_log(render, repo_root, tmp_path):
    opencompass_python()
    good, bad = write_set(tmp_path / "good.jsonl"), write_set(tmp_path / "bad.jsonl")
    options = ("--max-out-len", 4, "--max-seq-len", 128, "--datasets-per-task", 1)
    config = render("--custom", f"good={good}", f"bad={bad}", *options)
    bad.rename(tmp_path / "away.jsonl")
    failed = evaluate(repo_root, config, tmp_path)
    assert failed.returncode == 2
    assert not (tmp_path / "scores.json").exists()
    assert "1 of 2 datasets have no score" in failed.stderr and "demo@iter_7-custom/bad" in failed.stderr
    (log,) = (tmp_path / "work").glob("*/run/logs/infer/demo@iter_7-custom/bad.out")
    assert str(log) in failed.stderr
    assert log.read_text().splitlines()[-1] in failed.stderr and "bad.jsonl" in failed.stderr
    (prediction,) = (tmp_path / "work").glob("*/run/predictions/demo@iter_7-custom/good.json")
    answered = prediction.stat().st_mtime_ns

    # The expected answers are the model's own answers, so the model is right by definition.
    said = read_json(prediction)["0"]["prediction"]
    (tmp_path / "away.jsonl").rename(bad)
    done = evaluate(repo_root, config, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert prediction.stat().st_mtime_ns == answered  # finished tasks do not run again
    result = read_json(tmp_path / "scores.json")
    assert [(row["group"], row["dataset"], row["metric"]) for row in result["scores"]] == [
        ("custom", "good", "accuracy"),
        ("custom", "bad", "accuracy"),
    ]
    right = sum(read_json(prediction)[str(n)]["prediction"] == answer for n, (_, answer) in enumerate(SUMS))
    assert result["scores"][0]["score"] == pytest.approx(100 * right / len(SUMS), abs=0.01)
    assert result["abbr"] == "demo@iter_7" and result["model_weights_sha256"] == "ab" * 32
    assert result["versions"]["opencompass"] == "0.5.4"
    assert read_json(prediction)["0"]["origin_prompt"] == (
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<|im_end|>" not in said


CONVERSATIONS = [
    [{"role": "user", "content": "What is 12 * 7?"}],
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": " 你好\n\nhello "}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "How are you?"},
        {"role": "user", "content": "fine\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": '{"city": "Shanghai"}'},
    ],
]


TEMPLATES = ("internlm2_chat", "chatml", "llama3", "mistral_instruct")


def test_turbomind_gets_the_prompt_and_the_stop_words_of_training(tmp_path, tiny_tokenizer_dir, repo_root):
    opencompass_python()
    from snaketune.encoding.batch_encoder import BatchEncoder
    from snaketune.encoding.chat_encoding import ChatEncoding
    from snaketune.encoding.signed_ids import signed_ids

    bases = {f"{name} tiny": tiny_tokenizer_dir for name in TEMPLATES}
    mistral = repo_root / "resources" / "tiny-mistral"
    if mistral.is_dir():  # a SentencePiece tokenizer, which puts a space before a text
        bases |= {"internlm2_chat mistral": mistral, "mistral_instruct mistral": mistral}
    tokenizers, talks = {}, {}
    for case, base in bases.items():
        folder, name = tmp_path / case, case.split()[0]
        tokenizers[case] = extend_tokenizer(base, folder / "model", template=name)
        (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
        own = {"backend": "turbomind", "gpus": 2, "max_seq_len": 777}
        settings = EvalSettings(
            model=folder / "model",
            abbr="demo",
            iteration="iter_7",
            **defaults_of("render_eval_config") | own | {"custom": {"set": write_set(folder / "set.jsonl")}},
        )
        (folder / "config.py").write_text(render_eval_config(settings, tokenizers[case]))
        # Mistral's system text is inside the user's turn, which OpenCompass cannot write.
        talks[case] = [t for t in CONVERSATIONS if name != "mistral_instruct" or t[0]["role"] != "system"]
        (folder / "talks.json").write_text(json.dumps(talks[case]))
    done = run_there(HERE / "opencompass_prompts.py", *(tmp_path / case for case in bases))
    assert done.returncode == 0, done.stderr[-3000:]
    for case, tokenizer in tokenizers.items():
        template = tokenizer.template
        encoder = BatchEncoder(tokenizer, ChatEncoding(mask="exact"))
        given = read_json(tmp_path / case / "given.json")
        for talk, got in zip(talks[case], given, strict=True):
            assert got["inputs"] == [template.render(talk) + template.generation_prompt]
            # An empty answer: in training, it is only the token that ends it.
            turns = encoder.turns([*talk, {"role": "assistant", "content": ""}])
            (pieces,) = encoder.encode_turns([turns])
            trained = [abs(token) for token in signed_ids(pieces)]
            prompt, rest = trained[: len(got["ids"])], trained[len(got["ids"]) :]
            assert got["ids"] == prompt and rest[0] == tokenizer.end_of_turn_id, (case, talk)
            assert got["stop_words"] == [template.end_of_turn]
            assert (got["session_len"], got["tp"]) == (777, 2)
            assert got["path"] == str(tmp_path / case / "model")


def test_a_bad_line_of_an_own_set_is_named(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer": 2}\n')
    with pytest.raises(UserError, match=r"set\.jsonl:2: invalid question"):
        check_custom_set("set", path)


@pytest.mark.parametrize("options, words", [("--mem=8G -c 4", ["--mem=8G", "-c", "4"]), (None, [])])
def test_more_options_of_srun_reach_the_runner(model, options, words):
    from snaketune.encoding.tokenizer import load_tokenizer

    settings = EvalSettings(
        model=model / "hf",
        abbr="demo",
        iteration="iter_7",
        **defaults_of("render_eval_config")
        | {"groups": ["base"], "runner": "slurm", "srun_options": options},
    )
    tokenizer = load_tokenizer(str(model / "tokenizer"))
    assert render_eval_config(settings, tokenizer).count(f"'extra_command': {words}") == 2
    with pytest.raises(UserError, match="srun_options cannot be read"):
        render_eval_config(dataclasses.replace(settings, srun_options="--comment='of"), tokenizer)
