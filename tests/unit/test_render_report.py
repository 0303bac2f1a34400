"""The report is one self-contained page, and no text from data or config can become markup."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.files import write_json, write_text
from snaketune.common.run_files import RunFiles
from snaketune.reporting import report
from snaketune.reporting.report import SECTIONS, render_report
from snaketune.reporting.report_inputs import ReportInputs

EVIL = "<script>alert('x')</script>&\"<img src=http://example.org/x.png onerror=alert(1)>"
DIGEST = "ab" * 32
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "br", "img", "link", "input", "hr"}


def evaluation(loss: float, text: str) -> dict:
    part = {"loss": loss, "perplexity": 2.5, "trained_tokens": 1234, "samples": 3, "truncated": 0}
    prompt = [{"role": "system", "name": EVIL, "content": EVIL}, {"role": "user", "content": "你好"}]
    return {
        **part,
        "model": EVIL,
        "datasets": {EVIL: part, "empty": {**part, "loss": None, "perplexity": None, "trained_tokens": 0}},
        "generations": [{"prompt": prompt, "text": text, "tokens": 3, "finished": True}],
        "heldout_sha256": DIGEST,
    }


@pytest.fixture
def parts() -> dict:
    manifest = {
        "format": 1,
        "dataset": EVIL,
        "files": [],
        "tokenizer_sha256": DIGEST,
        "options": {"valid": "copy", "mask": EVIL, "control_tokens": EVIL},
    }
    stats = {
        "dataset": EVIL,
        "samples": 100,
        "valid_samples": 1,
        "tokens": 23456,
        "trained_tokens": 11728,
        "truncated": 2,
        "heldout": 7,
        "quarantined": 1,
        "straddling_messages": 3,
        "tokens_differing_from_compat": 4,
        "control_messages": 5,
        "trained_share": 0.5,
        "lengths": {"p50": 7, "longest": 4000},
        "length_histogram": {"edges": [1, 2, 4, 8, 1024, 2048], "counts": [0, 0, 60, 38, 2]},
        "longest_samples": [
            {"source": f"{EVIL}.jsonl", "line": 20, "bin": f"train/{EVIL}.bin", "sample": 17, "tokens": 4000}
        ],
        "bad_lines": {EVIL: 1},
        "files": [{"quarantined": 1, "quarantine": f"manifests/{EVIL}.quarantine.jsonl"}],
    }
    train = {
        "identity": DIGEST,
        "data_sha256": DIGEST,
        "config_sha256": DIGEST,
        "weights_sha256": DIGEST,
        "steps": 30,
        "epochs": 1.5,
        "tokens": 15360,
        "world_size": 2,
        "zero_stage": 3,
        "dtype": "bfloat16",
        "git_commit": None,
        "versions": {"torch": EVIL},
        "run_folder": "checkpoints/abc",
    }
    metrics = [
        {"step": n, "loss": 5 / n, "lr": 1e-4, "tokens": 512, "seconds": 2.0, "attempt": 1 + n // 20}
        for n in range(1, 31)
    ]
    return {
        "config": {"model": {"path": EVIL}, "train": {"lr": 4e-5, EVIL: EVIL, "config": None, "flag": True}},
        "train": train,
        "metrics": metrics,
        "manifest": manifest,
        "stats": stats,
        "base": evaluation(3.5, EVIL),
        "tuned": evaluation(1.25, ""),
        "hf": {
            "architecture": EVIL,
            "dtype": "bfloat16",
            "parameters": 7,
            "vocab_size": 64,
            "checkpoint": "iter_30.pth",
            "weights_sha256": DIGEST,
            "versions": {"transformers": "5"},
        },
        "turbomind": {
            "model_name": EVIL,
            "chat_template": "internlm2",
            "dtype": "bfloat16",
            "tp": 2,
            "rope_theta": 10000.0,
            "files": {"triton_models/weights/config.yaml": {"sha256": DIGEST}},
            "versions": {"lmdeploy": "0.9.2.post1"},
        },
    }


@pytest.fixture
def inputs_of(tmp_path):
    """Returns a function that writes a run's files and returns the report's inputs; None means no file."""
    places = {
        "config": names.CONFIG,
        "train": names.TRAIN,
        "base": names.EVALUATION.format(label="base"),
        "tuned": names.EVALUATION.format(label="tuned"),
        "hf": f"{names.HF}/{names.MANIFEST}",
        "turbomind": f"{names.TURBOMIND}/{names.MANIFEST}",
    }

    def write(parts: dict, **shared) -> ReportInputs:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for part, name in places.items():
            if parts[part] is not None:
                write_json(tmp_path / "run" / name, parts[part])
        write_json(tmp_path / "data/manifests/data.json", parts["manifest"])
        write_json(tmp_path / "data/manifests/data/stats.json", parts["stats"])
        metrics = tmp_path / "run" / parts["train"]["run_folder"] / names.METRICS
        write_text(metrics, "".join(json.dumps(record) + "\n" for record in parts["metrics"]))
        run = RunFiles(tmp_path / "run", EVIL)
        return ReportInputs(run, [tmp_path / "data/manifests/data.json"], **shared)

    return write


class Page(HTMLParser):
    """Collects tags and text, and checks that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_no_text_becomes_markup_and_nothing_is_loaded(parts, inputs_of):
    html = render_report(inputs_of(parts))
    page = Page(html)
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert not any(name.startswith("on") or name in ("src", "srcset") for name, _ in page.attributes)
    outside = [
        value for name, value in page.attributes if name.endswith("href") and not value.startswith("#")
    ]
    assert not outside
    assert not re.search(r"@import|url\((?!#)", html)
    assert page.text.count(EVIL) >= 10  # run, model, data set, prompt, answer, settings, versions, ...


