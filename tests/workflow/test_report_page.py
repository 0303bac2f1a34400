"""The report of a real run in a real browser: the page shows the figures of the JSON files."""

from __future__ import annotations

import json

import pytest
from training_cost import core_hours

from browser import cells, open_browser, percent
from snaketune.common.files import read_json
from snaketune.reporting.tool_call_tables import comparison_rows


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """(browser with the report open, folder of the run)."""
    run = finished.folder / "results" / "demo"
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        browser.look(1200)
        browser.open(run / "report.html")
        yield browser, run


def test_the_page_is_small_and_asks_nobody(page):
    browser, run = page
    assert (run / "report.html").stat().st_size < 5_000_000
    assert [url.split(":")[0] for url in browser.requests] == ["file"]


def test_the_figures_of_tool_calls_are_those_of_the_json(page):
    browser, run = page
    base, tuned = (read_json(run / "evaluation" / f"tool_calls.{label}.json") for label in ("base", "tuned"))
    rows = {row["metric"]: row for row in comparison_rows(base, tuned) if row["scope"] == "all"}
    shown = cells(browser, 'table.calls[data-scope="all"] tbody tr')
    metrics = browser.evaluate(
        "[...document.querySelectorAll('table.calls[data-scope=\"all\"] tbody tr')].map(row => row.dataset.metric)"
    )
    assert "recall" in metrics and len(shown) == len(metrics)
    for metric, (_, *figures, count) in zip(metrics, shown, strict=True):
        row = rows[metric]
        assert count == str(row["count"])
        for figure, interval, sign in zip(
            figures, (row["base"], row["tuned"], row["difference"]), ("", "", "+"), strict=True
        ):
            bounds = (
                ""
                if interval.low is None
                else f"{percent(interval.low, sign)} … {percent(interval.high, sign)}"
            )
            assert figure.split("\n") == [percent(interval.value, sign), *([bounds] if bounds else [])], (
                metric
            )
    plain = cells(browser, 'tr[data-metric="loss.plain_text"]')[0]
    assert plain[1].split("\n")[0] == f"{rows['loss.plain_text']['base'].value:.3f}"
    assert (
        len(browser.evaluate("[...document.querySelectorAll('.example')].map(each => each.innerText)")) == 6
    )


def test_other_figures_are_those_of_the_json(page):
    browser, run = page
    tuned, base = (read_json(run / "evaluation" / f"{label}.json") for label in ("tuned", "base"))
    whole = cells(browser, "#heldout-table tr.total")[0]
    assert [cell.split("\n")[0] for cell in whole[1:3]] == [f"{base['loss']:.4f}", f"{tuned['loss']:.4f}"]
    assert all(" … " in cell for cell in whole[1:4])
    plan = read_json(next(run.parent.glob("shared/data/*/packs/*/plan.json")))["totals"]
    packing = " ".join(cell for row in cells(browser, "#packing-table tr") for cell in row)
    assert f"{plan['packed_tokens']:,} / {plan['tokens']:,}" in packing
    parity = read_json(run / "parity.json")
    assert [row[1] for row in cells(browser, "#gate-ids tbody tr")] == [
        f"{row['equal']} / {row['prompts']}" for row in parity["ids"]
    ]
    cost = {row[0]: row for row in cells(browser, "#cost-table tbody tr")}
    assert cost["evaluate_tool_calls"][1] == "2" and cost["train_model"][1] == "1"
    assert float(cost["train_model"][3]) == pytest.approx(core_hours(run), abs=6e-5)


def test_the_planned_memory_is_within_15_percent_of_what_the_training_took(page):
    """The peak is the kernel's (VmHWM), of the largest process, from the metrics of each step."""
    browser, run = page
    (chosen,) = [row for row in read_json(run / "run_plan.json")["memory"] if row["chosen"]]
    (metrics,) = run.glob("checkpoints/*/metrics.jsonl")
    peak = max(json.loads(line)["cpu_memory_mib"] for line in metrics.read_text().splitlines()) / 1024
    assert chosen["device_gib"] == pytest.approx(peak, rel=0.15)
    (row,) = [row for row in cells(browser, "#plan-table tbody tr") if row[0].startswith("memory")]
    assert row[1:] == [f"{chosen['device_gib']:.4g}", f"{peak:.4g}"]


def test_the_colours_of_a_sample_are_its_mask(page):
    browser, run = page
    shown = browser.evaluate(
        "[...document.querySelectorAll('details.preview')].map(each => [each.querySelector('summary').textContent,"
        " [...each.querySelectorAll('.text .trained')].map(piece => piece.textContent).join('')])"
    )
    assert len(shown) == 2
    for summary, trained in shown:
        dataset, sample = summary.split(":")[0], int(summary.split("sample ")[1].split(",")[0])
        (file,) = run.parent.glob(f"shared/data/*/chatml_llamav13_32k/train/cn/{dataset}/*.bin")
        ids = json.loads(file.read_text().splitlines()[sample])["tokens"]
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(next(run.parent.glob("shared/tokenizer/*/tokenizer.json"))))
        learnt = tokenizer.decode([token for token in ids if token > 0], skip_special_tokens=False)
        assert "".join(trained.split()) == "".join(learnt.split())


def test_two_languages_and_a_phone(page):
    browser, _ = page
    visible = "document.querySelector('main').innerText"
    english = browser.evaluate(visible)
    assert "Held-out loss" in english and "留出数据上的 loss" not in english
    browser.evaluate("document.querySelector('label[for=zh]').click()")
    chinese = browser.evaluate(visible)
    assert "留出数据上的 loss" in chinese and "Held-out loss" not in chinese
    browser.evaluate("document.querySelector('label[for=en]').click()")
    for dark in (False, True):
        browser.look(390, 844, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        colours = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colours[4:-1].split(","))) < 200) == dark
    # The names of datasets beside answers can be longer.
    where = "document.querySelector('.example .who')"
    short = browser.evaluate(f"{where}.textContent")
    browser.evaluate(f"{where}.textContent = 'a_dataset_of_a_long_name/'.repeat(9)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.evaluate(f"{where}.textContent = {json.dumps(short)}")
    browser.look(1200)


def test_snakemakes_own_report_has_captions_and_categories(finished, tmp_path):
    finished.run("--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for word in ("One page about run demo", "the tuned model on held-out", "Conversion gates", "Tool calls"):
        assert word in page, word
