"""Checks pack plans against plain implementations of XTuner's rows and order and of best-fit decreasing."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_samples import random_samples, write_bin
from snaketune.common.cli import UserError
from snaketune.packing.best_fit import assign_rows, best_fit_decreasing, fill_rows
from snaketune.packing.pack_plan import open_plan
from snaketune.packing.packed_sequences import PackedSequences
from snaketune.packing.planner import make_plan
from snaketune.tokenized.data_order import list_train_files


def xtuner_rows(files, max_length, seed):
    """Returns XTuner's rows, built token by token."""
    rows = []
    for samples in files:
        permutation = np.arange(len(samples))
        np.random.RandomState(seed).shuffle(permutation)
        stream = [(token, index) for index in permutation.tolist() for token in samples[index]]
        for start in range(0, len(stream) - max_length + 1, max_length):
            cut = stream[start : start + max_length]
            positions, boundaries, previous = [], [], None
            for place, (_, index) in enumerate(cut):
                if index != previous:
                    boundaries.append(place)
                positions.append(place - boundaries[-1])
                previous = index
            rows.append(
                {
                    "input_ids": [abs(token) for token, _ in cut],
                    "labels": [token if token > 0 else -100 for token, _ in cut],
                    "position_ids": positions,
                    "cumulative_len": [*boundaries, max_length],
                }
            )
    return rows


def as_lists(row):
    assert all(value.dtype == np.int64 for value in row.values())
    return {key: value.tolist() for key, value in row.items()}


def write_files(folder, files):
    names = [f"cn/d{index % 2}/f{index}.bin" for index in range(len(files))]
    for name, samples in zip(names, files, strict=True):
        write_bin(folder / name, samples)
    return names


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    longest=st.sampled_from([1, 5, 40]),
    max_length=st.sampled_from([2, 7, 16, 64]),
    packing_seed=st.sampled_from([1024, 7]),
)
def test_xtuner_rows(tmp_path_factory, seed, counts, longest, max_length, packing_seed):
    rng = random.Random(seed)
    files = [random_samples(rng, count, longest) for count in counts]
    folder = tmp_path_factory.mktemp("plan")
    expected = xtuner_rows(files, max_length, packing_seed)
    names = write_files(folder / "train", files)
    if not expected:
        with pytest.raises(UserError, match="no file fills a row|no documents to pack"):
            make_plan(folder / "train", names, max_length, "xtuner", packing_seed)
        return
    plan = make_plan(folder / "train", names, max_length, "xtuner", packing_seed)
    rows = PackedSequences(plan)
    assert [as_lists(rows[number]) for number in range(len(rows))] == expected
    with pytest.raises(IndexError):
        rows[len(rows)]
    totals = plan.totals
    assert totals["packed_tokens"] == len(expected) * max_length
    assert totals["tokens"] == sum(len(sample) for samples in files for sample in samples)
    assert totals["packed_tokens"] + totals["dropped"]["end_of_file"]["tokens"] == totals["tokens"]
    assert totals["waste"] == {"tokens": 0, "share": 0}


def test_what_xtuner_itself_gave(tmp_path):
    # The output of XTuner 0.2.0's classes for these documents.
    write_bin(tmp_path / "f.bin", [[10, 11], [20], [30, -31, 32], [40, 41], [0, 51]])
    rows = PackedSequences(make_plan(tmp_path, ["f.bin"], 4, "xtuner"))
    assert [as_lists(rows[number]) for number in range(len(rows))] == [
        {
            "input_ids": [30, 31, 32, 10],
            "cumulative_len": [0, 3, 4],
            "position_ids": [0, 1, 2, 0],
            "labels": [30, -100, 32, 10],
        },
        {
            "input_ids": [11, 0, 51, 20],
            "cumulative_len": [0, 1, 3, 4],
            "position_ids": [0, 0, 1, 0],
            "labels": [11, -100, 51, 20],
        },
    ]
    # Of the five documents, one is cut between the rows, and one is past the end.
    totals = rows.plan.totals
    assert totals["cut"] == {"documents": 1, "pieces": 2, "tokens_without_beginning": 1}
    assert totals["dropped"]["end_of_file"] == {"documents": 1, "tokens": 2}


