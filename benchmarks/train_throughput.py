"""Compares tokens per second of our trainer, a bare PyTorch loop, transformers' Trainer and TRL's SFTTrainer.

Each trains in a separate process on the same documents. They take turns at one optimizer step while the
others wait, so other load on the machine affects all equally. The median of the rounds counts. On a busy
machine, the ratio by CPU time is more reliable than the ratio by elapsed time. Ours runs as a user starts it
(train_model.py with metrics, TensorBoard and clipping). TRL comes from a virtual environment that this script
creates once; its other packages are those of this environment. Every token is trained on, so no trainer gains
by skipping some.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
PINS = (
    *("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19"),
    *("xxhash==4.1.0", "pandas==3.1.1"),
)
NAMES = {"ours": "SnakeTune", "bare": "bare loop", "transformers": "HF Trainer", "trl": "TRL SFTTrainer"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--trainers",
        nargs="+",
        choices=list(NAMES),
        default=list(NAMES),
        help="trainers to run, in this order",
    )
    add("--model", type=Path, default=REPO / "resources/smollm2-135m", help="Hugging Face folder")
    add("--length", type=int, default=512, help="tokens per packed sequence")
    add("--accumulation", type=int, default=8, help="packed sequences per optimizer step")
    add("--mean-document", type=int, default=128, help="mean tokens per document, roughly")
    add("--rounds", type=int, default=5, help="measured steps, after one warm-up step")
    add("--zero-stage", type=int, default=1, help="ZeRO stage of our trainer")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads per trainer")
    add("--work-dir", type=Path, default=REPO / "build/train_throughput", help="emptied at the start")
    add("--venv", type=Path, default=REPO / "build/trl-venv", help="created if missing")
    add("--minimum-ratio", type=float, default=0.0, help="fail if ours is below this share of the bare loop")
    return parser.parse_args()


def main() -> None:
    a = parse_args()
    a.work_dir, a.model = a.work_dir.resolve(), a.model.resolve()
    shutil.rmtree(a.work_dir, ignore_errors=True)
    rows = (a.rounds + 4) * a.accumulation
    folder = write_documents(a.work_dir, a.model, rows * a.length, a.mean_document, a.length)
    print(
        f"{a.model.name}, fp32, packed sequences of {a.length} tokens, {a.accumulation} per step, documents of about "
        f"{a.mean_document} tokens, {a.threads} threads, {a.rounds} rounds",
        flush=True,
    )
    trainers = {name: Trainer(name, a, folder) for name in a.trainers}
    try:
        steps: dict[str, list[dict]] = {name: [] for name in trainers}
        for number in range(a.rounds + 1):
            for name, trainer in trainers.items():
                step = trainer.step()
                if number:
                    steps[name].append(step)
    finally:
        for trainer in trainers.values():
            trainer.end()
    report(steps, a.minimum_ratio)
    if "ours" in trainers:
        lines = (a.work_dir / "ours/metrics.jsonl").read_text().splitlines()[1:]
        waits = statistics.median(json.loads(line)["data_share"] for line in lines)
        print(f"ours waits for data in {waits:.2%} of a step")


def report(steps: dict[str, list[dict]], minimum_ratio: float) -> None:
    """Prints one line per trainer, with the ratio of ours to it: the median of the rounds' ratios."""
    rates = {name: [s["tokens"] / s["seconds"] for s in found] for name, found in steps.items()}
    per_cpu = {name: [s["tokens"] / s["cpu_seconds"] for s in found] for name, found in steps.items()}
    print(
        f"{'trainer':16} {'tokens/s':>9} {'slowest':>9} {'fastest':>9} {'peak MiB':>9}  ours / this, by CPU time"
    )
    for name, found in rates.items():
        ratio = ""
        if "ours" in rates and name != "ours":
            ratio = f"{median_ratio(rates['ours'], found):15.3f}  {median_ratio(per_cpu['ours'], per_cpu[name]):11.3f}"
        peak = max(step["peak_mib"] for step in steps[name])
        print(
            f"{NAMES[name]:16} {statistics.median(found):9.1f} {min(found):9.1f} {max(found):9.1f} {peak:9.0f}  {ratio}"
        )
    if minimum_ratio and median_ratio(rates["ours"], rates["bare"]) < minimum_ratio:
        sys.exit(f"ours is below {minimum_ratio} of the bare loop")


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


