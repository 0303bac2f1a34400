"""The records of a run: its scores, conversions and checkpoints, and the inputs of its training."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from snaketune.common import result_paths as names
from snaketune.common.cli import UserError
from snaketune.common.files import read_json
from snaketune.common.fingerprints import FingerprintCache
from snaketune.common.run_files import RunFiles
from snaketune.provenance.record import Check, Record, file_check, joined, slurm_job
from snaketune.provenance.shared_records import plan_record, tokenizer_of


class RunRecords:
    """The records of a run."""

    def __init__(self, results: Path, name: str):
        self.results, self.files = results, RunFiles(results / name)

    def record(self, parts: tuple[str, ...]) -> Record:
        kind = parts[0] if parts else names.REPORT
        if kind == names.EVALUATIONS and len(parts) > 1:
            return self.evaluation("/".join(parts))
        if kind == names.BEST:
            return self.model(self.files.path(names.BEST).resolve())
        if kind == names.CHECKPOINT_MODELS and len(parts) > 2:
            return self.model(self.files.folder.joinpath(*parts[:3]))
        known = {
            names.REPORT: self.report,
            names.HF: self.hf,
            names.TURBOMIND: self.turbomind,
            names.PARITY: self.parity,
            names.TRAIN: self.training,
            names.CHECKPOINTS: self.training,
        }
        if kind not in known:
            raise UserError(
                f"{self.files.folder / kind} has no record",
                expected=f"one of {', '.join(known)}, {names.EVALUATIONS}/...",
            )
        return known[kind]()

    def report(self) -> Record:
        scores = sorted(self.files.folder.glob(names.EVALUATION.format(label="*")))
        sources = [self.evaluation(str(path.relative_to(self.files.folder))) for path in scores]
        if self.files.has(names.PARITY):
            sources.append(self.parity())
        return Record("report", self.files.path(names.REPORT), sources=sources)

    @cache  # noqa: B019 - lives only as long as one command
    def evaluation(self, name: str) -> Record:
        path, result = self.files.path(name), self.files.read(name)
        if name == names.OPENCOMPASS:
            return self._opencompass(path, result)
        if name == names.CHECKPOINT_CURVE:
            return self._checkpoints(path, result)
        facts = [(key, result[key]) for key in ("model", "dtype", "loss", "perplexity") if key in result]
        shown = ("recall", "precision", "well_formed", "exact", "loss.all", "loss.plain_text")
        facts += [
            (row["metric"], row["value"])
            for row in result.get("summary", ())
            if row["scope"] == "all" and row["metric"] in shown
        ]
        facts += slurm_job(result)
        label = result["label"]
        if label in ("base", "tuned"):
            model = self.base() if label == "base" else self.hf()
        else:
            model = self.model(self.files.path(names.CHECKPOINT_MODELS) / path.parent.name / label)
        heldout = self._heldout(result["heldout_sha256"])
        sources = [model, heldout, tokenizer_of(self.results, result["tokenizer_sha256"])]
        checks = []
        if result.get("model_sha256") and model.path:
            checks.append(Check(f"the model evaluated in {path}", result["model_sha256"], _model(model.path)))
        return Record(f"evaluation, {label} model", path, facts, checks, sources)

    def _checkpoints(self, path: Path, curve: dict[str, Any]) -> Record:
        best = curve["best"]
        facts = [("metric", curve["metric"]), ("best", f"step {best['step']}, {best['value']}")]
        files = {name: digest for point in curve["points"] for name, digest in point["files"].items()}
        checks = [file_check(path.parent / name, digest) for name, digest in files.items()]
        sources = [self.evaluation(f"{names.EVALUATIONS}/{name}") for name in files]
        return Record("evaluations of checkpoints", path, facts, checks, sources)

    @cache  # noqa: B019
    def model(self, folder: Path) -> Record:
        """Returns the record of a model whose checkpoint was removed; the last checkpoint's model is `hf`."""
        if folder.name == names.HF:
            return self.hf()
        title = f"Hugging Face folder of {folder.name}"
        there = (folder / names.MANIFEST).is_file()
        record = _folder(title, folder) if there else Record(title, None, [("folder", "removed")])
        step = folder.name.removeprefix("iter_")
        held = self.files.read(names.PINNED_RECORD, identity=folder.parent.name, step=step)
        facts = [(name, entry["sha256"]) for name, entry in held["files"].items()]
        record.sources.append(Record(f"checkpoint {folder.name}", None, facts, [], self.training().sources))
        return record

    def _opencompass(self, path: Path, result: dict[str, Any]) -> Record:
        config = self.files.path(names.EVAL_CONFIG)
        facts = [("model", result["abbr"]), ("datasets", result["datasets"])]
        facts += [
            (f"{row['dataset']} {row['metric']}", row["score"])
            for row in result["scores"]
            if row["group"] in (None, "custom")
        ]
        facts.append(("versions", joined(result["versions"])))
        converted = Path(result["model"]).name == names.TURBOMIND
        model = self.turbomind() if converted else self.hf()
        key = "hf_weights_sha256" if converted else "weights_sha256"
        checks = [file_check(config, result["config_sha256"])]
        if result["model_weights_sha256"]:
            manifest = model.path / names.MANIFEST
            checks.append(
                Check(
                    f"the model evaluated in {path}",
                    result["model_weights_sha256"],
                    lambda: read_json(manifest)[key],
                )
            )
        source = Record("OpenCompass config", config, [("sha256", result["config_sha256"])])
        return Record("evaluation by OpenCompass, tuned model", path, facts, checks, [model, source])

    @cache  # noqa: B019
    def parity(self) -> Record:
        sources = [self.hf()]
        if self.files.turbomind is not None:
            sources.append(self.turbomind())
        facts = slurm_job(self.files.read(names.PARITY))
        return Record("conversion gate", self.files.path(names.PARITY), facts, sources=sources)

    @cache  # noqa: B019
    def hf(self) -> Record:
        record = _folder("Hugging Face folder", self.files.path(names.HF))
        record.sources.append(self.training())
        record.checks.append(_link(record, "checkpoint_weights_sha256", self.files.path(names.TRAIN)))
        return record

    @cache  # noqa: B019
    def turbomind(self) -> Record:
        record = _folder("TurboMind workspace", self.files.path(names.TURBOMIND))
        record.sources.append(self.hf())
        record.checks.append(_link(record, "hf_weights_sha256", self.files.path(names.HF) / names.MANIFEST))
        return record

    @cache  # noqa: B019
    def base(self) -> Record:
        model = self.files.config["model"]
        name = model["path"] or model["hub"]
        folder = self._resolve(name)
        return Record("base model", folder if folder.is_dir() else None, [("name", name)])

    @cache  # noqa: B019
    def training(self) -> Record:
        train, attempts = self.files.train, self.files.attempts
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
        facts.append(("versions", joined(train["versions"])))
        checkpoint = self.files.checkpoint
        marker = read_json(checkpoint / names.MARKER)
        checks = [file_check(checkpoint / name, entry["sha256"]) for name, entry in marker["files"].items()]
        config = self.files.path(names.TRAIN_CONFIG)
        checks.append(file_check(config, train["config_sha256"]))
        fields = read_json(self.files.run_folder / names.IDENTITY)["fields"]
        base = self.base()
        if base.path:
            checks.append(Check(f"{base.path} (base model)", fields["base_model"], _model(base.path)))
        sources = [base, Record("training config", config, [("sha256", train["config_sha256"])])]
        if fields.get("tokenizer"):
            sources.append(tokenizer_of(self.results, fields["tokenizer"]))
        plan = self._plan_folder(train.get("plan_sha256"))
        if plan:
            sources.append(plan_record(plan))
        return Record("checkpoint", checkpoint, facts, checks, sources)

    def _plan_folder(self, digest: str | None) -> Path | None:
        plans = self.results.glob(names.PACK_PLAN.format(data="*", pack="*"))
        return next((path.parent for path in plans if read_json(path)["plan_sha256"] == digest), None)

    @cache  # noqa: B019
    def _heldout(self, digest: str) -> Record:
        from snaketune.evaluation.heldout import heldout_digest

        own = self.files.config["heldout"]["processed_dir"]
        plan = self._plan_folder(self.files.train.get("plan_sha256"))
        folder = self._resolve(own) if own else plan and plan.parent.parent / "heldout"
        record = Record("held-out conversations", folder, [("sha256", digest)])
        if folder:
            record.checks.append(
                Check(f"{folder} (held-out conversations)", digest, lambda: heldout_digest(folder))
            )
        return record

    def _resolve(self, path: str) -> Path:
        """Resolves a config path: relative to the workflow's folder, by default the parent of the results."""
        return Path(os.path.normpath(self.results.parent / path))


def _folder(title: str, folder: Path) -> Record:
    manifest = read_json(folder / names.MANIFEST)
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
        facts.append(("versions", joined(manifest["versions"])))
    facts += slurm_job(manifest)
    checks = [file_check(folder / name, entry["sha256"]) for name, entry in manifest["files"].items()]
    return Record(title, folder, facts, checks)


def _link(record: Record, key: str, source: Path) -> Check:
    """Returns the check that a folder was converted from the current weights of `source`."""
    manifest = record.path / names.MANIFEST
    return Check(
        f"{manifest} was made from the weights in {source}",
        read_json(manifest)[key],
        lambda: read_json(source)["weights_sha256"],
    )


def _model(folder: Path) -> Callable[[], str]:
    def compute() -> str:
        from snaketune.training.run_identity import base_model_digest

        return base_model_digest(str(folder), FingerprintCache(os.devnull))

    return compute