def test_the_page_says_what_the_files_say(parts, inputs_of):
    html = render_report(inputs_of(parts))
    page = Page(html)
    assert page.tags.count("svg") == 2
    text = " ".join(page.text.split())
    for expected in (
        "fell from 3.5000 to 1.2500",
        "\N{MINUS SIGN}2.2500",
        "15,360",
        "23,456",
        "50.0%",
        "ZeRO-3",
        "256",  # tokens per second: 512 in 2 s
        DIGEST,
        "lmdeploy 0.9.2.post1",
        "empty answer",
        "n/a",
        "你好",
        "4e-05",
        "not set",
    ):
        assert expected in text, expected
    assert render_report(inputs_of(parts)) == html


def test_the_held_out_losses_have_intervals_on_the_same_draws(parts, inputs_of):
    """Every conversation improves by 2.25 nats per token: the change is certain, the losses are not."""
    losses = {"base": (2.5, 4.5), "tuned": (0.25, 2.25)}
    for label, each in losses.items():
        parts[label]["conversations"] = {EVIL: [[100 * loss, 100] for loss in each], "empty": []}
    text = " ".join(Page(render_report(inputs_of(parts))).text.split())
    assert f"{MINUS}2.2500{MINUS}2.2500 … {MINUS}2.2500" in text
    # With two conversations, both draws can be the same one.
    assert "3.50002.5000 … 4.5000" in text and "1.25000.2500 … 2.2500" in text
    del parts["base"]["conversations"]
    assert " … " not in "".join(Page(render_report(inputs_of(parts))).text)


def test_few_steps_no_stages_and_no_prompts(parts, inputs_of):
    parts.update(metrics=parts["metrics"][:1], hf=None, turbomind=None)
    for label in ("base", "tuned"):
        parts[label]["generations"] = []
    page = Page(render_report(inputs_of(parts)))
    assert "Answers to fixed prompts" not in page.text and "TurboMind" not in page.text
    parts["metrics"] = []
    assert Page(render_report(inputs_of(parts))).tags.count("svg") == 1


def test_a_folder_for_a_newer_lmdeploy_is_told(parts, inputs_of):
    direct = parts["turbomind"] | {"files": {"config.json": {"sha256": DIGEST}}}
    del direct["versions"]
    parts["turbomind"] = direct
    text = Page(render_report(inputs_of(parts))).text
    assert "TurboMind config.json" in text and "versions, TurboMind conversion" not in text


