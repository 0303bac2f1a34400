"""The tree behind a result: each record names what it was made from, down to the JSONL files and the base model.

Everything is read from the manifests that the stages write; nothing is guessed from names but where files lie
(`rules/common.smk` has the grammar).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import read_json, sha256_file, sha256_json
from common.fingerprints import FingerprintCache


@dataclass(frozen=True)
class Check:
    """A digest that was written down, and how to compute it again.

    Attributes:
        what: The file, or what the digest is about.
        recorded: SHA-256.
        compute: Computes it; raises an OSError where a file has gone.
    """

    what: str
    recorded: str
    compute: Callable[[], str]


@dataclass
class Record:
    """One step of the way: what it is, what is known of it, and what it was made from."""

    title: str
    path: Path | None = None
    facts: list[tuple[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    sources: list[Record] = field(default_factory=list)


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
            return _Run(results, parts[0]).record(parts[1:])
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
        run = _Run(results, each["run"])
        record.checks += [_file(run.folder / name, digest) for name, digest in each["files"].items()]
        record.sources += [run.evaluation(Path(name).name) for name in each["files"]]
    return record


def _shared(results: Path, parts: tuple[str, ...], path: Path) -> Record:
    if parts[:1] == ("tokenizer",) and len(parts) > 1:
        return _tokenizer(results / "shared" / "tokenizer" / parts[1])
    if parts[:1] == ("data",) and len(parts) > 1:
        folder = results / "shared" / "data" / parts[1]
        if parts[2:3] == ("packs",) and len(parts) > 3:
            return _plan(folder / "packs" / parts[3])
        if (folder / "tokenized.json").is_file():
            return _data(folder, None)
    raise UserError(f"{path} has no record", expected="a tokenizer, tokenised data or a pack plan")


class _Run:
    """The records of one run."""

    def __init__(self, results: Path, name: str):
        self.results, self.name, self.folder = results, name, results / name
        self.config = read_json(self.folder / "config.json")

    def record(self, parts: tuple[str, ...]) -> Record:
        kind = parts[0] if parts else "report.html"
        if kind == "evaluation" and len(parts) > 1:
            return self.evaluation("/".join(parts[1:]))
        if kind == "best":
            return self.model((self.folder / "best").resolve())
        if kind == "checkpoint_hf" and len(parts) > 2:
            return self.model(self.folder.joinpath(*parts[:3]))
        known = {
            "report.html": self.report,
            "hf": self.hf,
            "turbomind": self.turbomind,
            "parity.json": self.parity,
            "train.json": self.training,
            "checkpoints": self.training,
        }
        if kind not in known:
            raise UserError(
                f"{self.folder / kind} has no record", expected=f"one of {', '.join(known)}, evaluation/..."
            )
        return known[kind]()

    def report(self) -> Record:
        scores = sorted(path.name for path in (self.folder / "evaluation").glob("*.json"))
        sources = [self.evaluation(name) for name in scores]
        sources += [
            each() for name, each in (("parity.json", self.parity),) if (self.folder / name).is_file()
        ]
        return Record("report", self.folder / "report.html", sources=sources)

    @cache  # noqa: B019 - lives as long as one command
    def evaluation(self, name: str) -> Record:
        path = self.folder / "evaluation" / name
        if name == "opencompass.json":
            return self._opencompass(path)
        result = read_json(path)
        if name == "checkpoints.json":
            return self._checkpoints(path, result)
        facts = [(key, result[key]) for key in ("model", "dtype", "loss", "perplexity") if key in result]
        shown = ("recall", "precision", "well_formed", "exact", "loss.all", "loss.plain_text")
        facts += [
            (row["metric"], row["value"])
            for row in result.get("summary", ())
            if row["scope"] == "all" and row["metric"] in shown
        ]
        facts += _slurm_job(result)
        label = result["label"]
        if label in ("base", "tuned"):
            model = self.base() if label == "base" else self.hf()
        else:
            model = self.model(self.folder / "checkpoint_hf" / path.parent.name / label)
        heldout = self._heldout(result["heldout_sha256"])
        sources = [model, heldout, _tokenizer_of(self.results, result["tokenizer_sha256"])]
        checks = []
        if result.get("model_sha256") and model.path:
            checks.append(
                Check(f"the model that {path} is about", result["model_sha256"], _model(model.path))
            )
        return Record(f"evaluation, {label} model", path, facts, checks, sources)

    def _checkpoints(self, path: Path, curve: dict[str, Any]) -> Record:
        best = curve["best"]
        facts = [("metric", curve["metric"]), ("best", f"step {best['step']}, {best['value']}")]
        files = {name: digest for point in curve["points"] for name, digest in point["files"].items()}
        checks = [_file(path.parent / name, digest) for name, digest in files.items()]
        sources = [self.evaluation(name) for name in files]
        return Record("evaluations of checkpoints", path, facts, checks, sources)

    @cache  # noqa: B019
    def model(self, folder: Path) -> Record:
        """The model that was made of a checkpoint, which has gone since; the last one's is `hf`."""
        if folder.name == "hf":
            return self.hf()
        title = f"Hugging Face folder of {folder.name}"
        there = (folder / "manifest.json").is_file()
        record = _folder(title, folder) if there else Record(title, None, [("folder", "removed")])
        held = self.folder / "checkpoints" / folder.parent.name / "held" / f"{folder.name}.json"
        facts = [(name, entry["sha256"]) for name, entry in read_json(held)["files"].items()]
        record.sources.append(Record(f"checkpoint {folder.name}", None, facts, [], self.training().sources))
        return record

    def _opencompass(self, path: Path) -> Record:
        result = read_json(path)
        config = self.folder / "opencompass_config.py"
        facts = [("model", result["abbr"]), ("datasets", result["datasets"])]
        facts += [
            (f"{row['dataset']} {row['metric']}", row["score"])
            for row in result["scores"]
            if row["group"] in (None, "custom")
        ]
        facts.append(("versions", _joined(result["versions"])))
        converted = Path(result["model"]).name == "turbomind"
        model = self.turbomind() if converted else self.hf()
        key = "hf_weights_sha256" if converted else "weights_sha256"
        checks = [_file(config, result["config_sha256"])]
        if result["model_weights_sha256"]:
            manifest = model.path / "manifest.json"
            checks.append(
                Check(
                    f"the model that {path} is about",
                    result["model_weights_sha256"],
                    lambda: read_json(manifest)[key],
                )
            )
        source = Record("OpenCompass config", config, [("sha256", result["config_sha256"])])
        return Record("evaluation by OpenCompass, tuned model", path, facts, checks, [model, source])

    @cache  # noqa: B019
    def parity(self) -> Record:
        sources = [self.hf()]
        if (self.folder / "turbomind" / "manifest.json").is_file():
            sources.append(self.turbomind())
        path = self.folder / "parity.json"
        return Record("conversion gate", path, _slurm_job(read_json(path)), sources=sources)

    @cache  # noqa: B019
    def hf(self) -> Record:
        record = _folder("Hugging Face folder", self.folder / "hf")
        record.sources.append(self.training())
        record.checks.append(_link(record, "checkpoint_weights_sha256", self.folder / "train.json"))
        return record

    @cache  # noqa: B019
    def turbomind(self) -> Record:
        record = _folder("TurboMind workspace", self.folder / "turbomind")
        record.sources.append(self.hf())
        record.checks.append(_link(record, "hf_weights_sha256", self.folder / "hf" / "manifest.json"))
        return record

    @cache  # noqa: B019
    def base(self) -> Record:
        name = self.config["model"]["path"] or self.config["model"]["hub"]
        folder = self._resolve(name)
        return Record("base model", folder if folder.is_dir() else None, [("name", name)])

    @cache  # noqa: B019
    def training(self) -> Record:
        path = self.folder / "train.json"
        train = read_json(path)
        run_folder = self.folder / train["run_folder"]
        attempts = read_json(run_folder / "attempts.json")
        keys = (
            "steps",
            "tokens",
            "world_size",
            "dtype",
            "zero_stage",
            "identity",
            "weights_sha256",
            "git_commit",
        )
        facts = [(key, train[key]) for key in keys]
        facts.append(("attempts", attempts["attempts"]))
        if attempts.get("slurm_job_ids"):
            facts.append(("Slurm jobs", ", ".join(attempts["slurm_job_ids"])))
        facts.append(("versions", _joined(train["versions"])))
        checkpoint = self.folder / train["checkpoint"]
        marker = read_json(checkpoint / "COMPLETE.json")
        checks = [_file(checkpoint / name, entry["sha256"]) for name, entry in marker["files"].items()]
        config = self.folder / "train_config.py"
        checks.append(_file(config, train["config_sha256"]))
        fields = read_json(run_folder / "identity.json")["fields"]
        base = self.base()
        if base.path:
            checks.append(Check(f"{base.path} (base model)", fields["base_model"], _model(base.path)))
        sources = [base, Record("training config", config, [("sha256", train["config_sha256"])])]
        if fields.get("tokenizer"):
            sources.append(_tokenizer_of(self.results, fields["tokenizer"]))
        plan = self._plan_folder(train.get("plan_sha256"))
        if plan:
            sources.append(_plan(plan))
        return Record("checkpoint", checkpoint, facts, checks, sources)

    def _plan_folder(self, digest: str | None) -> Path | None:
        plans = self.results.glob("shared/data/*/packs/*/plan.json")
        return next((path.parent for path in plans if read_json(path)["plan_sha256"] == digest), None)

    @cache  # noqa: B019
    def _heldout(self, digest: str) -> Record:
        from evaluation.heldout import heldout_digest

        own = self.config["heldout"]["processed_dir"]
        plan = self._plan_folder(read_json(self.folder / "train.json").get("plan_sha256"))
        folder = self._resolve(own) if own else plan and plan.parent.parent / "heldout"
        record = Record("held-out conversations", folder, [("sha256", digest)])
        if folder:
            record.checks.append(
                Check(f"{folder} (held-out conversations)", digest, lambda: heldout_digest(folder))
            )
        return record

    def _resolve(self, path: str) -> Path:
        """Paths of a config begin where the workflow runs: beside the results, by default."""
        return Path(os.path.normpath(self.results.parent / path))


