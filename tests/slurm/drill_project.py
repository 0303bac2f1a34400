"""A project whose trainings run on the test cluster, and eyes on what they do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from cluster import SlurmCluster

STEPS = 12  # of every training
PATIENCE = 300  # seconds; on a quiet machine nothing takes a third of it


@dataclass
class SlurmProject:
    """A working folder whose runs share their data and pack plan; each drill trains a run of its own."""

    code: Path
    folder: Path
    cluster: SlurmCluster

    def start(self, *args: object, slow: float = 0.3) -> subprocess.Popen:
        """Starts `snakemake --profile slurm`, in a process group of its own; its output goes to controller.log."""
        own = {"PYTHONPATH": str(self.code / "tests"), "TEST_SLOW": str(slow), "OMP_NUM_THREADS": "1"}
        own["SNAKETUNE_SITE"] = str(self.folder / "site.yaml")
        with open(self.folder / "controller.log", "ab") as log:
            return subprocess.Popen(
                self.command("--profile", "slurm", *args),
                env={**self.cluster.environment, **own},
                stdout=log,
                stderr=log,
                cwd=self.code,
                start_new_session=True,
            )

    def command(self, *args: object) -> list[str]:
        """A Snakemake command for this folder."""
        command = [sys.executable, "-m", "snakemake", "--directory", self.folder]
        return [str(word) for word in (*command, "--configfile", self.folder / "config.yaml", *args)]

    @contextmanager
    def training(self, run: str, *args: object, slow: float = 0.3) -> Iterator[subprocess.Popen]:
        """Trains a run on the cluster. After the block it must end well, which the block has to make possible."""
        running = self.start(self.manifest(run), *args, slow=slow)
        try:
            yield running
            assert running.wait(timeout=PATIENCE) == 0, self.said()[-6000:]
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()

    def manifest(self, run: str) -> Path:
        return Path("results") / run / "train.json"

    def configure(self, config: dict) -> None:
        """Writes the config file."""
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def said(self) -> str:
        """What all controllers have said."""
        return (self.folder / "controller.log").read_text(errors="replace")

    def result(self, run: str) -> tuple:
        """What must not depend on what happened: the weights' digest, and loss and learning rate of each step."""
        manifest = json.loads((self.folder / self.manifest(run)).read_text())
        lines = self.metrics(run)
        return manifest["weights_sha256"], [(line["step"], line["loss"], line["lr"]) for line in lines]

    def run_folder(self, run: str) -> Path | None:
        return next((self.folder / "results" / run / "checkpoints").glob("*/identity.json"), Path()).parent

    def metrics(self, run: str) -> list[dict]:
        """The whole lines of metrics.jsonl so far."""
        path = self.run_folder(run) / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def attempts(self, run: str) -> list[str]:
        """The logs of a run's attempts, oldest first."""
        return [log.read_text(errors="replace") for log in self._logs(run)]

    def attempt_jobs(self, run: str) -> list[str]:
        """The Slurm jobs of a run's attempts, oldest first."""
        return [log.stem.split("-")[1] for log in self._logs(run)]

    def times(self, run: str) -> tuple[datetime, datetime]:
        """When a run's first job ended, and when its second was submitted."""
        first, second = self.attempt_jobs(run)[:2]
        said = [self.cluster.run("scontrol", "show", "job", job).stdout for job in (first, second)]
        stamps = [
            re.search(f"{key}=(\\S+)", text)[1]
            for key, text in zip(("EndTime", "SubmitTime"), said, strict=True)
        ]
        return tuple(map(datetime.fromisoformat, stamps))

    def _logs(self, run: str) -> list[Path]:
        return sorted((self.folder / "results" / run / "logs" / "train_model").glob("*.log"))

    def wait_for_step(self, running: subprocess.Popen, run: str, step: int, attempt: int = 1) -> None:
        """Waits until an attempt of a run has done a step."""

        def reached() -> bool:
            assert running.poll() is None, self.said()[-6000:]
            lines = self.metrics(run)
            return bool(lines) and lines[-1]["step"] >= step and lines[-1]["attempt"] >= attempt

        wait_until(reached, f"step {step} of {run}", PATIENCE)

    def job(self, run: str, state: str = "running") -> str:
        """The id of the job that trains a run, as soon as it is in this state."""
        found: list[str] = []

        def there() -> bool:
            said = self.cluster.run("squeue", "-h", "-t", state, "-o", "%i %k").stdout.splitlines()
            comment = f"rule_train_model_wildcards_{run}"
            found[:] = [line.split()[0] for line in said if line.split()[1:] == [comment]]
            return bool(found)

        wait_until(there, f"{state} job of {run}", PATIENCE)
        return found[0]

    def ranks(self, run: str) -> list[int]:
        """Process ids of the ranks that train a run now."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            is_task = words[0] != "srun" and words[-3:-1] == ["--launcher", "slurm"]
            if is_task and f"results/{run}/train_config.py" in words:
                found.append(int(path.parent.name))
        return sorted(found)


def wait_until(condition, what: str, seconds: float) -> None:
    """Waits for a condition; fails with `what` was missing."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.05)
