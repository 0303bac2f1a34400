"""Several runs from one entry: they share tokenised data, and one page compares them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from training_cost import core_hours

from browser import MINUS, cells, open_browser, percent
from snaketune.common.files import read_json
from snaketune.reporting.tool_call_tables import comparison_rows

RUNS = ["demo", "mix-weights_tool_calls0", "mix-weights_plain_chat1.5"]


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory):
    """The finished project with two more runs. Finished files are hard links and are not changed."""
    folder = tmp_path_factory.mktemp("several") / "project"
    shutil.copytree(finished.folder, folder, copy_function=os.link, symlinks=True)
    project = replace(finished, code=folder / "code", folder=folder)
    config = project.config
    project.config_file.unlink()
    project.config_file.write_text(json.dumps(config))
    mix = {"matrix": {"packing.weights": [{"tool_calls": 0}, {"plain_chat": 1.5}]}}
    off = {"enabled": False}
    project.configure(runs={"mix": {**mix, "turbomind": off, "parity": off, "train": {"max_steps": 4}}})
    return project


@pytest.fixture(scope="module")
def results(project):
    """The results folder, with the comparison page."""
    planned = project.planned("compare")
    assert {
        rule for rule in planned if "tokeni" in rule or rule in ("split_heldout", "write_data_order")
    } == set()
    assert (planned["plan_packing"], planned["train_model"], planned["compare_runs"]) == (2, 2, 1)
    project.run("compare")
    return project.folder / "results"


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        browser.look(1200)
        browser.open(results / "compare" / "report.html")
        yield browser


def test_one_run_is_no_comparison(finished):
    refused = finished.run("compare", "--dry-run", check=False)
    assert refused.returncode and "only one run to compare" in refused.stdout + refused.stderr


def test_the_runs_share_tokenised_data_and_see_their_own_mixture(project, results):
    (data,) = (results / "shared" / "data").iterdir()
    plans = {}
    for run in RUNS:
        train = read_json(results / run / "train.json")
        (plans[run],) = [
            plan
            for plan in map(read_json, data.glob("packs/*/plan.json"))
            if plan["plan_sha256"] == train["plan_sha256"]
        ]
    digests = [[file["bin_sha256"] for file in plan["files"]] for plan in plans.values()]
    assert digests[0] == digests[1] == digests[2]
    assert "mixture" not in plans["demo"]["totals"]
    left = plans[RUNS[1]]["totals"]["mixture"]
    assert left["tool_calls"]["seen"]["documents"] == 0 < left["tool_calls"]["left_out"]["documents"]
    more = plans[RUNS[2]]["totals"]["mixture"]["plain_chat"]
    assert more["seen"]["documents"] == int(more["documents"] * 1.5 + 0.5)
    assert project.planned("compare") == {}


def test_the_figures_are_those_of_the_runs(page, results):
    assert [url.split(":")[0] for url in page.requests] == ["file"]
    calls = [read_json(results / run / "evaluation" / "tool_calls.tuned.json") for run in RUNS]
    expected = [
        {row["metric"]: row for row in comparison_rows(calls[0], other) if row["scope"] == "all"}
        for other in calls[1:]
    ]
    shown = cells(page, 'table[data-kind="calls"][data-scope="all"] tbody tr')
    metrics = page.evaluate(
        '[...document.querySelectorAll(\'table[data-kind="calls"][data-scope="all"] tbody tr\')].map(r => r.dataset.metric)'
    )
    assert "recall" in metrics
    for metric, (_, base, *others, _) in zip(metrics, shown, strict=True):
        assert base.split("\n")[0] == percent(expected[0][metric]["base"].value)
        for cell, rows in zip(others, expected, strict=True):
            value, change = rows[metric]["tuned"], rows[metric]["difference"]
            words = [percent(value.value)] + ([] if change.value is None else [percent(change.value, "+")])
            if change.low is not None:
                words.append(f"{percent(change.low, '+')} … {percent(change.high, '+')}")
            assert cell.split("\n") == words, metric
    losses = [read_json(results / run / "evaluation" / "tuned.json") for run in RUNS]
    rows = cells(page, 'table[data-kind="heldout"] tbody tr')
    assert [row[0] for row in rows] == ["all", *sorted(losses[0]["datasets"])]
    for row, name in zip(rows, [None, *sorted(losses[0]["datasets"])], strict=True):
        scope = losses if name is None else [each["datasets"][name] for each in losses]
        assert [cell.split("\n")[0] for cell in row[1:4]] == [f"{each['loss']:.4f}" for each in scope]
        change = scope[1]["loss"] - scope[0]["loss"]
        lines = row[2].split("\n")
        assert lines[1] == f"{change:+.3f}".replace("-", MINUS)
        low, high = (float(bound.replace(MINUS, "-")) for bound in lines[2].split(" … "))
        assert low <= change + 5e-4 and change - 5e-4 <= high


def test_settings_curves_and_cost(page, results):
    settings = {row[0]: row[1:] for row in cells(page, "#settings-table tbody tr")}
    assert settings["packing.weights"] == ["not set", '{"tool_calls": 0}', '{"plain_chat": 1.5}']
    assert settings["train.max_steps"] == ["6", "4", "4"] and "train.lr" not in settings
    runs = cells(page, "#runs tbody tr")
    assert [row[:2] for row in runs] == [[RUNS[0], "6"], [RUNS[1], "4"], [RUNS[2], "4"]]
    assert page.evaluate("document.querySelectorAll('figure svg').length") == 2
    cost = {row[0]: row for row in cells(page, "#cost-table tbody tr")}
    assert float(cost["train_model"][2].split("\n")[0]) == pytest.approx(
        core_hours(results / RUNS[1]), abs=6e-5
    )
    assert cost["merge_tokenized"][1:4] == ["", "", ""] and cost["merge_tokenized"][4]


def test_languages_colours_and_a_phone(page):
    visible = "document.querySelector('main').innerText"
    assert "Held-out loss" in page.evaluate(visible) and "留出数据上的" not in page.evaluate(visible)
    page.evaluate("document.querySelector('label[for=zh]').click()")
    assert "留出数据上的" in page.evaluate(visible) and "Held-out loss" not in page.evaluate(visible)
    page.evaluate("document.querySelector('label[for=en]').click()")
    for dark in (False, True):
        page.look(390, 844, dark=dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.look(1200)


def test_lineage_knows_the_page(results, run_script):
    tree = run_script("lineage.py", results / "compare" / "report.html").stdout
    assert tree.count("evaluation, tuned model") == 6
    for run in RUNS:
        assert f"{run}/evaluation/tuned.json" in tree