def _folder(title: str, folder: Path) -> Record:
    manifest = read_json(folder / "manifest.json")
    facts = [
        (key, manifest[key])
        for key in (
            "architecture",
            "dtype",
            "parameters",
            "chat_template",
            "tp",
            "rope_theta",
            "weights_sha256",
        )
        if manifest.get(key) is not None
    ]
    if "versions" in manifest:
        facts.append(("versions", _joined(manifest["versions"])))
    facts += _slurm_job(manifest)
    checks = [_file(folder / name, entry["sha256"]) for name, entry in manifest["files"].items()]
    return Record(title, folder, facts, checks)


@cache
def _tokenizer_of(results: Path, digest: str) -> Record:
    for path in sorted(results.glob("shared/tokenizer/*/manifest.json")):
        if read_json(path)["tokenizer_sha256"] == digest:
            return _tokenizer(path.parent)
    return Record("tokenizer", None, [("sha256", digest), ("folder", "gone")])


@cache
def _tokenizer(folder: Path) -> Record:
    manifest = read_json(folder / "manifest.json")
    facts = [
        ("sha256", manifest["tokenizer_sha256"]),
        ("base", manifest["base_sha256"]),
        ("ids", manifest["vocab_size"]),
        ("chat template", f"{manifest['chat_template']['name']} {manifest['chat_template']['sha256'][:12]}"),
    ]
    return Record(
        "tokenizer", folder, facts, [_file(folder / "tokenizer.json", manifest["tokenizer_sha256"])]
    )


