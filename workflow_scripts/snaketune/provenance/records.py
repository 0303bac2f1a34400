"""The tree behind a result: each record lists its sources, down to the JSONL files and the base model.

All facts come from the manifests that the stages write. Only the locations of files are derived from names;
see `rules/common.smk` for the naming scheme.
"""

from __future__ import annotations

from pathlib import Path

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.provenance.record import Record, file_check
from snaketune.provenance.run_records import RunRecords
from snaketune.provenance.shared_records import data_record, plan_record, tokenizer_record


def lineage(path: Path) -> Record:
    """Returns the tree behind a result file or folder of the workflow.

    Raises:
        UserError: The path is not a result, or one of its sources is gone.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist", expected="a file or folder that the workflow made")
    absolute = path.absolute()
    for results in absolute.parents:
        parts = absolute.relative_to(results).parts
        if is_results(results) and (results / parts[0] / names.CONFIG).is_file():
            return RunRecords(results, parts[0]).record(parts[1:])
        if parts[0] == names.SHARED and (results / names.TOKENIZER).parent.is_dir():
            return _shared(results, parts, path)
        if parts[0] == Path(names.COMPARE_PAGE).parts[0] and (results / names.COMPARE_FIGURES).is_file():
            return _comparison(results)
    raise UserError(
        f"{path} is not a result of the workflow",
        expected="a file below <results_dir>/<run>/ or <results_dir>/compare/, "
        "or a tokenizer, manifest or pack plan below <results_dir>/shared/",
    )


def is_results(folder: Path) -> bool:
    """True if the folder is the results folder of a workflow."""
    return (folder / names.SHARED).is_dir()


def run_records(results: Path) -> dict[str, Record]:
    """Returns the trees behind the reports in a results folder, by run.

    Raises:
        UserError: No run has a report.
    """
    runs = {path.parent.name: lineage(path) for path in sorted(results.glob(f"*/{names.REPORT}"))}
    if not runs:
        raise UserError(
            f"{results} has no finished run", expected="<results_dir>/<run>/report.html of the workflow"
        )
    return runs


def _comparison(results: Path) -> Record:
    figures = read_json(results / names.COMPARE_FIGURES)
    record = Record("comparison", results / names.COMPARE_PAGE, [("baseline", figures["baseline"])])
    for each in figures["runs"]:
        run = RunRecords(results, each["run"])
        record.checks += [file_check(run.files.path(name), digest) for name, digest in each["files"].items()]
        record.sources += [run.evaluation(name) for name in each["files"]]
    return record


def _shared(results: Path, parts: tuple[str, ...], path: Path) -> Record:
    kind, *rest = parts[1:] or ("",)
    if kind == "tokenizer" and rest:
        return tokenizer_record(results / names.TOKENIZER.format(tokenizer=rest[0]))
    if kind == "data" and rest:
        data = rest[0]
        if rest[1:2] == ["packs"] and len(rest) > 2:
            return plan_record((results / names.PACK_PLAN.format(data=data, pack=rest[2])).parent)
        if (results / names.TOKENIZED.format(data=data)).is_file():
            return data_record(results / names.DATA.format(data=data), None)
    raise UserError(f"{path} has no record", expected="a tokenizer, tokenised data or a pack plan")
