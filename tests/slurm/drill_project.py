"""A project whose trainings run on the test cluster, and eyes on what they do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import yaml
from cluster import SlurmCluster

STEPS = 12  # of every training
PATIENCE = 900  # seconds; on a quiet machine nothing takes a third of it


@dataclass
class Call:
    """A call of `snakemake --profile slurm`, in a process group of its own."""

    process: subprocess.Popen
    log: Path

    def said(self) -> str:
        """Returns what it has said so far."""
        return self.log.read_text(errors="replace")

    def jobs(self) -> list[str]:
        """Returns the ids of the Slurm jobs that it has submitted so far."""
        return re.findall(r"submitted with SLURM jobid (\d+)", self.said())

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Waits for a condition; fails when the call ends without it, or when it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = self.process.poll() is not None and not condition()
            assert not ended, f"it ended without {what}: {self.said()[-6000:]}"
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE} s: {self.said()[-6000:]}"
            time.sleep(0.3)

    def end_well(self) -> None:
        """Waits for its end, which must be a good one."""
        self.wait_until(lambda: self.process.poll() is not None, "end")
        assert self.process.returncode == 0, self.said()[-6000:]

    def kill(self) -> None:
        """Kills it, if it is still there."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class SlurmProject:
    """A working folder whose runs share their data and pack plan; each drill trains a run of its own."""

    code: Path
    folder: Path
    cluster: SlurmCluster
    _calls: list[Call] = field(default_factory=list)

    def start(self, name: str, *args: object, site: str = "site.yaml", programs: Path | None = None) -> Call:
        """Starts `snakemake --profile slurm`.

        Args:
            name: Of its log.
            args: Its further arguments.
            site: File of the site's settings, in the project's folder; where there is none the profile is as shipped.
            programs: Folder that comes first on PATH, for the jobs too.
        """
        own = {"PYTHONPATH": str(self.code / "tests"), "OMP_NUM_THREADS": "1"}
        own["SNAKETUNE_SITE"] = str(self.folder / site)
        environment = {**self.cluster.environment, **own}
        if programs is not None:
            environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        path = self.folder / f"{name}.log"
        with open(path, "wb") as log:
            process = subprocess.Popen(
                self.command("--profile", "slurm", *args),
                env=environment,
                stdout=log,
                stderr=log,
                cwd=self.code,
                start_new_session=True,
            )
        call = Call(process, path)
        self._calls.append(call)
        return call

    def end(self) -> None:
        """Kills the calls that are still there."""
        for call in self._calls:
            call.kill()

    def command(self, *args: object) -> list[str]:
        """A Snakemake command for this folder."""
        command = [sys.executable, "-m", "snakemake", "--directory", self.folder]
        return [str(word) for word in (*command, "--configfile", self.folder / "config.yaml", *args)]

    def run(self, *args: object) -> None:
        """Runs Snakemake on this machine to its end."""
        own = {"PYTHONPATH": str(self.code / "tests"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            self.command(*args), env={**os.environ, **own}, cwd=self.code, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    def configure(self, config: dict) -> None:
        """Writes the config file."""
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def pace(self, run: str, **pace: int) -> None:
        """Says how fast a run trains from now on (`train_hooks.Pace`); nothing given: as fast as it can."""
        folder = self.folder / "results" / run
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / "pace.json.new"
        new.write_text(json.dumps(pace))
        new.replace(folder / "pace.json")

    def manifest(self, run: str) -> Path:
        """The file that is written when a run is trained, in the folder."""
        return Path("results") / run / "train.json"

    def result(self, run: str) -> tuple:
        """What must not depend on what happened: the weights' digest, and loss and learning rate of each step."""
        manifest = json.loads((self.folder / self.manifest(run)).read_text())
        lines = self.metrics(run)
        assert len(lines) == STEPS
        return manifest["weights_sha256"], [(line["step"], line["loss"], line["lr"]) for line in lines]

    def metrics(self, run: str) -> list[dict]:
        """The whole lines of metrics.jsonl so far."""
        path = next((self.folder / "results" / run / "checkpoints").glob("*/metrics.jsonl"), None)
        lines = path.read_bytes().split(b"\n")[:-1] if path else []
        return [json.loads(line) for line in lines]

    def attempts(self, run: str) -> list[str]:
        """The logs of a run's attempts, oldest first."""
        return [log.read_text(errors="replace") for log in self._logs(run)]

    def attempt_jobs(self, run: str) -> list[str]:
        """The Slurm jobs of a run's attempts, oldest first."""
        return [log.stem.split("-")[1] for log in self._logs(run)]

    def attempt_of(self, run: str, job: str) -> str:
        """What the attempt of a job has said so far."""
        return "".join(
            log for log, each in zip(self.attempts(run), self.attempt_jobs(run), strict=True) if each == job
        )

    def times(self, job: str) -> tuple[datetime, datetime]:
        """When a job started, and when it ended."""
        said = self.cluster.run("scontrol", "show", "job", job).stdout
        return tuple(
            datetime.fromisoformat(re.search(f"{key}=(\\S+)", said)[1]) for key in ("StartTime", "EndTime")
        )

    def _logs(self, run: str) -> list[Path]:
        return sorted((self.folder / "results" / run / "logs" / "train_model").glob("*.log"))

    def wait_for_step(self, call: Call, run: str, step: int, attempt: int = 1) -> None:
        """Waits until an attempt of a run has done a step."""

        def reached() -> bool:
            lines = self.metrics(run)
            return bool(lines) and lines[-1]["step"] >= step and lines[-1]["attempt"] >= attempt

        call.wait_until(reached, f"step {step} of {run}")

    def job(self, run: str, rule: str = "train_model", states: str = "running") -> str:
        """The id of the newest job of a run's rule that is in one of these states."""
        said = self.cluster.run("squeue", "-h", "-t", states, "--sort=-i", "-o", "%i %k").stdout.splitlines()
        return next(line.split()[0] for line in said if line.split()[1:] == [f"rule_{rule}_wildcards_{run}"])

    def ranks(self, run: str) -> list[int]:
        """Process ids of the ranks that train a run now: copies that a node's task of train_model.py forked of itself.

        Snakemake's own process in the job and srun's two name the training config as well.
        """
        words, parents = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words[folder.name] = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                parents[folder.name] = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        tasks = {
            pid
            for pid, own in words.items()
            if f"results/{run}/train_config.py" in own and "slurm-node" in own and Path(own[0]).name != "srun"
        }
        return sorted(int(pid) for pid in tasks if parents.get(pid) in tasks)
