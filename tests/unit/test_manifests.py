"""Finds, reads and checks the manifests of tokenised folders."""

from __future__ import annotations

import pytest
from ftdp_small_tokenizers import small_tokenizer

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.layout import (
    INDEX_FILE,
    dataset_folder,
    dataset_of,
    manifest_path,
    meta_path,
    tokenized_dir_of,
)
from snaketune.tokenized.manifests import (
    Manifests,
    list_manifests,
    manifest_paths,
    read_index,
    read_manifest,
    write_index,
)
from snaketune.tokenized.tokenizing import tokenize_datasets

ENCODING = {"mask": "exact", "control_tokens": "control"}


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory, write_processed):
    folder = tmp_path_factory.mktemp("manifests")
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    write_processed(folder / "in", {"b": [talk], "a.1": [talk, talk]})
    made = tokenize_datasets(
        folder / "in", folder / "out", small_tokenizer("byte_level"), TokenizeOptions(**ENCODING)
    )
    write_index(folder / "out" / INDEX_FILE, made)
    return folder / "out"


def test_all_are_found_with_the_encoding_in_them(tokenized):
    paths = [manifest_path(tokenized, name) for name in ("a.1", "b")]
    assert list_manifests(tokenized) == paths == manifest_paths(tokenized / INDEX_FILE)
    assert manifest_paths(paths[0]) == paths[:1]
    for path in paths:
        encoding = ChatEncoding.from_options(read_manifest(path)["options"])
        assert encoding == ChatEncoding(template="internlm2_chat", **ENCODING)
    assert list_manifests(tokenized / "nowhere") == []


def test_a_file_finds_its_own(tokenized, tmp_path):
    manifests = Manifests()
    (file,) = dataset_folder(tokenized, "train", "a.1").glob("*.bin")
    entry = manifests.of(file)
    assert entry.path == manifest_path(tokenized.resolve(), "a.1") and dataset_of(file) == "a.1"
    assert (entry.manifest["dataset"], entry.file["samples"]) == ("a.1", 2)
    assert meta_path(file).is_file() and tokenized_dir_of(file) == tokenized
    (tmp_path / "link.bin").symlink_to(file)
    assert manifests.of(tmp_path / "link.bin") == entry
    assert manifests.of(file.with_name("other.bin")) is None
    assert manifests.of(tmp_path / "x.bin") is None and tokenized_dir_of(tmp_path / "x.bin") is None


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"datasets": {}}', "KeyError"),
        ('{"format": 2, "dataset": "d", "files": []}', "format 2"),
    ],
)
def test_what_is_no_manifest_is_one_clear_error(tmp_path, content, found):
    path = manifest_path(tmp_path, "d")
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="is not the manifest of a tokenised dataset") as error:
        read_manifest(path)
    assert found in str(error.value) and str(path) in str(error.value)
    assert "tokenize_dataset.py again" in str(error.value)


def test_an_index_without_its_manifests(tokenized, tmp_path):
    write_json(tmp_path / INDEX_FILE, read_json(tokenized / INDEX_FILE))
    with pytest.raises(UserError, match=r"a\.1\.json is missing"):
        read_index(tmp_path / INDEX_FILE)
