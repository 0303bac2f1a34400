"""Runs OpenCompass on a config and reads the scores. Runs in OpenCompass's environment.

OpenCompass exits with 0 even if tasks failed, so failures are detected by missing results.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file, sha256_json
from snaketune.common.packages import installed_versions
from snaketune.common.progress import Progress

_PACKAGES = ("opencompass", "torch", "transformers", "lmdeploy")
_RUN = "run"  # OpenCompass names a run after its start time; a fixed name lets the next attempt resume it
# In a venv, mmengine mistakes the standard library for a package of the environment and does not import from it.
_MAIN = (
    "import sys, mmengine.config.utils as utils; utils.PYTHON_ROOT_DIR = sys.base_prefix; "
    "from opencompass.cli.main import main; main()"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FAILED = re.compile(r"task (OpenICL\w+)\[(.*)\] fail, see\s*\n(\S.*)")
_SHOWN_FAILURES, _SHOWN_LINES = 5, 12


class Pair(NamedTuple):
    """A dataset to run on a model. `model` is the name of its results folder."""

    group: str
    model: str
    dataset: str


def load_config(path: Path) -> Any:
    """Returns an OpenCompass config as read by mmengine."""
    import mmengine.config.utils
    from mmengine.config import Config

    mmengine.config.utils.PYTHON_ROOT_DIR = sys.base_prefix
    return Config.fromfile(str(path), format_python_code=False)


def pairs_of(config: Any) -> list[Pair]:
    """Returns the pairs of model and dataset in a config, in its order."""
    return [
        Pair(combination["group"], model["abbr"], dataset["abbr"])
        for combination in config["model_dataset_combinations"]
        for model in combination["models"]
        for dataset in combination["datasets"]
    ]


def evaluate(config_path: Path, work_dir: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Runs the missing tasks of an evaluation and returns all scores.

    Args:
        config_path: From `render_eval_config`.
        work_dir: OpenCompass works in a subfolder named by the contents of config and model, so that the next attempt
            resumes there.
        data_dir: OpenCompass's folder `data`.

    Raises:
        UserError: OpenCompass or a task failed; shows the task and the end of its log.
    """
    config = load_config(config_path)
    pairs = pairs_of(config)
    model = Path(config["model_path"])
    record = {
        "format": 1,
        "model": str(model),
        "abbr": config["model_abbr"],
        "model_weights_sha256": weights_of(model),
        "config_sha256": sha256_file(config_path),
        "versions": {name: version for name, version in installed_versions(_PACKAGES).items() if version},
    }
    work = work_dir.absolute() / sha256_json(record)[:12]
    work.mkdir(parents=True, exist_ok=True)
    _link_data(work, data_dir)
    slurm = str(config["infer"]["runner"]["type"]).endswith("SlurmRunner")
    workers = config["infer"]["runner"]["max_num_workers"]
    log = work / "opencompass.log"
    code = _run(config_path, work, log, pairs, _environment(slurm, workers))
    text = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    folder = work / _RUN
    tables = sorted(folder.glob("summary/summary_*.csv"), key=lambda path: path.stat().st_mtime_ns)
    failed = failures(folder, pairs, text)
    if failed:
        raise _tasks_failed(failed, len(pairs), folder)
    if code or not tables:
        raise UserError("OpenCompass failed", found=f"exit code {code}; the end of {log}:\n{_tail(log)}")
    scores = read_summary(tables[-1], pairs)
    without = [row["dataset"] for row in scores if row["score"] is None]
    if without:
        raise UserError(f"OpenCompass gave no score for {', '.join(without)}", found=f"'-' in {tables[-1]}")
    return record | {"datasets": len(pairs), "scores": scores}


def weights_of(model: Path) -> str | None:
    """Returns the digest of the Hugging Face weights that a folder has or was made from; None if unknown."""
    path = model / "manifest.json"
    manifest = read_json(path) if path.is_file() else {}
    return manifest.get("weights_sha256") or manifest.get("hf_weights_sha256")


