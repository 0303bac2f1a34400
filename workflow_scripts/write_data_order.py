"""Writes data_order.txt: the order of the tokenised train files, which decides the row numbers of a run.

Writes one path per line, relative to the train folder, in the format of the training config's data order.
Never lists files under valid/. A folder's files, sorted, come before those of its subfolders, so the same
data gives the same order everywhere. Refuses files that were tokenised with different tokenizers, templates
or options, and unfinished datasets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketune.common.cli import run
from snaketune.tokenized.compatibility import UNKNOWN, made_with
from snaketune.tokenized.data_order import find_train_folder, list_train_files, write_data_order
from snaketune.tokenized.layout import BIN


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data-folder",
        required=True,
        help="the tokenised folder, its chatml_llamav13_32k folder, or the train folder in that",
    )
    parser.add_argument("--save-folder", required=True, help="folder that receives data_order.txt")
    parser.add_argument("--file-type", default=".bin", help="suffix of the files to list")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    target = Path(args.save_folder) / "data_order.txt"
    train = find_train_folder(args.data_folder)
    if args.file_type == BIN and made_with(train, list_train_files(train)) is None:
        print(f"notice: {train} has {UNKNOWN}")
    names = write_data_order(args.data_folder, target, args.file_type)
    print(f"{target}: {len(names)} files in {train}")


if __name__ == "__main__":
    run(main)
