"""Tiny training runs to interrupt: writes a model and data, runs train_model.py as a user, and kills it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pack_samples import write_bin
from warm import PARENT
from warm_client import WarmProcess

REPO = Path(__file__).resolve().parent.parent
VOCABULARY = 384


def make_world(folder: Path, hidden: int = 32, layers: int = 2, documents: int = 300) -> Path:
    """Writes a random Llama and tokenised documents of 4 to 90 tokens to `folder` and returns it.

    Each document repeats a few tokens, so that the model can learn something.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = hidden // 8
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    train = folder / "data" / "chatml_llamav13_32k" / "train"
    rng = np.random.RandomState(7)
    for name, samples in (("one", documents), ("two", documents // 2)):
        made = []
        for _ in range(samples):
            ids = rng.choice(rng.randint(3, VOCABULARY, 4), rng.randint(4, 90))
            ids[1 : len(ids) // 2] *= -1
            made.append(ids.tolist())
        write_bin(train / "cn" / name / "chat.bin", made)
    order = folder / "data_order.txt"
    order.write_text("cn/two/chat.bin\ncn/one/chat.bin\n")
    data = ("--train-folder", train, "--data-order", order, "--max-length", 64)
    _script("plan_packing.py", *data, "--output", folder / "plan")
    return folder


def _script(name: str, *args: object) -> None:
    done = PARENT.run([REPO / "workflow_scripts" / name, *args], timeout=300)
    assert done.returncode == 0, done.stderr


def render(
    world: Path, name: str, *flags: object, hooks: str = "", replace: dict[str, str] | None = None
) -> Path:
    """Writes the training config `name` to the world; `hooks` lists classes from train_hooks.py to add."""
    path = world / name
    paths = ("--model-path", world / "model", "--tokenizer-path", "none", "--plan", world / "plan")
    _script("render_train_config.py", "--output", path, *paths, "--warmup-ratio", 0.1, *flags)
    text = path.read_text().replace("tokenizer=tokenizer_path", "tokenizer=None")
    if hooks:
        text = text.replace("from torch.optim", f"from train_hooks import {hooks}\nfrom torch.optim")
        listed = ", ".join(f"dict(type={hook.strip()})" for hook in hooks.split(","))
        text = text.replace("custom_hooks = []", f"custom_hooks = [{listed}]")
    for old, new in (replace or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def start(
    config: Path, work_dir: Path, *flags: object, processes: int = 2, warm: bool = True, **environment: object
) -> WarmProcess | subprocess.Popen:
    """Starts train_model.py in a new process group, with its output in <work_dir>.log.

    With `warm`, the libraries are already imported (tests/warm.py); otherwise runs the plain command.
    """
    command = [str(REPO / "workflow_scripts" / "train_model.py"), str(config)]
    command += ["--work-dir", str(work_dir), "--processes", str(processes), *map(str, flags)]
    own = {"PYTHONPATH": str(REPO / "tests"), "OMP_NUM_THREADS": "1"}
    own |= {key: str(value) for key, value in environment.items()}
    options = {"env": {**os.environ, **own}, "start_new_session": True}
    with open(work_dir.with_name(f"{work_dir.name}.log"), "ab") as log:
        if warm:
            return PARENT.start(command, stdout=log.fileno(), stderr=log.fileno(), **options)
        return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, **options)


def log(work_dir: Path) -> str:
    """Returns the output of all attempts so far."""
    return work_dir.with_name(f"{work_dir.name}.log").read_text()


def train(config: Path, work_dir: Path, *flags: object, code: int = 0, **options: object) -> str:
    """Runs train_model.py, which must exit with `code`, and returns the output of this attempt."""
    path = work_dir.with_name(f"{work_dir.name}.log")
    before = path.stat().st_size if path.is_file() else 0
    running = start(config, work_dir, *flags, **options)
    try:
        assert running.wait(timeout=300) == code, log(work_dir)[-5000:]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    return path.read_bytes()[before:].decode()


def metrics(work_dir: Path) -> list[dict]:
    """Returns the complete lines of metrics.jsonl."""
    path = work_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def curve(work_dir: Path) -> list[tuple]:
    """Returns each step's values that interruptions must not change: loss, gradient norm, lr and tokens."""
    return [
        tuple(line[name] for name in ("step", "loss", "grad_norm", "lr", "tokens", "trained_tokens"))
        for line in metrics(work_dir)
    ]


def weights_sha256(work_dir: Path) -> str:
    """Returns the digest of a finished run's weights."""
    return json.loads((work_dir / "finished.json").read_text())["weights_sha256"]


@dataclass
class Kill:
    """One SIGKILL: its victim, what the run was doing, the step, and the metrics of the killed attempt."""

    victim: str
    moment: str
    step: int
    lines: list[dict] = field(repr=False)


def train_with_kills(
    config: Path, work_dir: Path, kills: int, seed: int, total_steps: int, warm: bool = True
) -> list[Kill]:
    """Trains to the end on two ranks, killing the run `kills` times at random moments and restarting it.

    `seed` determines the moments. The first start is always the plain command; with `warm`, the others are
    warm.

    Of every three moments, one is during a step, one during a save, and one anywhere during startup. For a
    save, the run is stopped some time after the temporary folder appears, and killed only if the folder still
    exists. The victim is one rank, the launcher, or the whole process group.
    """
    rng = random.Random(seed)
    done: list[Kill] = []
    furthest, limit, start_up = 0, int(0.75 * total_steps), 0.0
    for number in range(kills):
        moment = ("step", "save", "start")[number % 3]
        victim = rng.choice(("rank 0", "rank 1", "launcher", "all"))
        target = furthest + rng.randint(1, max(1, 2 * (limit - furthest) // (kills - number + 1)))
        began = time.monotonic()
        running = start(config, work_dir, warm=warm and number > 0)
        if moment == "start":
            until, before = began + rng.uniform(0, start_up), metrics(work_dir)
            while time.monotonic() < until and metrics(work_dir) == before[: len(metrics(work_dir))]:
                time.sleep(0.01)  # but not past the first steps, if this startup is faster than the first
        elif moment == "step":
            _wait(running, work_dir, target, moment)
            start_up = start_up or time.monotonic() - began
            time.sleep(rng.uniform(0, 0.1))
        else:
            while True:
                _wait(running, work_dir, target, moment)
                time.sleep(rng.uniform(0, 0.03))
                _stop(running)
                if any(work_dir.glob(".iter_*.tmp")):
                    break
                # The save ended before the chosen moment: try the next save.
                os.killpg(running.pid, signal.SIGCONT)
        assert running.poll() is None, f"ended before it could be killed: {log(work_dir)[-3000:]}"
        _kill(running, victim)
        lines = metrics(work_dir)
        known = {line["attempt"] for kill in done for line in kill.lines}
        step = lines[-1]["step"] if lines else 0
        done.append(Kill(victim, moment, step, [line for line in lines if line["attempt"] not in known]))
        furthest = max(furthest, step)
    train(config, work_dir, warm=warm)
    return done


def wait_for_step(running: WarmProcess | subprocess.Popen, work_dir: Path, step: int) -> None:
    """Waits until a run has written the metrics of `step`."""
    _wait(running, work_dir, step, "step")


def _wait(running: WarmProcess | subprocess.Popen, work_dir: Path, step: int, moment: str) -> None:
    deadline = time.monotonic() + 240
    while True:
        if moment == "save":
            saves = [path.name.split("_")[1] for path in work_dir.glob(".iter_*.tmp")]
            reached = any(int(name.split(".")[0]) >= step for name in saves)
        else:
            lines = metrics(work_dir)
            reached = bool(lines) and lines[-1]["step"] >= step
        if reached:
            return
        assert running.poll() is None and time.monotonic() < deadline, log(work_dir)[-3000:]
        time.sleep(0.002)


def _stop(running: subprocess.Popen) -> None:
    """Stops the launcher and the ranks, and waits until they are stopped."""
    os.killpg(running.pid, signal.SIGSTOP)
    while states := _states(running.pid):
        if states <= {"T"}:
            return
        time.sleep(0.001)


def _kill(running: WarmProcess | subprocess.Popen, victim: str) -> None:
    if victim == "launcher":
        running.kill()
    elif victim.startswith("rank"):
        ranks = _children(running.pid)
        if ranks:  # without ranks it is still importing, and only the launcher runs
            os.kill(ranks[int(victim[-1]) % len(ranks)], signal.SIGKILL)
        else:
            running.kill()
    else:
        os.killpg(running.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGCONT)  # processes that `_stop` stopped and that were not killed
    running.wait(timeout=60)
    while _states(running.pid):
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    """Returns the ranks of a launcher, in the order they were started."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _states(group: int) -> set[str]:
    """Returns the states of the processes in a group, as in /proc, without zombies."""
    states = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state != "Z":
            states.add(state)
    return states