def naive_best_fit(lengths, capacity):
    """Tries every open row for every slice. Returns the room left in each row."""
    rooms = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    capacity=st.sampled_from([50, 64, 101, 1000]),
)
def test_best_fit_decreasing_leaves_the_rooms_of_the_naive_one(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    rooms = naive_best_fit(lengths, capacity)
    filled = np.bincount(rows, weights=lengths, minlength=len(rooms))
    assert sorted(capacity - filled) == sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), capacity=st.sampled_from([30, 41]))
def test_filling_a_row_finds_the_best_sum(lengths, capacity):
    """Each row holds the longest slice left and the subset of the others that fills the row best."""
    lengths = sorted(lengths, reverse=True)
    rows = fill_rows(np.array(lengths), capacity)
    left = lengths.copy()
    for row in range(rows.max() + 1):
        mine = [length for length, own in zip(lengths, rows, strict=True) if own == row]
        assert mine[0] == left[0]
        sums = {0}
        for length in left[1:]:
            sums |= {each + length for each in sums}
        assert sum(mine[1:]) == max(each for each in sums if each <= capacity - mine[0])
        for length in mine:
            left.remove(length)
    assert left == []


def test_the_better_way_counts():
    # Best-fit decreasing puts 5 and 4 together and needs three rows, where 5 + 3 + 2 and 4 + 3 + 3 fit in
    # two.
    lengths = np.array([5, 4, 3, 3, 3, 2])
    assert best_fit_decreasing(lengths, 10).max() == 2
    rows = assign_rows(lengths, 10)
    assert sorted(np.bincount(rows, weights=lengths)) == [10, 10]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    longest=st.sampled_from([1, 5, 40]),
    max_length=st.sampled_from([2, 7, 16, 64]),
    min_length=st.sampled_from([0, 3]),
    mode=st.sampled_from(["best_fit", "single"]),
)
def test_rows_of_our_modes(tmp_path_factory, seed, counts, longest, max_length, min_length, mode):
    """Every token is in the rows exactly once, no document that fits a row is cut, and no row is too long."""
    rng = random.Random(seed)
    files = [random_samples(rng, count, longest) for count in counts]
    folder = tmp_path_factory.mktemp("plan")
    names = write_files(folder / "train", files)
    kept = {
        (names[file], index): sample
        for file, samples in enumerate(files)
        for index, sample in enumerate(samples)
        if len(sample) >= min_length
    }
    if not kept:
        with pytest.raises(UserError, match="no documents to pack"):
            make_plan(folder / "train", names, max_length, mode, min_length=min_length)
        return
    plan = make_plan(folder / "train", names, max_length, mode, min_length=min_length)
    rows = PackedSequences(plan)
    seen = Counter()
    cut = set()
    for number in range(len(rows)):
        row, at = as_lists(rows[number]), 0
        assert mode == "best_fit" or len(plan.row(number)) == 1
        assert 0 < len(row["input_ids"]) <= max_length
        for each in plan.row(number):
            document = (plan.files[each.file]["name"], each.sample)
            tokens = kept[document][each.start : each.stop]
            end = at + len(tokens)
            assert len(tokens) == each.stop - each.start > 0
            assert row["input_ids"][at:end] == [abs(token) for token in tokens]
            # Nothing in the row can predict the first token of a slice.
            assert row["labels"][at:end] == [-100, *(token if token > 0 else -100 for token in tokens[1:])]
            assert row["position_ids"][at:end] == list(range(len(tokens)))
            seen.update((document, place) for place in range(each.start, each.stop))
            if len(tokens) < len(kept[document]):
                assert len(kept[document]) > max_length
                cut.add(document)
            at = end
        boundaries = np.cumsum([0, *(each.stop - each.start for each in plan.row(number))])
        assert row["cumulative_len"] == boundaries.tolist()
    assert seen == Counter(
        (document, place) for document, tokens in kept.items() for place in range(len(tokens))
    )
    totals = plan.totals
    everything = [sample for samples in files for sample in samples]
    assert (totals["documents"], totals["tokens"]) == (len(everything), sum(map(len, everything)))
    assert totals["packed_tokens"] == len(seen)
    assert totals["waste"]["tokens"] == len(rows) * max_length - len(seen)
    assert totals["least_rows"] == -(-len(seen) // max_length) <= totals["rows"] == len(rows)
    assert totals["cut"]["documents"] == len(cut)
    assert totals["dropped"]["too_short"]["documents"] == len(everything) - len(kept)
    assert totals["dropped"]["end_of_file"] == {"documents": 0, "tokens": 0}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_xtuner_order_over_epochs(tmp_path, world_size):
    """In every epoch, each rank gets the micro-batches of XTuner's sampler."""
    from snaketune.training.packed_data import PackedDataset, PackedSampler

    write_bin(tmp_path / "f.bin", [[number] * 4 for number in range(1, 24)])
    plan = make_plan(tmp_path, ["f.bin"], 4, "xtuner", epochs=2)
    plan.write(tmp_path / "plan")
    dataset = PackedDataset(tmp_path / "plan")
    n, epochs = len(dataset), 4
    expected = [[] for _ in range(world_size)]
    for epoch in range(epochs):
        order = np.arange(n)
        np.random.RandomState(1024 + epoch).shuffle(order)
        total = n // world_size * world_size
        for rank in range(world_size):
            expected[rank] += order[rank:total:world_size].tolist()
    for rank in range(world_size):
        sampler = PackedSampler(dataset, rank=rank, world_size=world_size, seed=42)
        assert len(sampler) == n // world_size
        stream = iter(sampler)
        assert [next(stream) for _ in expected[rank]] == expected[rank]
        for start in (1, len(sampler), len(sampler) + 3, 2 * len(sampler)):
            sampler.seek(start)
            assert next(iter(sampler)) == expected[rank][start]


def test_best_fit_order_does_not_depend_on_the_ranks(tmp_path):
    from snaketune.training.packed_data import PackedDataset, PackedSampler

    write_bin(tmp_path / "f.bin", [[number] * 4 for number in range(1, 24)])
    make_plan(tmp_path, ["f.bin"], 4).write(tmp_path / "plan")
    dataset = PackedDataset(tmp_path / "plan")
    sequences = []
    for world_size in (1, 2, 3):
        ranks = [iter(PackedSampler(dataset, rank=r, world_size=world_size)) for r in range(world_size)]
        sequences.append([next(ranks[entry % world_size]) for entry in range(96)])
    assert sequences[0] == sequences[1] == sequences[2]
    epochs = [sequences[0][start : start + 23] for start in range(0, 92, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    rows = PackedSampler(dataset, shuffle=False, rank=1, world_size=2)
    stream = iter(rows)
    assert [next(stream) for _ in range(13)] == [*range(1, 23, 2), 0, 2]


def test_data_order(tmp_path):
    """The data order decides the row numbers in mode xtuner and does not matter in mode best_fit."""
    rng = random.Random(5)
    names = write_files(tmp_path / "train", [random_samples(rng, 9, 20) for _ in range(3)])
    digests = ["a" * 64, "b" * 64, "c" * 64]
    same, other = (
        [
            make_plan(tmp_path / "train", order, 16, mode, bin_sha256=known).sha256()
            for order, known in ((names, digests), (names[::-1], digests[::-1]))
        ]
        for mode in ("best_fit", "xtuner")
    )
    assert same[0] == same[1] and other[0] != other[1]
    alone = [make_plan(tmp_path / "train", order, 16, "single").sha256() for order in (names, names[::-1])]
    assert alone[0] == alone[1]
    assert make_plan(tmp_path / "train", names, 16, seed=7, bin_sha256=digests).sha256() != same[0]
    assert make_plan(tmp_path / "train", names, 16, bin_sha256=["d" * 64, *digests[1:]]).sha256() != same[0]


def test_plan_on_disk(tmp_path):
    rng = random.Random(3)
    names = write_files(tmp_path / "train", [random_samples(rng, 40, 30) for _ in range(3)])
    plan = make_plan(tmp_path / "train", names, 32, epochs=3)
    written = plan.write(tmp_path / "packs" / "p")
    opened = open_plan(tmp_path / "packs" / "p" / "plan.json")
    assert opened.sha256() == plan.sha256() == written["plan_sha256"]
    assert opened.train_folder == tmp_path / "train" and not written["train_folder"].startswith("/")
    assert [opened.order(epoch).tolist() for epoch in range(5)] == [plan.order(e).tolist() for e in range(5)]
    rows, again = PackedSequences(plan), pickle.loads(pickle.dumps(PackedSequences(opened)))  # noqa: S301  (our own object)
    assert all(as_lists(rows[number]) == as_lists(again[number]) for number in range(len(rows)))
    # The data moved to another folder.
    (tmp_path / "train").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is not the file that the pack plan was made from"):
        open_plan(tmp_path / "packs" / "p")


def test_more_files_than_may_be_open(tmp_path):
    import resource

    names = [f"f{number:03}.bin" for number in range(300)]
    for number, name in enumerate(names):
        write_bin(tmp_path / name, [[number + 1] * 2])
    rows = PackedSequences(make_plan(tmp_path, names, 400))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        ids = np.concatenate([rows[number]["input_ids"] for number in range(len(rows))])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(ids.tolist()) == [number + 1 for number in range(300) for _ in range(2)]


def test_broken_plans_and_data_are_named(tmp_path):
    write_bin(tmp_path / "f.bin", [[1, 2, 3], [4, 5, 6]])
    folder = tmp_path / "plan"
    with pytest.raises(UserError, match=r"plan\.json is missing"):
        open_plan(folder)
    make_plan(tmp_path, ["f.bin"], 6).write(folder)
    data = (tmp_path / "f.bin").read_bytes()
    (tmp_path / "f.bin").write_bytes(data.replace(b"1, 2, 3", b"1,2 ]}#"))
    with pytest.raises(UserError, match=r"f\.bin: the line at byte 0 does not match the pack plan"):
        PackedSequences(open_plan(folder))[0]
    (tmp_path / "f.bin").write_bytes(data + b" ")
    with pytest.raises(UserError, match=rf"f\.bin is not the file(.|\n)*{len(data)} bytes"):
        open_plan(folder)
    (tmp_path / "f.bin").write_bytes(data)
    with open(folder / "slices.npy", "r+b") as file:
        file.truncate(150)
    with pytest.raises(UserError, match=r"slices\.npy cannot be read"):
        open_plan(folder)
    np.save(folder / "slices.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"do not match plan\.json"):
        open_plan(folder)
    (folder / "plan.json").write_text(json.dumps({"format": 2, "mode": "best_fit"}))
    with pytest.raises(UserError, match="not a pack plan"):
        open_plan(folder)
    with pytest.raises(UserError, match=r"gone\.bin is missing"):
        make_plan(tmp_path, ["gone.bin"], 6)
    with pytest.raises(UserError, match="invalid packing mode"):
        make_plan(tmp_path, ["f.bin"], 6, "first_fit")


@pytest.mark.parametrize("max_length", [2048, 4096, 8192, 32768])
def test_the_shipped_conversations_waste_next_to_nothing(shared_tokens, max_length):
    plan = make_plan(*shared_tokens, max_length)
    totals = plan.totals
    # No plan can waste less: the fewest rows that could hold the tokens, minus the tokens. With twelve rows
    # that is 4%.
    bound = -(-totals["tokens"] // max_length) * max_length - totals["tokens"]
    assert totals["waste"]["tokens"] == bound
    assert totals["waste"]["share"] < 0.005 or max_length == 32768
    assert totals["packed_tokens"] == totals["tokens"] and not any(
        value["documents"] for value in totals["dropped"].values()
    )
    lengths = np.concatenate([np.load(f"{shared_tokens[0] / name}.meta")[:, 1] for name in shared_tokens[1]])
    assert totals["cut"]["documents"] == int((lengths > max_length).sum())
    assert totals["rows"] == totals["least_rows"]
    # XTuner's packing cuts a document at the end of nearly every row.
    other = make_plan(*shared_tokens, max_length, "xtuner").totals
    assert other["cut"]["documents"] > 0.9 * other["rows"]


@pytest.fixture(scope="module")
def shared_tokens(shared_data, tmp_path_factory, run_script):
    """Returns train folder and files of the shared conversations, tokenised with Mistral's tokenizer."""
    folder = tmp_path_factory.mktemp("shared")
    run_script(
        *("extend_tokenizer.py", "--tokenizer-path", shared_data / "mistral_v1_tokenizer"),
        *("--tokenizer-w-special-tokens-save-dir", folder / "tokenizer"),
    )
    run_script(
        *("tokenize_dataset.py", "--processed-dir", shared_data / "ftdp", "--tokenized-dir", folder / "data"),
        *("--tokenizer-path", folder / "tokenizer"),
    )
    train = folder / "data" / "chatml_llamav13_32k" / "train"
    return train, list_train_files(train)
