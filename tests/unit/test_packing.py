"""Reads tokenised files."""

from __future__ import annotations

import pytest

from pack_samples import write_bin
from snaketune.common.cli import UserError
from snaketune.tokenized.bin_reader import TokenizedFile, read_line


def test_id_zero_is_not_trained(tmp_path):
    ids, labels = TokenizedFile(write_bin(tmp_path / "f.bin", [[1, 0, -5, 6]]))[0]
    assert ids.tolist() == [1, 0, 5, 6]
    assert labels.tolist() == [1, -100, -100, 6]


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


@pytest.mark.parametrize(
    "line", [b"[1, 2]", b'{"tokens": 3}', b'{"tokens": ["a"]}', b'{"tokens": [1, [2]]}', b"{"]
)
def test_what_is_no_line_of_tokens(line):
    with pytest.raises(ValueError):
        read_line(line)


def test_zero_that_is_trained():
    """The exact mask writes it as -0, which JSON readers read as 0."""
    ids, labels = read_line(b'{"tokens": [-0, 0, 5, -0]}\n')
    assert ids.tolist() == [0, 0, 5, 0]
    assert labels.tolist() == [0, -100, 5, 0]