def test_a_mixture_is_told(parts, inputs_of, tmp_path):
    count = {"documents": 7, "tokens": 70}
    mixture = {EVIL: {"weight": 1.5, "documents": 1234, "seen": {"documents": 1851, "tokens": 9999}}}
    totals = {"rows": 2, "least_rows": 2, "packed_tokens": 70, "tokens": 70, "dropped": {"too_short": count}}
    totals |= {"waste": {"tokens": 0, "share": 0}, "cut": {"documents": 0, "pieces": 0}, "mixture": mixture}
    plan = {"mode": "best_fit", "max_length": 64, "totals": totals}
    write_json(tmp_path / "plan.json", plan)
    text = Page(render_report(inputs_of(parts, plan=tmp_path / "plan.json"))).text
    assert f"documents of {EVIL} per epoch (weight 1.5)" in text and "1,851 / 1,234 (9,999 token)" in text


def test_different_heldout_sets_are_refused(parts, inputs_of):
    other = copy.deepcopy(parts["tuned"])
    other["heldout_sha256"] = "cd" * 32
    with pytest.raises(UserError, match="different held-out"):
        render_report(inputs_of({**parts, "tuned": other}))


def test_a_long_curve_stays_small_and_keeps_its_shape():
    from snaketune.reporting.plots import loss_curve

    metrics = [{"step": n, "loss": 1000.0 / n, "lr": 1e-4} for n in range(1, 50_001)]
    assert len(loss_curve(metrics)) < 200_000


def test_the_curve_takes_steps_without_a_loss_and_held_out_points():
    from snaketune.reporting.plots import loss_curve

    short = [{"step": i, "loss": None if i == 3 else 2.0 / i, "lr": 1e-4} for i in range(1, 6)]
    with_evals = loss_curve(short, [{"step": 0, "loss": 2.5}, {"step": 5, "loss": 1.5}])
    assert "held-out" in with_evals and "held-out" not in loss_curve(short)


def test_the_command_finds_the_metrics_through_train_json(parts, inputs_of, tmp_path, run_script):
    parts["turbomind"] = None
    inputs, folder = inputs_of(parts), tmp_path / "run"
    page = render_report(inputs)
    run_script(
        *("render_report.py", "--output", tmp_path / "report.html", "--run", EVIL),
        *("--config", folder / "config.json", "--train-manifest", folder / "train.json"),
        *("--dataset-manifests", *inputs.dataset_manifests),
        *("--base-evaluation", folder / "evaluation/base.json"),
        *(
            "--tuned-evaluation",
            folder / "evaluation/tuned.json",
            "--hf-manifest",
            folder / "hf/manifest.json",
        ),
    )
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_what_the_command_is_not_given_is_not_shown(parts, inputs_of, tmp_path, run_script):
    inputs, folder = inputs_of(parts), tmp_path / "run"
    elsewhere = tmp_path / "elsewhere.jsonl"
    (folder / parts["train"]["run_folder"] / names.METRICS).rename(elsewhere)
    run_script(
        *("render_report.py", "--output", tmp_path / "report.html", "--run", EVIL, "--metrics", elsewhere),
        *("--config", folder / "config.json", "--train-manifest", folder / "train.json"),
        *("--dataset-manifests", *inputs.dataset_manifests),
        *("--base-evaluation", folder / "evaluation/base.json"),
        *("--tuned-evaluation", folder / "evaluation/tuned.json"),
    )
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "TurboMind" not in text and "Hugging Face folder" not in text and "optimizer step" in text


@pytest.mark.parametrize("section", [section.name for section in SECTIONS])
def test_every_section_has_its_place(section):
    folder = Path(report.__file__).parent / "templates"
    template = (folder / f"{section}.html.j2").read_text(encoding="utf-8")
    assert f'<h2 id="{section.replace("_", "-")}">' in template