@cache
def _plan(folder: Path) -> Record:
    manifest = read_json(folder / "plan.json")
    totals = manifest["totals"]
    facts = [
        ("plan_sha256", manifest["plan_sha256"]),
        (
            "rows",
            f"{totals['rows']:,} of {manifest['max_length']:,} tokens, {manifest['mode']}, seed {manifest['seed']}",
        ),
        ("tokens", f"{totals['packed_tokens']:,} of {totals['tokens']:,}"),
        *([("weights", _joined(manifest["weights"]))] if "weights" in manifest else []),
    ]
    processed = manifest["processed_dir"]
    processed = Path(os.path.normpath(folder / processed)) if processed else None
    check = Check(f"{folder} (pack plan)", manifest["plan_sha256"], lambda: _plan_digest(folder))
    return Record("pack plan", folder, facts, [check], [_data(folder.parent.parent, processed)])


def _plan_digest(folder: Path) -> str:
    from ftdp.pack_plan import open_plan

    return open_plan(folder).sha256()


@cache
def _data(folder: Path, processed: Path | None) -> Record:
    index = read_json(folder / "tokenized.json")
    record = Record("tokenised data", folder)
    for name, digest in index["datasets"].items():
        path = folder / "manifests" / f"{name}.json"
        manifest = read_json(path)
        totals, options = manifest["totals"], manifest["options"]
        facts = [
            (
                "lines",
                f"{totals['lines']:,}: {totals['samples']:,} train, {totals['valid_samples']:,} valid, "
                f"{totals['heldout']:,} held out, {totals['quarantined']:,} bad",
            ),
            ("tokens", f"{totals['tokens']:,}, {totals['trained_tokens']:,} of them trained on"),
            ("template, mask", f"{options['template']}, {options['mask']}"),
        ]
        dataset = Record(f"dataset {name}", path, facts)
        dataset.checks.append(
            Check(f"{path} (manifest)", digest, lambda path=path: sha256_json(read_json(path)))
        )
        for file in manifest["files"]:
            dataset.sources.append(_shard(folder, processed, file))
        record.sources.append(dataset)
    return record


