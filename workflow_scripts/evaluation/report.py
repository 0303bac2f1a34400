"""One self-contained page about one run: what it learnt, from which data, with which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import read_json

from .data_summary import Dataset, data_summary, load_dataset
from .plots import length_histogram, loss_curve

_TEMPLATE = "report.html.j2"


def read_metrics(path: Path) -> list[dict]:
    """Reads `metrics.jsonl`; a last line that a killed writer left torn is skipped.

    Raises:
        UserError: When the file is missing or another line is broken.
    """
    if not path.is_file():
        raise UserError(f"no metrics at {path}", fix="give the file with --metrics")
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is not JSON", found=error) from None
    return records


def render(
    run: str,
    config: Mapping[str, Any],
    train: Mapping[str, Any],
    metrics: list[dict],
    datasets: list[Dataset],
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    hf: Mapping[str, Any] | None = None,
    turbomind: Mapping[str, Any] | None = None,
    evals: Sequence[dict] = (),
) -> str:
    """Returns the page as HTML. Every text that comes from outside is escaped by the template engine.

    Args:
        run: Name of the run.
        config: The run's merged settings, section by section.
        train: `train.json`.
        metrics: Records of `metrics.jsonl`.
        datasets: The tokenised datasets.
        base: Evaluation of the base model, as evaluate_model.py writes it.
        tuned: The same of the tuned model.
        hf: Manifest of the Hugging Face folder.
        turbomind: Manifest of the TurboMind workspace.
        evals: Records of `evals.jsonl`.

    Raises:
        UserError: When the two evaluations are not about the same conversations.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if base["heldout_sha256"] != tuned["heldout_sha256"]:
        raise UserError(
            "base and tuned model were evaluated on different held-out conversations",
            found=f"{base['heldout_sha256'][:12]} and {tuned['heldout_sha256'][:12]}",
            fix="run evaluate_model.py for both with the same --heldout-dir",
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, fixed=_fixed, percent=_percent, value=_value, duration=_duration
    )
    data = data_summary(datasets)
    return environment.get_template(_TEMPLATE).render(
        run=run,
        config=config,
        train=train,
        base=base,
        tuned=tuned,
        evaluation=_evaluation_rows(base, tuned),
        generations=_side_by_side(base, tuned),
        data=data,
        histograms=[
            (name, Markup(length_histogram(**histogram)))  # noqa: S704 - our own SVG, holds no outside text
            for name, histogram in data["histograms"]
        ],
        curve=Markup(loss_curve(metrics, evals)) if metrics else None,  # noqa: S704 - our own SVG, holds no outside text
        speed=_speed(metrics),
        lineage=_lineage(train, datasets, base, tuned, hf, turbomind),
        versions=_versions(train, hf, turbomind),
        hf=hf,
        turbomind=turbomind,
    )


def load_and_render(
    run: str,
    config: Path,
    train_manifest: Path,
    metrics: Path | None,
    dataset_manifests: list[Path],
    base_evaluation: Path,
    tuned_evaluation: Path,
    hf_manifest: Path | None,
    turbomind_manifest: Path | None,
) -> str:
    """Reads the files that `render` needs and returns the page; metrics lie in the run folder of `train.json`."""
    train = read_json(train_manifest)
    metrics = metrics or train_manifest.parent / train["run_folder"] / "metrics.jsonl"
    evals = metrics.with_name("evals.jsonl")
    return render(
        run,
        read_json(config),
        train,
        read_metrics(metrics),
        [load_dataset(path) for path in dataset_manifests],
        read_json(base_evaluation),
        read_json(tuned_evaluation),
        read_json(hf_manifest) if hf_manifest else None,
        read_json(turbomind_manifest) if turbomind_manifest else None,
        read_metrics(evals) if evals.is_file() else (),
    )


def _evaluation_rows(base: Mapping, tuned: Mapping) -> list[dict[str, Any]]:
    """One row for all conversations and one for each dataset; `change` is tuned minus base."""
    rows = []
    for name in [None, *sorted(base["datasets"])]:
        before, after = (each if name is None else each["datasets"][name] for each in (base, tuned))
        measured = before["loss"] is not None and after["loss"] is not None
        rows.append(
            {
                "name": name,
                "base": before,
                "tuned": after,
                "change": after["loss"] - before["loss"] if measured else None,
            }
        )
    return rows


def _side_by_side(base: Mapping, tuned: Mapping) -> list[dict[str, Any]]:
    answers = {json.dumps(answer["prompt"], sort_keys=True): answer for answer in base["generations"]}
    return [
        {
            "prompt": answer["prompt"],
            "base": answers.get(json.dumps(answer["prompt"], sort_keys=True)),
            "tuned": answer,
        }
        for answer in tuned["generations"]
    ]


def _speed(metrics: list[dict]) -> dict[str, float] | None:
    """Tokens per second over all steps but the first, which also warms up, and seconds in all."""
    timed = [record for record in metrics if "seconds" in record]
    if len(timed) < 2:
        return None
    seconds = sum(record["seconds"] for record in timed[1:])
    tokens = sum(record["tokens"] for record in timed[1:])
    return {"tokens_per_second": tokens / max(seconds, 1e-9), "seconds": seconds + timed[0]["seconds"]}


def _lineage(train, datasets, base, tuned, hf, turbomind) -> list[tuple[str, str]]:
    rows = [
        ("run identity", train["identity"]),
        ("packed training data", train.get("plan_sha256") or train["data_sha256"]),
        ("training config", train["config_sha256"]),
        ("trained weights", train["weights_sha256"]),
        ("held-out conversations", tuned["heldout_sha256"]),
    ]
    rows += [("tokenizer", digest) for digest in {each.manifest["tokenizer_sha256"] for each in datasets}]
    if hf:
        rows.append(("Hugging Face weights", hf["weights_sha256"]))
    if turbomind:
        rows.append(
            ("TurboMind config.yaml", turbomind["files"]["triton_models/weights/config.yaml"]["sha256"])
        )
    rows.append(("git commit", train.get("git_commit") or "unknown"))
    return rows


def _versions(train, hf, turbomind) -> list[tuple[str, dict[str, Any]]]:
    stages = [("training", train), ("Hugging Face conversion", hf), ("TurboMind conversion", turbomind)]
    return [(name, manifest["versions"]) for name, manifest in stages if manifest]


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _fixed(value: float | None, digits: int = 4, sign: bool = False) -> str:
    if value is None:
        return "n/a"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _value(value: Any) -> str:
    """A setting as one would write it in YAML."""
    if value is None:
        return "not set"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else str(value)
