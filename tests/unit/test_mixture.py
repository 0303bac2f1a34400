"""Dataset weights: how often each document is in an epoch's rows, against a slow count, and the messages."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_samples import random_samples, write_bin
from snaketune.common.cli import UserError
from snaketune.packing.pack_plan import open_plan
from snaketune.packing.packed_sequences import PackedSequences
from snaketune.packing.plan_diff import diff_plans
from snaketune.packing.planner import make_plan

WORD = 2**64


def scattered(value):
    """The finaliser of splitmix64, in Python integers."""
    value = (value + 0x9E3779B97F4A7C15) % WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


def slow_copies(files, weights, seed, min_length):
    """Returns how often each document of {name: samples} is seen, computed one document at a time."""
    copies = {}
    by_dataset = {}
    for name in sorted(files):
        begin = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
        for sample, tokens in enumerate(files[name]):
            if len(tokens) >= min_length:
                rank = scattered((begin + sample) % WORD)
                by_dataset.setdefault(name.split("/")[1], []).append((rank, name, sample))
    for dataset, documents in by_dataset.items():
        wanted = Decimal(str(weights.get(dataset, 1))) * len(documents)
        total = int(wanted.quantize(Decimal(1), ROUND_HALF_UP))
        for place, (_, name, sample) in enumerate(sorted(documents)):
            copies[name, sample] = total // len(documents) + (place < total % len(documents))
    return copies


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 25), min_size=3, max_size=4),
    weights=st.lists(st.sampled_from([0, 0.1, 0.3, 0.5, 0.75, 1, 1.5, 2, 3.25]), min_size=2, max_size=2),
    max_length=st.sampled_from([7, 64]),
    min_length=st.sampled_from([1, 3]),
)
def test_each_document_is_seen_as_often_as_its_weight_says(
    tmp_path_factory, seed, counts, weights, max_length, min_length
):
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("mixture")
    files = {
        f"cn/d{index % 3}/f{index}.bin": random_samples(rng, count, 40) for index, count in enumerate(counts)
    }
    for name, samples in files.items():
        write_bin(folder / name, samples)
    given_weights = dict(zip(("d0", "d1"), weights, strict=True))
    expected = slow_copies(files, given_weights, 7, min_length)
    if not sum(expected.values()):
        return
    plan = make_plan(folder, list(files), max_length, seed=7, min_length=min_length, weights=given_weights)
    rows, seen = PackedSequences(plan), Counter()
    for number in range(len(plan)):
        ids = rows[number]["input_ids"].tolist()
        for each in plan.row(number):
            tokens = files[plan.files[each.file]["name"]][each.sample][each.start : each.stop]
            assert [abs(token) for token in tokens] == ids[: len(tokens)]
            ids = ids[len(tokens) :]
            key = plan.files[each.file]["name"], each.sample
            seen.update((key, place) for place in range(each.start, each.stop))
    assert seen == Counter(
        {
            ((name, sample), place): times
            for (name, sample), times in expected.items()
            for place in range(len(files[name][sample]))
            if times
        }
    )
    totals = plan.totals
    assert totals["packed_tokens"] == sum(seen.values())
    if not plan.weights:
        assert "mixture" not in totals and all(weight == 1 for weight in weights)
        return
    parts = totals["mixture"].values()
    assert totals["packed_tokens"] + sum(each["left_out"]["tokens"] for each in parts) + totals["dropped"][
        "too_short"
    ]["tokens"] == totals["tokens"] + sum(each["repeated"]["tokens"] for each in parts)
    for dataset, each in totals["mixture"].items():
        mine = {key: times for key, times in expected.items() if key[0].split("/")[1] == dataset}
        assert each["seen"]["documents"] == sum(mine.values())
        assert each["left_out"]["documents"] == sum(times == 0 for times in mine.values())
        assert each["repeated"]["documents"] == sum(max(times - 1, 0) for times in mine.values())


@pytest.fixture
def three(tmp_path):
    rng = random.Random(3)
    names = [f"cn/{dataset}/{dataset}.bin" for dataset in "abc"]
    for name in names:
        write_bin(tmp_path / "train" / name, random_samples(rng, 20, 12))
    return tmp_path / "train", names


def rows_of(plan):
    rows = PackedSequences(plan)
    return [{key: value.tolist() for key, value in rows[number].items()} for number in range(len(rows))]


@pytest.mark.parametrize("mode", ["best_fit", "xtuner"])
def test_a_dataset_left_out_leaves_the_rows_of_the_others(three, mode):
    folder, names = three
    without = make_plan(folder, names, 32, mode, weights={"b": 0})
    assert rows_of(without) == rows_of(make_plan(folder, [names[0], names[2]], 32, mode))
    assert without.totals["mixture"]["b"]["left_out"]["documents"] == 20


def test_weights_of_one_are_no_weights(three):
    folder, names = three
    plain = make_plan(folder, names, 32)
    assert make_plan(folder, names, 32, weights={"a": 1, "b": 1.0}).sha256() == plain.sha256()
    assert "weights" not in plain.write(folder / "plan")


def test_a_smaller_share_is_part_of_a_larger(three):
    folder, names = three

    def seen(weight):
        plan = make_plan(folder, names, 32, weights={"a": weight})
        return {each.sample for row in range(len(plan)) for each in plan.row(row) if each.file == 0}

    assert len(seen(0.25)) == 5 and seen(0.25) < seen(0.5) < seen(1)


@pytest.mark.parametrize(
    ("weights", "mode", "words"),
    [
        ({"d": 2}, "best_fit", "unknown dataset: d"),
        ({"a": -1}, "best_fit", "invalid weight of a"),
        ({"a": 0.5}, "xtuner", "mode xtuner does not support weight 0.5 for a"),
        ({"a": 0, "b": 0, "c": 0}, "best_fit", "every dataset has weight 0"),
    ],
)
def test_weights_that_cannot_be(three, weights, mode, words):
    folder, names = three
    with pytest.raises(UserError, match=words):
        make_plan(folder, names, 32, mode, weights=weights)


def test_the_script_and_what_changed(three, run_script):
    folder, names = three
    plans = folder.parent / "one", folder.parent / "two"
    flags = ("--train-folder", folder, "--max-length", 16)
    make_plan(folder, names, 16).write(plans[0])
    said = run_script("plan_packing.py", *flags, "--output", plans[1], "--weight", "a=2", "b=0").stdout
    assert "weight   2 of a: 20 documents, seen 40 times in all" in said
    assert open_plan(plans[1]).weights == {"a": 2.0, "b": 0.0}
    found = diff_plans(*plans)
    counts = found["documents"]
    assert found["settings"] == {"weights": [None, {"a": 2.0, "b": 0.0}]}
    assert (counts["only_a"], counts["only_b"], counts["both"]) == (20, 0, 40)
    assert (counts["cut_otherwise"], counts["more_or_less_often"]) == (0, 20)
    assert "more or less often per epoch: 20" in run_script("diff_plans.py", *plans).stdout
    refused = run_script("plan_packing.py", *flags, "--weight", "a=x", "--output", folder / "x", check=False)
    assert refused.returncode == 2 and "found a=x, expected NAME=NUMBER" in refused.stderr
