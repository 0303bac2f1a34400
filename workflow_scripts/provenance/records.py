"""The tree behind a result: each record names what it was made from, down to the JSONL files and the base model.

Everything is read from the manifests that the stages write; nothing is guessed from names but where files lie
(`rules/common.smk` has the grammar).
"""

from __future__ import annotations

from pathlib import Path

from common.cli import UserError
from common.files import read_json

from .record import Record, file_check
from .run_records import Run
from .shared_records import data_record, plan_record, tokenizer_record


def lineage(path: Path) -> Record:
    """Returns the tree behind a result file or folder of the workflow.

    Raises:
        UserError: The path is none, or what it was made from has gone.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist", expected="a file or folder that the workflow made")
    absolute = path.absolute()
    for results in absolute.parents:
        parts = absolute.relative_to(results).parts
        if (results / "shared").is_dir() and (results / parts[0] / "config.json").is_file():
            return Run(results, parts[0]).record(parts[1:])
        if parts[0] == "shared" and (results / "shared" / "tokenizer").is_dir():
            return _shared(results, parts[1:], path)
        if parts[0] == "compare" and (results / "compare" / "comparison.json").is_file():
            return _comparison(results)
    raise UserError(
        f"{path} is no result of the workflow",
        expected="a file below <results_dir>/<run>/ or <results_dir>/compare/, or a tokenizer, manifest or pack plan below <results_dir>/shared/",
    )


def run_records(results: Path) -> dict[str, Record]:
    """Returns the tree behind the report of each run of a results folder that has one.

    Raises:
        UserError: There is none.
    """
    runs = {path.parent.name: lineage(path) for path in sorted(results.glob("*/report.html"))}
    if not runs:
        raise UserError(
            f"{results} holds no finished run", expected="<results_dir>/<run>/report.html of the workflow"
        )
    return runs


def _comparison(results: Path) -> Record:
    figures = read_json(results / "compare" / "comparison.json")
    record = Record("comparison", results / "compare" / "report.html", [("baseline", figures["baseline"])])
    for each in figures["runs"]:
        run = Run(results, each["run"])
        record.checks += [file_check(run.folder / name, digest) for name, digest in each["files"].items()]
        record.sources += [run.evaluation(Path(name).name) for name in each["files"]]
    return record


def _shared(results: Path, parts: tuple[str, ...], path: Path) -> Record:
    if parts[:1] == ("tokenizer",) and len(parts) > 1:
        return tokenizer_record(results / "shared" / "tokenizer" / parts[1])
    if parts[:1] == ("data",) and len(parts) > 1:
        folder = results / "shared" / "data" / parts[1]
        if parts[2:3] == ("packs",) and len(parts) > 3:
            return plan_record(folder / "packs" / parts[3])
        if (folder / "tokenized.json").is_file():
            return data_record(folder, None)
    raise UserError(f"{path} has no record", expected="a tokenizer, tokenised data or a pack plan")
