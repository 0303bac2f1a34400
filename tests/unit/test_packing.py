"""Packing and sampling against a plain implementation: lay the shuffled conversations end to end and cut."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from ftdp.packing import PackedFile, TokenizedFile, load_packed_files, sampler_indices


def write_bin(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, data = [], b""
    for tokens in samples:
        rows.append((len(data), len(tokens)))
        data += (json.dumps({"tokens": tokens}) + "\n").encode()
    path.write_bytes(data)
    with open(f"{path}.meta", "wb") as file:
        np.save(file, rows)
    return path


def random_samples(rng, count, longest):
    return [[rng.randint(-99, 99) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def naive_rows(samples, packed_length, seed):
    """Every token with its label, its place in its stretch and the number of its conversation, cut into rows."""
    permutation = np.arange(len(samples))
    np.random.RandomState(seed).shuffle(permutation)
    order = permutation.tolist()
    stream = [(token, index) for index in order for token in samples[index]]
    rows = []
    for start in range(0, len(stream) - packed_length + 1, packed_length):
        cut = stream[start : start + packed_length]
        positions, borders, previous = [], [], None
        for place, (_, index) in enumerate(cut):
            if index != previous:
                borders.append(place)
            positions.append(place - borders[-1])
            previous = index
        rows.append(
            {
                "input_ids": [abs(token) for token, _ in cut],
                "labels": [token if token > 0 else -100 for token, _ in cut],
                "position_ids": positions,
                "cumulative_len": [*borders, packed_length],
            }
        )
    return rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 30),
    longest=st.sampled_from([1, 5, 40]),
    packed_length=st.sampled_from([1, 2, 7, 16, 64]),
    packing_seed=st.sampled_from([1024, 7]),
)
def test_rows_equal_the_naive_ones(tmp_path_factory, seed, count, longest, packed_length, packing_seed):
    samples = random_samples(random.Random(seed), count, longest)
    path = write_bin(tmp_path_factory.mktemp("packing") / "f.bin", samples)
    rows = PackedFile(TokenizedFile(path), packed_length, packing_seed)
    expected = naive_rows(samples, packed_length, packing_seed)
    assert len(rows) == len(expected)
    for row, plain in zip((rows[index] for index in range(len(rows))), expected, strict=True):
        assert {key: value.tolist() for key, value in row.items()} == plain
        assert all(value.dtype == np.int64 for value in row.values())


def test_what_xtuner_itself_gave(tmp_path):
    # The output of XTuner 0.2.0's own classes for these samples.
    samples = [[10, 11], [20], [30, -31, 32], [40, 41], [0, 51]]
    rows = PackedFile(TokenizedFile(write_bin(tmp_path / "f.bin", samples)), 4)
    assert [{key: value.tolist() for key, value in rows[index].items()} for index in range(len(rows))] == [
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
    assert sampler_indices(11, rank=1, world_size=2, epoch=3) == [0, 9, 1, 8, 3]
    with pytest.raises(IndexError):
        rows[2]


def test_id_zero_is_not_trained(tmp_path):
    ids, labels = TokenizedFile(write_bin(tmp_path / "f.bin", [[1, 0, -5, 6]]))[0]
    assert ids.tolist() == [1, 0, 5, 6]
    assert labels.tolist() == [1, -100, -100, 6]


def test_min_length_and_pickling(tmp_path):
    file = TokenizedFile(write_bin(tmp_path / "f.bin", [[1], [1, 2, 3], [4, 5], [6, 7, 8, 9]]), min_length=3)
    assert file.lengths.tolist() == [3, 4]
    assert file[1][0].tolist() == [6, 7, 8, 9]
    copy = pickle.loads(pickle.dumps(file))  # noqa: S301  (our own object)
    assert copy[0][0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("n", [0, 1, 7, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 5])
def test_sampler(n, world_size, epoch):
    order = np.arange(n)
    np.random.RandomState(1024 + epoch).shuffle(order)
    kept = order[: n - n % world_size].tolist()
    dealt = [sampler_indices(n, rank, world_size, epoch) for rank in range(world_size)]
    assert dealt == [
        [kept[i] for i in range(len(kept)) if i % world_size == rank] for rank in range(world_size)
    ]
    assert len({len(each) for each in dealt}) == 1


def test_load_packed_files(tmp_path):
    train = tmp_path / "train"
    write_bin(train / "cn" / "b" / "x.bin", [[1] * 5])
    write_bin(train / "cn" / "a" / "y.bin", [[2] * 9])
    write_bin(train / "cn" / "a" / "empty.bin", [])
    write_bin(train / "top.bin", [[3] * 4])
    rows = load_packed_files(train, None, 4)
    assert [each.file.path.name for each in rows] == ["top.bin", "y.bin", "x.bin"]
    assert [len(each) for each in rows] == [1, 2, 1]
    order = tmp_path / "data_order.txt"
    order.write_text("cn/b/x.bin\ntop.bin\n")
    assert [each.file.path.name for each in load_packed_files(train, order, 4)] == ["x.bin", "top.bin"]
    with pytest.raises(
        UserError, match=r"no file fills a row of 10 tokens(.|\n)*y.bin: 9(.|\n)*max_length to 9"
    ):
        load_packed_files(train, None, 10)
    order.write_text("cn/b/gone.bin\n")
    with pytest.raises(UserError, match=r"gone\.bin is missing"):
        load_packed_files(train, order, 4)


def test_broken_files_are_named(tmp_path):
    path = write_bin(tmp_path / "f.bin", [[1, 2], [3]])
    good_meta = (tmp_path / "f.bin.meta").read_bytes()
    (tmp_path / "f.bin.meta").write_bytes(good_meta[:100])
    with pytest.raises(UserError, match=r"f\.bin\.meta"):
        TokenizedFile(path)
    (tmp_path / "f.bin.meta").write_bytes(good_meta)
    path.write_bytes(b'{"tokens": [1]}\n{"tokens": [3]}\n')
    with pytest.raises(UserError, match=r"f\.bin: the line at byte 0"):
        TokenizedFile(path)[0]
    path.write_bytes(b"{}\n")
    with pytest.raises(UserError, match="does not belong"):
        TokenizedFile(path)
    (tmp_path / "f.bin.meta").unlink()
    with pytest.raises(UserError, match=r"f\.bin\.meta is missing"):
        TokenizedFile(path)