def read_summary(path: Path, pairs: list[Pair]) -> list[dict[str, Any]]:
    """Returns the rows of a summary: `group` (None for OpenCompass's averages), `dataset`, `version` (of its prompt),
    `metric`, `mode` and `score` (None if missing)."""
    groups = {pair.dataset: pair.group for pair in pairs}
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        for name, version, metric, mode, score in list(csv.reader(file))[1:]:
            row = {
                "group": groups.get(name),
                "dataset": name,
                "version": version,
                "metric": metric,
                "mode": mode,
            }
            rows.append(row | {"score": None if score == "-" else float(score)})
    return rows


def failures(folder: Path, pairs: list[Pair], output: str) -> list[tuple[Pair, str, Path]]:
    """Returns the datasets without a result, with the stage that failed (infer or eval) and the task's log.

    Args:
        folder: The run's folder.
        pairs: All datasets to run.
        output: OpenCompass's output, which names the logs of failed tasks.
    """
    told = [(kind[7:].lower(), tasks, Path(log.strip())) for kind, tasks, log in _FAILED.findall(output)]
    missing = []
    for pair in pairs:
        result = folder / "results" / pair.model / f"{pair.dataset}.json"
        if result.is_file() and "error" not in read_json(result):
            continue
        predictions = folder / "predictions" / pair.model
        answered = (predictions / f"{pair.dataset}.json").is_file() or (
            predictions / f"{pair.dataset}_0.json"
        ).is_file()
        stage = "eval" if answered else "infer"
        log = folder / "logs" / stage / pair.model / f"{pair.dataset}.out"
        logs = [path for kind, tasks, path in told if kind == stage and _names(tasks, pair)]
        if logs:
            log = folder.parent / logs[-1]
        elif not log.is_file():
            log = folder.parent / "opencompass.log"
        missing.append((pair, stage, log))
    return missing


def _names(tasks: str, pair: Pair) -> bool:
    return f"{pair.model}/{pair.dataset}" in tasks.split(",")


def _tasks_failed(failed: list[tuple[Pair, str, Path]], count: int, folder: Path) -> UserError:
    # Datasets of one task fail together, so show its log once.
    logs: dict[Path, list[tuple[Pair, str]]] = {}
    for pair, stage, log in failed:
        logs.setdefault(log, []).append((pair, stage))
    told = []
    for log, entries in list(logs.items())[:_SHOWN_FAILURES]:
        names = ", ".join(f"{pair.model}/{pair.dataset}" for pair, _ in entries)
        told.append(f"{entries[0][1]} of {names}; the end of {log}:\n{_tail(log)}")
    if len(logs) > _SHOWN_FAILURES:
        told.append(f"and {len(logs) - _SHOWN_FAILURES} more, in {folder}/logs")
    return UserError(
        f"{len(failed)} of {count} datasets have no score: an OpenCompass task failed",
        found="\n".join(told),
        fix="fix the error in the log (often a dataset missing from opencompass.data_dir) and run again; it resumes",
    )


def _tail(log: Path) -> str:
    if not log.is_file():
        return "    (no such file)"
    lines = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()
    return "\n".join(f"    {line[:300]}" for line in lines[-_SHOWN_LINES:])


def _run(config: Path, work: Path, log: Path, pairs: list[Pair], environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", _MAIN, str(config.absolute()), "-w", ".", "-r", _RUN]
    folder, progress, before = work / _RUN, Progress("datasets", len(pairs), "answered", every=15), (0, 0)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)
                counts = tuple(
                    sum((folder / kind / pair.model / f"{pair.dataset}.json").is_file() for pair in pairs)
                    for kind in ("predictions", "results")
                )
                answered, scored = (now - old for now, old in zip(counts, before, strict=True))
                before = counts
                progress.add("OpenCompass", answered=answered, datasets=scored)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    print(progress.finish(), flush=True)
    return process.returncode


def _environment(slurm: bool, workers: int) -> dict[str, str]:
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        **os.environ,
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, workers))))
    if slurm:
        # OpenCompass's srun must request separate jobs, not steps of the job that this process may run in.
        keep = ("SLURM_CONF",)
        environment = {k: v for k, v in environment.items() if not k.startswith("SLURM_") or k in keep}
    return environment


def _link_data(work: Path, data_dir: Path | None) -> None:
    link = work / "data"
    if link.is_symlink():
        link.unlink()
    if data_dir:
        link.symlink_to(data_dir.absolute(), target_is_directory=True)
