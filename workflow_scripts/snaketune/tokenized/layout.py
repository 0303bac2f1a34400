"""The layout of a tokenised folder. Imports nothing heavy: the workflow uses it too.

<tokenized_dir>/chatml_llamav13_32k/{train,valid}/cn/<dataset>/<file>.bin and .bin.meta    as in XTuner 0.2.0
<tokenized_dir>/chunks/<dataset>/<file>/                        records of finished chunks (see `chunk_store`)
<tokenized_dir>/manifests/<dataset>.json                        manifest, written last (see `manifests`)
<tokenized_dir>/manifests/<dataset>/stats.json                  statistics (see `stats`)
<tokenized_dir>/manifests/<dataset>/<file>.quarantine.jsonl     bad lines (see `quarantine`)
<tokenized_dir>/tokenized.json                                  digests of all manifests
"""

from __future__ import annotations

import os
from pathlib import Path

from snaketune.common import result_paths

TEMPLATE_FOLDER = "chatml_llamav13_32k"
INDEX_FILE = Path(result_paths.TOKENIZED).name
BIN = ".bin"
META = ".meta"
SPLITS = ("train", "valid")


def bin_name(source: str | os.PathLike) -> str:
    """Returns the `.bin` name for a JSONL file."""
    return f"{Path(source).stem}{BIN}"


def meta_path(bin_file: str | os.PathLike) -> Path:
    """Returns the path of a `.bin` file's meta file."""
    return Path(f"{bin_file}{META}")


def dataset_folder(tokenized_dir: str | os.PathLike, split: str, dataset: str) -> Path:
    """Returns the folder of a dataset's tokenised files; `split` is train or valid."""
    return Path(tokenized_dir) / TEMPLATE_FOLDER / split / "cn" / dataset


def dataset_of(bin_file: str | os.PathLike) -> str:
    """Returns the dataset of a `.bin` file, given its path or its name in a data order (`cn/<dataset>/<file>.bin`)."""
    return Path(bin_file).parent.name


def tokenized_dir_of(bin_file: str | os.PathLike) -> Path | None:
    """Returns the tokenised folder that contains a file or folder; None if there is none."""
    return next((each.parent for each in Path(bin_file).parents if each.name == TEMPLATE_FOLDER), None)


def records_folder(tokenized_dir: str | os.PathLike, dataset: str = "") -> Path:
    """Returns the folder of the chunk records of one dataset or of all."""
    return Path(tokenized_dir) / "chunks" / dataset


def manifests_folder(tokenized_dir: str | os.PathLike) -> Path:
    """Returns the folder of the manifests."""
    return Path(tokenized_dir) / "manifests"


def manifest_path(tokenized_dir: str | os.PathLike, dataset: str) -> Path:
    """Returns the path of a dataset's manifest."""
    return manifests_folder(tokenized_dir) / f"{dataset}.json"


def stats_path(manifest: str | os.PathLike) -> Path:
    """Returns the path of the stats that belong to a manifest: `<dataset>/stats.json` beside it."""
    return Path(manifest).with_suffix("") / "stats.json"


def quarantine_folder(tokenized_dir: str | os.PathLike, dataset: str) -> Path:
    """Returns the folder of a dataset's bad lines."""
    return manifests_folder(tokenized_dir) / dataset


def quarantine_path(tokenized_dir: str | os.PathLike, dataset: str, bin_file: str | os.PathLike) -> Path:
    """Returns the path of the quarantine file for a `.bin` file's source."""
    return quarantine_folder(tokenized_dir, dataset) / f"{Path(bin_file).stem}.quarantine.jsonl"