def _shard(folder: Path, processed: Path | None, file: dict[str, Any]) -> Record:
    source = Record(
        "JSONL file",
        processed / file["source"] if processed else None,
        [
            ("lines", f"{file['lines']:,}"),
            ("bytes", f"{file['source_bytes']:,}"),
            ("sha256", file["source_sha256"]),
        ],
    )
    if source.path:
        source.checks.append(_file(source.path, file["source_sha256"]))
    else:
        source.facts.insert(0, ("name", file["source"]))
    if not file.get("bin"):
        return source
    path = folder / file["bin"]
    facts = [
        ("samples", f"{file['samples']:,}"),
        ("tokens", f"{file['tokens']:,}"),
        ("sha256", file["bin_sha256"]),
    ]
    checks = [
        _file(path, file["bin_sha256"]),
        _file(path.with_name(f"{path.name}.meta"), file["meta_sha256"]),
    ]
    return Record("tokenised shard", path, facts, checks, [source])


def _link(record: Record, key: str, source: Path) -> Check:
    """Is a folder still the conversion of what lies there now?"""
    manifest = record.path / "manifest.json"
    return Check(
        f"{manifest} was made from the weights that {source} names",
        read_json(manifest)[key],
        lambda: read_json(source)["weights_sha256"],
    )


def _file(path: Path, digest: str) -> Check:
    return Check(str(path), digest, lambda: sha256_file(path))


def _model(folder: Path) -> Callable[[], str]:
    def compute() -> str:
        from sft.identity import base_model_digest

        return base_model_digest(str(folder), FingerprintCache(os.devnull))

    return compute


def _slurm_job(record: dict[str, Any]) -> list[tuple[str, Any]]:
    return [("Slurm job", record["slurm_job_id"])] if "slurm_job_id" in record else []


def _joined(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