class Trainer:
    """A trainer in a separate process that waits between steps."""

    def __init__(self, name: str, a: argparse.Namespace, folder: Path):
        self.name, self.log = name, a.work_dir / f"{name}.log"
        ours = ours_command(a, folder) if name == "ours" else None
        python = make_venv(a.venv) if name == "trl" else sys.executable
        command = ours or [
            *(
                python,
                REPO / "benchmarks/throughput_trainers.py",
                name,
                "--model",
                a.model,
                "--folder",
                folder,
            ),
            *("--length", a.length, "--accumulation", a.accumulation, "--work-dir", a.work_dir / name),
        ]
        read, gate_write = os.pipe()
        gate_read, write = os.pipe()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(a.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(REPO / "benchmarks"),
            "GATE_READ": str(gate_read),
            "GATE_WRITE": str(gate_write),
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command)],
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(gate_read, gate_write),
                cwd=a.work_dir,
            )
        os.close(gate_read)
        os.close(gate_write)
        self._read, self._write = os.fdopen(read), os.fdopen(write, "w")
        self._hear()

    def step(self) -> dict:
        """Runs one optimizer step; returns {seconds, cpu_seconds, tokens, loss, peak_mib}."""
        self._write.write("go\n")
        self._write.flush()
        return self._hear()

    def end(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()

    def _hear(self) -> dict:
        line = self._read.readline()
        if not line:
            self.process.wait()
            sys.exit(f"{NAMES[self.name]} ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        return json.loads(line)


def ours_command(a: argparse.Namespace, folder: Path) -> list:
    """Renders our training config with the gate hook; returns the command that trains with it."""
    config = a.work_dir / "ours.py"
    scripts = REPO / "workflow_scripts"
    render = [
        *(sys.executable, scripts / "render_train_config.py", "--output", config, "--model-path", a.model),
        *("--tokenizer-path", a.model, "--train-folder", folder, "--max-length", a.length),
        *("--max-steps", 100_000, "--lr", 1e-5, "--accumulative-counts", a.accumulation, "--save-steps", 0),
        *("--zero-stage", a.zero_stage, "--gradient-checkpointing", "false", "--dtype", "float32"),
    ]
    subprocess.run([*map(str, render)], check=True)
    text = config.read_text().replace("custom_hooks = []", "custom_hooks = [dict(type=GateHook)]")
    text = text.replace("from torch.optim", "from throughput_gate import GateHook\nfrom torch.optim")
    # Like the other trainers, do not resize the embedding.
    config.write_text(text.replace("tokenizer=tokenizer_path", "tokenizer=None"))
    return [
        sys.executable,
        scripts / "train_model.py",
        config,
        "--work-dir",
        a.work_dir / "ours",
        "--processes",
        1,
    ]


def write_documents(work_dir: Path, model: Path, tokens: int, mean: int, longest: int) -> Path:
    """Writes documents of random ids, all trained on, in the ftdp layout; returns the train folder."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = np.random.RandomState(0)
    file = work_dir / "tokenized/chatml_llamav13_32k/train/cn/documents/documents.bin"
    file.parent.mkdir(parents=True)
    meta, offset, written = [], 0, 0
    with open(file, "w", encoding="utf-8") as stream:
        while written < tokens:
            # Lengths like those of chats: a few long documents hold many of the tokens.
            length = int(np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0), 8, longest))
            line = json.dumps({"tokens": rng.randint(10, vocabulary, length).tolist()}) + "\n"
            stream.write(line)
            meta.append((offset, length))
            offset, written = offset + len(line), written + length
    with open(f"{file}.meta", "wb") as stream:
        np.save(stream, np.array(meta, dtype=np.int64))
    return file.parents[2]


def make_venv(folder: Path) -> Path:
    """Creates a virtual environment with TRL that also sees our packages, if missing; returns its Python."""
    python, marker = folder / "bin/python", folder / "complete"
    if not marker.is_file():
        print(f"making {folder} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        site = next(Path(sys.prefix).glob("lib/python3*/site-packages")).resolve()
        own = next(folder.glob("lib/python3*/site-packages"))
        (own / "snaketune.pth").write_text(f"{site}\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, *PINS], check=True)
        marker.touch()
    return python


if __name__ == "__main__":
    main()
