"""Fuzzing: whatever bytes a file holds, each of its lines comes out once, as a sample or as a bad line, unchanged."""

from __future__ import annotations

import io
import json
import random
import re

from ftdp_files import GOOD, SET_ASIDE, quarantined, raw_line, source_of, tokenize
from ftdp_small_tokenizers import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from snaketune.chat_files.line_reader import LineReader
from snaketune.chat_files.quarantine import quarantine_record
from snaketune.common.cli import UserError
from snaketune.tokenized.block_tokenizer import BlockTokenizer, TokenizeOptions

QUARANTINE = TokenizeOptions(**SET_ASIDE)
fragments = st.one_of(
    st.sampled_from(
        [
            GOOD,
            b"\n",
            b"\r\n",
            b"\r",
            b"\n\n",
            b"\xef\xbb\xbf",
            b"\0",
            b"[]",
            b"[",
            b"]",
            b'"',
            b"\\",
            b" ",
            b"{}",
        ]
    ),
    st.sampled_from(
        [GOOD + b"\n", GOOD[:20], GOOD[20:], b"\xff\xfe", b"\\ud800", b"\xed\xa0\x80", b"null", b"NaN"]
    ),
    st.binary(max_size=12),
    st.text(max_size=8).map(lambda text: json.dumps([{"role": "user", "content": text}]).encode() + b"\n"),
)


@settings(max_examples=300, deadline=None)
@given(data=st.lists(fragments, max_size=12).map(b"".join), block_bytes=st.integers(1, 200))
def test_any_bytes(tmp_path_factory, data, block_bytes):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    with LineReader(path, block_bytes) as reader:
        blocks = list(reader)
    lines = [line for block in blocks for line in block.lines]
    # Python's own reading of text files is the reference, for bytes as for characters.
    text = io.TextIOWrapper(io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")), encoding="latin-1").read()
    assert b"\n".join([*lines, b""]) == text.encode("latin-1") + b"\n" * bool(
        text and not text.endswith("\n")
    )
    assert sum(block.size for block in blocks) == reader.size == len(data)
    assert [block.first_line for block in blocks] == [
        1 + sum(len(block.lines) for block in blocks[:i]) for i in range(len(blocks))
    ]
    strict = BlockTokenizer(small_tokenizer("byte_level"), TokenizeOptions())
    stopped_at = None
    for block in blocks:
        try:
            strict("f", block)
        except UserError as error:
            stopped_at = int(re.match(r"f:(\d+): .", str(error))[1])
            break
    tokenizer = BlockTokenizer(small_tokenizer("byte_level"), QUARANTINE)
    results = [tokenizer("f", block) for block in blocks]
    bad = [each for result in results for each in result.quarantined]
    assert all(raw == lines[number - 1] and reason for number, raw, reason in bad)
    for number, raw, reason in bad:
        assert raw_line(json.loads(quarantine_record("f", number, raw, reason))) == raw
    assert stopped_at == (bad[0][0] if bad else None)
    # The others give what they give alone, and stop at nothing.
    numbers = {number for number, *_ in bad}
    assert len(numbers) == len(bad)
    good = [line for number, line in enumerate(lines, 1) if number not in numbers]
    path.write_bytes(b"\n".join(good))
    with LineReader(path) as reader:
        alone = b"".join(strict("f", block).data for block in reader)
    assert b"".join(result.data for result in results) == alone
    assert alone.count(b"\n") == len(good)


def test_damage_at_random_places(tmp_path):
    rng = random.Random(1)
    whole = b"".join(
        json.dumps(
            [{"role": "user", "content": f"question {i} ü"}, {"role": "assistant", "content": "x" * i}]
        ).encode()
        + b"\n"
        for i in range(200)
    )
    for number in range(12):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        folder = tmp_path / str(number)
        source_of(folder).write_bytes(data)
        totals = tokenize(folder, **SET_ASIDE, heldout_share=0.1)["totals"]
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        count = len(lines) - (not lines[-1])
        assert totals["samples"] + totals["heldout"] + totals["quarantined"] == count
        records = quarantined(folder)
        assert totals["quarantined"] == len(records)
        assert [raw_line(record) for record in records] == [lines[record["line"] - 1] for record in records]
