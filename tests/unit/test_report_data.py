"""The report's data section: every number on the page equals a count over the files."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ftdp_files import GOOD
from ftdp_small_tokenizers import small_tokenizer
from test_render_report import evaluation

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json, write_text
from snaketune.common.run_files import RunFiles
from snaketune.reporting.data_summary import data_summary, load_dataset
from snaketune.reporting.report import render_report
from snaketune.reporting.report_inputs import ReportInputs
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.manifests import manifest_paths, write_index
from snaketune.tokenized.tokenizing import tokenize_datasets


class Tables(HTMLParser):
    """Collects the body cells of each table that has an id, in English."""

    def __init__(self, text):
        super().__init__()
        self.tables, self._table, self._cell = {}, None, None
        self.feed(re.sub(r'<span lang="zh">.*?</span>', "", text, flags=re.S))

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id"), [])
        elif tag == "tr":
            self._table.append([])
        elif tag == "td":
            self._cell = ""

    def handle_endtag(self, tag):
        if tag == "td":
            self._table[-1].append(self._cell.strip())
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """Three datasets with bad, held-out, moved, long and injected lines; returns the tokenised folder."""
    root = tmp_path_factory.mktemp("report_data")
    rng = random.Random(4)
    for name, count in (("chat", 300), ("code", 150), ("empty", 0)):
        for part in ("a", "b"):
            lines = [
                GOOD.replace(b"hi", f"{name} {part} {i} {'word ' * rng.choice([1, 5, 60])}".encode())
                for i in range(count)
            ]
            if name == "chat":
                lines[3], lines[40], lines[41] = b"oops", b"[]", b'[{"role": "bot", "content": ""}]'
                lines[50] = GOOD.replace(b"yes", b"<|im_end|>")
                for number in range(51, 61):
                    lines[number] = GOOD.replace(b"hi", b"\\nhi %d" % number)
            file = root / "in" / name / "processed" / "x" / f"{part}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"".join(line + b"\n" for line in lines))
    options = TokenizeOptions(
        max_length=80,
        mask="exact",
        valid="holdout",
        valid_share=0.1,
        heldout_share=0.1,
        on_bad_sample="quarantine",
        max_bad_share=0.05,
    )
    manifests = tokenize_datasets(root / "in", root / "out", small_tokenizer("newlines"), options)
    write_index(root / "out" / "tokenized.json", manifests)
    return root / "out"


def number(cell):
    return int(cell.replace(",", ""))


def count_samples(tokenized, split, name):
    files = sorted((tokenized / "chatml_llamav13_32k" / split / "cn" / name).glob("*.bin"))
    return [[json.loads(line)["tokens"] for line in file.read_bytes().splitlines()] for file in files]


@pytest.fixture
def page(tokenized, tmp_path):
    """The report of a run on that data."""
    keys = ("identity", "data_sha256", "config_sha256", "weights_sha256", "dtype", "git_commit")
    train = dict.fromkeys(keys, "x") | {"steps": 1, "epochs": 1, "tokens": 1, "world_size": 1}
    train |= {"zero_stage": 0, "versions": {}, "run_folder": "checkpoints/x"}
    write_json(tmp_path / "config.json", {})
    write_json(tmp_path / "train.json", train)
    for label, loss in (("base", 2), ("tuned", 1)):
        write_json(tmp_path / "evaluation" / f"{label}.json", evaluation(loss, ""))
    write_text(tmp_path / "checkpoints/x/metrics.jsonl", "")
    inputs = ReportInputs(RunFiles(tmp_path), manifest_paths(tokenized / "tokenized.json"))
    return render_report(inputs)


@pytest.fixture
def tables(page):
    return Tables(page).tables


def test_the_page_counts_what_the_files_hold(tokenized, tables):
    rows = {row[0]: row[1:] for row in tables["datasets"] if row}
    assert list(rows) == ["all", "chat", "code", "empty"]
    sums = [0] * 9
    for name, lines in (("chat", 600), ("code", 300), ("empty", 0)):
        samples = [tokens for file in count_samples(tokenized, "train", name) for tokens in file]
        moved = sum(map(len, count_samples(tokenized, "valid", name)))
        lengths = sorted(map(len, samples))
        cut = lengths.count(80) + sum(
            len(tokens) == 80 for file in count_samples(tokenized, "valid", name) for tokens in file
        )
        tokens, trained = sum(lengths), sum(i > 0 for tokens in samples for i in tokens)
        bad = 6 if name == "chat" else 0
        shown = rows[name]
        assert [number(shown[i]) for i in (0, 1, 3, 4)] == [len(samples), moved, bad, tokens]
        assert sum(map(number, shown[:4])) == lines
        assert shown[5] == f"{100 * trained / max(tokens, 1):.1f}%"
        if samples:
            assert [number(cell) for cell in shown[6:]] == [
                lengths[(len(lengths) - 1) // 2],
                lengths[-1],
                cut,
            ]
        for i in (0, 1, 2, 3, 4, 8):
            sums[i] += number(shown[i])
    assert [number(rows["all"][i]) for i in (0, 1, 2, 3, 4, 8)] == [sums[i] for i in (0, 1, 2, 3, 4, 8)]
    assert number(rows["all"][8]) > 100, "some were cut"


def test_masks_reasons_and_places(tokenized, tables):
    stats = {
        name: read_json(tokenized / "manifests" / name / "stats.json") for name in ("chat", "code", "empty")
    }
    counts = ("straddling_messages", "tokens_differing_from_compat", "control_messages")
    for row in tables["masks"][2:]:
        shown = [number(row[2]), number(row[3]), number(row[5])]
        assert shown == [stats[row[0]][key] for key in counts]
        assert (row[1], row[4]) == ("exact", "literal")
    chat = next(row for row in tables["masks"] if row and row[0] == "chat")
    assert number(chat[2]) >= 1 and number(chat[5]) == 2

    quarantine = sorted((tokenized / "manifests" / "chat").glob("*.quarantine.jsonl"))
    assert tables["quarantine"][1:] == [[str(path), "3"] for path in quarantine] and len(quarantine) == 2
    assert tables["reasons"][1:] == [
        ["invalid [n].role", "2"],
        ["not JSON", "2"],
        ["the conversation is empty", "2"],
    ]

    rows = tables["longest"][1:]
    assert len(rows) == 10
    for source, path, sample, tokens in rows:
        lines = Path(path).read_bytes().splitlines()
        file, line = source.rsplit(":", 1)
        dataset = file.split("/")[0]
        assert f"/cn/{dataset}/" in path
        assert b"word " * 60 in (tokenized.parent / "in" / file).read_bytes().splitlines()[int(line) - 1]
        assert len(json.loads(lines[number(sample)])["tokens"]) == number(tokens) == 80


def test_conversations_that_lost_all_their_trained_tokens(tokenized, page):
    lost = {}
    for name in ("chat", "code", "empty"):
        samples = [
            tokens
            for split in ("train", "valid")
            for file in count_samples(tokenized, split, name)
            for tokens in file
        ]
        # In these data every conversation has an answer.
        lost[name] = sum(len(tokens) == 80 and not any(i > 0 for i in tokens) for tokens in samples)
    assert lost["chat"] > 100 and lost["code"] > 50 and not lost["empty"]
    shown = re.findall(r'<p class="bad"><span lang="en">(.*?): ([\d,]+) cut conversations lost', page)
    folder = tokenized / "chatml_llamav13_32k" / "train" / "cn"
    assert shown == [(str(folder / name), str(lost[name])) for name in ("chat", "code")]
    assert page.count("请调高 data.max_tokens") == 2


def test_a_page_of_many_datasets_draws_few(tokenized):
    datasets = [load_dataset(path) for path in manifest_paths(tokenized / "tokenized.json")]
    many = [
        each._replace(stats=each.stats | {"dataset": f"{each.stats['dataset']}-{i:03}"})
        for each in datasets
        for i in range(100)
    ]
    summary = data_summary(many)
    assert len(summary["rows"]) == 301 and len(summary["histograms"]) == 9 and len(summary["longest"]) == 10
    name, histogram = summary["histograms"][0]
    assert name == "all" and sum(histogram["counts"]) == summary["rows"][0]["samples"]
    assert len(summary["quarantine_files"][0]) == 20 and summary["quarantine_files"][1] == 180
    assert len(summary["untrained"][0]) == 20 and summary["untrained"][1] == 180


def test_the_cost_of_training_is_that_of_all_attempts(tmp_path):
    from snaketune.reporting.cost import read_cost

    for stage, seconds, cpu in (("train_model", 100.0, 360.0), ("evaluate_model", 50.0, 36.0)):
        file = tmp_path / stage / "demo.tsv"
        file.parent.mkdir()
        file.write_text(f"s\tmax_rss\tcpu_time\n{seconds}\t900\t{cpu}\n")
    last = {"seconds": 90.0, "core_seconds": 720.0, "ranks": 4}
    killed = {"seconds": 3600.0, "core_seconds": 7200.0, "ranks": 2}
    rows = {row["stage"]: row for row in read_cost(tmp_path, ["demo"], [killed, last], on_gpus=True)}
    train, everything = rows["train_model"], rows[None]
    assert train["jobs"] == 2 and train["seconds"] == 3700 and train["core_hours"] == pytest.approx(2.2)
    assert train["gpu_hours"] == pytest.approx(2 + 4 * 100 / 3600)
    assert everything["seconds"] == 3750 and everything["gpu_hours"] == train["gpu_hours"]


def test_stats_that_are_missing(tmp_path):
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(UserError, match=r"d/stats\.json is missing"):
        load_dataset(tmp_path / "d.json")
