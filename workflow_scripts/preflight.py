"""Checks within a minute what would make an expensive job fail, and reports `pass` or what to fix.

There are three steps, all with the same `--folder` below results_dir. `begin` runs on the controlling host
and writes a random word. `probe` runs in a job on the partition: it reads the word, checks packages, GPUs,
network, disk and tokenizers, and writes its answers. `report` runs on the controlling host again: it reads
the answers and writes report.json and report.txt, and either writes passed.json or exits with code 1.
`snakemake preflight` runs all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import secrets
import shutil
import sys
from pathlib import Path

from snaketune.common.cli import UserError, run
from snaketune.common.files import read_json, write_json, write_text
from snaketune.settings.command_line import add_settings

NONCE, ANSWERS, PASSED = "nonce.json", "answers", "passed.json"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("step", choices=["begin", "probe", "report"], help="the step to run, see above")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of the word, the answers and the report"
    )
    parser.add_argument(
        "--settings",
        type=json.loads,
        help="for begin or probe, JSON: `runs`, `jsonl_bytes`, `turbomind_python` (probe's default: the settings of begin)",
    )
    probe = parser.add_argument_group("for probe")
    probe.add_argument("--envs", type=Path, help="folder of the lock files")
    probe.add_argument(
        "--launcher",
        choices=["none", "srun", "pytorch", "slurm", "slurm-node"],
        default="none",
        help="how the ranks are started, as for train_model.py (default: none, by this command)",
    )
    add_settings(probe, "preflight")
    probe.add_argument(
        "--processes",
        type=int,
        help="with --launcher none: number of ranks (default: one per GPU, or two without GPUs)",
    )
    return parser.parse_args()


def begin(folder: Path, settings: dict | None) -> None:
    """Removes the last report, and writes the word and the settings to check."""
    shutil.rmtree(folder, ignore_errors=True)
    word = {"nonce": secrets.token_hex(16), "host": platform.node(), "settings": settings}
    write_json(folder / NONCE, word)


def probe(arguments: argparse.Namespace) -> int:
    """Starts the ranks, or runs as one of them."""
    from snaketune.training.launch import join_environment, run_node, run_ranks, run_step

    own = [sys.executable, *sys.argv, "--launcher"]
    if arguments.launcher == "srun":
        ranks = 2 if arguments.nodes == 1 and arguments.gpus_per_node != 1 else 1  # as the rule asks for
        own = [*own, "slurm-node", "--processes", str(ranks)]
        run_step(own, arguments.nodes, ranks, 1, arguments.gpus_per_node)
        return 0  # a rank's failure shows in its answer, or in a missing answer
    if arguments.launcher in ("none", "slurm-node"):
        import torch

        processes = arguments.processes or torch.cuda.device_count() or 2
        run = run_ranks if arguments.launcher == "none" else run_node
        code = run([*own, "pytorch"], processes)
        return 0 if arguments.launcher == "none" else code
    join_environment(arguments.launcher)
    return _answer(arguments)


def _answer(arguments: argparse.Namespace) -> int:
    """Runs all checks and writes this rank's answer, once before the all-reduce and again with its result.

    Returns 1 if the all-reduce failed. The launcher then ends the other ranks, which might wait forever.
    """
    from snaketune.preflight.check import attempt
    from snaketune.preflight.checks import (
        check_dtypes,
        check_gpus,
        check_other_versions,
        check_positions,
        check_tokenizer,
        check_versions,
    )
    from snaketune.preflight.ranks import check_all_reduce
    from snaketune.preflight.sizes import check_disk

    rank, settings, envs = int(os.environ["RANK"]), arguments.settings, arguments.envs
    nonce = arguments.folder / NONCE
    answer = {
        "rank": rank,
        "world_size": int(os.environ["WORLD_SIZE"]),
        "host": platform.node(),
        "folder": str(arguments.folder.resolve()),
        "nonce": read_json(nonce)["nonce"] if nonce.is_file() else None,
    }
    processes = max((each["processes"] or 0 for each in settings["runs"]), default=0) or None
    checks = [
        attempt("packages", lambda: check_versions(envs / "snaketune.txt")),
        attempt("GPUs", lambda: check_gpus(processes)),
        attempt("dtype", lambda: check_dtypes({each["dtype"] for each in settings["runs"]})),
    ]
    if rank == 0:
        python = settings["turbomind_python"]
        locks = [envs / "turbomind.txt", envs / "turbomind-nodeps.txt"]
        if python:
            checks.append(
                attempt(
                    "TurboMind's packages",
                    lambda: check_other_versions("TurboMind's packages", python, locks),
                )
            )
        folder, runs = arguments.folder, [_resolved(each) for each in settings["runs"]]
        checks.append(attempt("disk", lambda: check_disk(folder, runs, settings["jsonl_bytes"])))
        for each in _alike(runs, "model", "tokenizer", "template", "extended"):
            checks.append(attempt(f"tokenizer of {each['run']}", lambda each=each: check_tokenizer(each)))
        for each in _alike(runs, "model", "longest"):
            checks.append(attempt(f"positions of {each['run']}", lambda each=each: check_positions(each)))
    path = arguments.folder / ANSWERS / f"rank_{rank}.json"
    for last in (False, True):
        if last:
            checks.append(attempt("all-reduce", check_all_reduce))
        write_json(path, {**answer, "checks": [dataclasses.asdict(check) for check in checks]})
    return 0 if checks[-1].passed else 1


def _alike(runs: list[dict], *names: str) -> list[dict]:
    """Returns one run for each combination of these settings. Its name counts the other runs that share them."""
    groups: dict[tuple, list[dict]] = {}
    for each in runs:
        key = tuple(each[name] for name in names)
        groups.setdefault(key, []).append(each)
    more = {key: f" and {len(group) - 1} more" if len(group) > 1 else "" for key, group in groups.items()}
    return [{**group[0], "run": group[0]["run"] + more[key]} for key, group in groups.items()]


def _resolved(settings: dict) -> dict:
    """Returns a run with the dtypes that apply on this machine."""
    from snaketune.models.device import resolve_dtype, training_device

    dtype = str(resolve_dtype(settings["dtype"], training_device())).removeprefix("torch.")
    hf_dtype = dtype if settings["hf_dtype"] == "auto" else settings["hf_dtype"]
    return {**settings, "dtype": dtype, "hf_dtype": hf_dtype}


def report(folder: Path) -> int:
    """Evaluates the answers, prints and writes the report, and deletes the word."""
    from snaketune.preflight.report import render, summarise

    if not (folder / NONCE).is_file():
        raise UserError(f"{folder / NONCE} is missing", fix="run `preflight.py begin` on this host first")
    nonce = read_json(folder / NONCE)
    answers = [read_json(path) for path in sorted((folder / ANSWERS).glob("rank_*.json"))]
    checks = summarise(nonce, answers)
    text = render(checks)
    write_json(folder / "report.json", [dataclasses.asdict(check) for check in checks])
    write_text(folder / "report.txt", text)
    print(text, end="", flush=True)
    (folder / NONCE).unlink()
    shutil.rmtree(folder / ANSWERS, ignore_errors=True)
    if not all(check.passed for check in checks):
        return 1
    write_json(folder / PASSED, {"host": nonce["host"], "settings": nonce["settings"]})
    return 0


def main() -> int | None:
    """Runs one step."""
    arguments = parse_arguments()
    if arguments.step == "begin":
        return begin(arguments.folder, arguments.settings)
    if arguments.step == "report":
        return report(arguments.folder)
    nonce = arguments.folder / NONCE
    if arguments.settings is None and nonce.is_file():
        arguments.settings = read_json(nonce)["settings"]
    if arguments.settings is None or arguments.envs is None:
        raise UserError(
            "probe needs --settings and --envs",
            found=f"no --settings and none in {nonce}, or no --envs",
            fix="see the rules begin_preflight and probe_partition, or docs/dlc.md for pods",
        )
    return probe(arguments)


if __name__ == "__main__":
    run(main)
