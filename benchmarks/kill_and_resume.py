"""Trains a tiny model twice on two CPU ranks, once uninterrupted and once with ten kills; plots both losses.

    python benchmarks/kill_and_resume.py [--kills 10] [--steps 240] [--seed N] [--output docs/images/resume.svg]

Each kill sends SIGKILL to a rank, the launcher or all processes at a random moment: during a step, during a
save, or any time after the start. Exits with 1 if a loss or weight of the two runs differs in a single bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow_scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny_run import Kill, curve, make_world, metrics, render, train, train_with_kills, weights_sha256

INK, PALE, STRONG, KILL = "#444444", "#9ecae1", "#08519c", "#d94801"


def last_attempt(lines: list[dict]) -> list[dict]:
    """Returns the metrics of the last attempt."""
    return [line for line in lines if line["attempt"] == lines[-1]["attempt"]]


def draw(whole: list[dict], resumed: list[dict], kills: list[Kill], verdict: str, path: Path) -> None:
    """Plots both loss curves, and below them the steps that each attempt trained."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "snaketune"  # equal plots give equal bytes
    from matplotlib import pyplot

    figure, (loss, attempts) = pyplot.subplots(
        2, 1, figsize=(8.5, 5.4), sharex=True, height_ratios=[3, 1.6], layout="constrained"
    )
    series = [
        ([line["step"] for line in lines], [line["loss"] for line in lines]) for lines in (whole, resumed)
    ]
    loss.plot(*series[0], color=PALE, linewidth=6, solid_capstyle="round", label="uninterrupted")
    loss.plot(*series[1], color=STRONG, linewidth=1.2, label=f"killed {len(kills)} times")
    for kill in kills:
        loss.axvline(kill.step, color=KILL, linewidth=0.8, linestyle=":")
    loss.plot([], [], color=KILL, linewidth=0.8, linestyle=":", label="SIGKILL")
    loss.set_ylabel("loss (nats a token)")
    loss.legend(frameon=False)
    loss.set_title(f"{verdict}; below, the steps that each attempt trained", color=INK, fontsize=10)

    for number, lines in enumerate([*(kill.lines for kill in kills), last_attempt(resumed)], start=1):
        if lines:
            span = [lines[0]["step"] - 1, lines[-1]["step"]]
            attempts.plot(span, [number, number], color=STRONG, linewidth=4, solid_capstyle="butt")
        if number <= len(kills):
            attempts.plot(kills[number - 1].step, number, "x", color=KILL, markersize=5)
    attempts.set_yticks(range(1, len(kills) + 2))
    attempts.tick_params(axis="y", labelsize=7)
    attempts.invert_yaxis()
    attempts.set_ylabel("attempt")
    attempts.set_xlabel("optimizer step")
    for axes in (loss, attempts):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Runs both trainings, compares them and plots the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=10, help="default: 10")
    parser.add_argument("--steps", type=int, default=240, help="default: 240")
    parser.add_argument("--seed", type=int, help="random seed of the kills (default: random, and printed)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/resume.svg"))
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), hidden=64)
        flags = ("--max-steps", arguments.steps, "--save-steps", 10, "--lr", 1e-2, "--global-batch", 8)
        config = render(world, "config.py", *flags)
        whole, killed = world / "whole", world / "killed"
        started = time.perf_counter()
        train(config, whole, warm=False)
        print(f"uninterrupted: {time.perf_counter() - started:.0f} s, weights {weights_sha256(whole)[:16]}")
        started = time.perf_counter()
        kills = train_with_kills(config, killed, arguments.kills, seed, arguments.steps, warm=False)
        for number, kill in enumerate(kills, start=1):
            where = "during a save" if kill.moment == "save" else f"({kill.moment})"
            print(f"kill {number}: {kill.victim} after step {kill.step} {where}")
        trained = [line for kill in kills for line in kill.lines] + last_attempt(metrics(killed))
        redone = len(trained) - arguments.steps
        print(
            f"killed: {time.perf_counter() - started:.0f} s, weights {weights_sha256(killed)[:16]}, {redone} steps redone"
        )
        same = curve(whole) == curve(killed) and weights_sha256(whole) == weights_sha256(killed)
        verdict = "Same losses and weights, bit for bit" if same else "The losses or weights differ"
        draw(metrics(whole), metrics(killed), kills, verdict, arguments.output)
        print(f"wrote {arguments.output}")
    print(verdict)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
