"""Fine-tunes a model from a training config, with mmengine's runner, DeepSpeed ZeRO and packed sequences.

If started again, resumes from the newest complete checkpoint of the same run, or exits at once if the run is
finished. Two configs mean the same run if hyperparameters, base weights, tokenizer, data and rows per
optimizer step are equal. Paths and comments do not matter.

Exit codes: 0 finished; 75 stopped early (SIGTERM, SIGUSR1, SIGINT, or --time-limit) and saved, start again to
resume; 2 an error that the message explains how to fix; anything else is a crash. See docs/resume.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from snaketune.common.cli import UserError, run
from snaketune.common.result_paths import METRICS, REFUSED
from snaketune.settings.command_line import add_settings


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="training config, as render_train_config.py writes it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--work-dir",
        type=Path,
        help="run folder for checkpoints and metrics; refused if it holds a different run "
        "(default: work_dirs/<name of the config>)",
    )
    where.add_argument(
        "--runs-dir",
        type=Path,
        help="folder of run folders; each run's folder is named by its run identity",
    )
    parser.add_argument(
        "--manifest", type=Path, help="JSON file for the record of the finished run; written last"
    )
    parser.add_argument(
        "--deepspeed",
        choices=[f"deepspeed_zero{stage}" for stage in range(4)],
        help="ZeRO stage, overrides the config",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "srun", "pytorch", "slurm", "slurm-node"],
        default="none",
        help="how the ranks are started: none (by this command, on this host), srun (by this command, as one step of its "
        "Slurm job), pytorch (torchrun started this rank), slurm (srun started this rank), slurm-node (srun started this "
        "command on each node, and it starts the node's ranks) (default: none)",
    )
    parser.add_argument(
        "--processes",
        default="auto",
        help="with --launcher none or srun: ranks per host; auto is one per GPU, or one without GPUs (default: auto)",
    )
    step = parser.add_argument_group("with --launcher srun")
    add_settings(step, "train_model")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="MINUTES",
        help="save and exit with code 75 before this much time has passed since the start (default: none)",
    )
    parser.add_argument(
        "--lock-wait",
        type=float,
        default=float("inf"),
        metavar="MINUTES",
        help="how long to wait while another trainer works in the run folder, before exiting with code 75 (default: until "
        "it ends, or until the time limit)",
    )
    hold = parser.add_argument_group("checkpoints to evaluate while training continues")
    hold.add_argument(
        "--hold-every",
        default="0",
        metavar="STEPS",
        help="pin a checkpoint every this many optimizer steps: keep it in held/ in the run folder, where training does "
        "not remove it; save: every saved checkpoint (default: 0, none)",
    )
    hold.add_argument(
        "--started",
        type=Path,
        metavar="JSON",
        help="JSON file for the steps and places of the checkpoints that will be pinned; written when training starts",
    )
    parser.add_argument(
        "--ignore-guard",
        action="store_true",
        help="start even if the last attempts all crashed at the same step",
    )
    return parser.parse_args()


def count_processes(asked: str, gpus: int | None) -> int:
    """Returns the ranks per host for `--processes`; `gpus` is the number per host, None counts the local GPUs."""
    if asked == "auto":
        if gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        return max(1, gpus)
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError("invalid --processes", found=asked, expected="auto or a whole number from 1")
    return int(asked)


def main() -> int | None:
    """Trains, and tells the workflow if the training is refused."""
    arguments = parse_arguments()
    if arguments.manifest is None:
        return train(arguments)
    from snaketune.training.refusal import run_marking_refusal

    marker = arguments.manifest.parent / REFUSED
    if arguments.launcher in (
        "none",
        "srun",
    ):  # the user may have changed what the last attempt was refused for
        marker.unlink(missing_ok=True)
    return run_marking_refusal(marker, lambda: train(arguments))


def train(arguments: argparse.Namespace) -> int | None:
    """Trains as one rank, or starts the ranks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import sft
    from snaketune.training import launch
    from snaketune.training.early_stop import STARTED, StopRequest

    by_srun = arguments.launcher == "srun"
    os.environ.setdefault(STARTED, str(launch.slurm_start_time() if by_srun else time.time()))

    if "SNAKETUNE_PARENT" in os.environ:
        launch.die_with_parent(int(os.environ["SNAKETUNE_PARENT"]))
    from snaketune.checkpoints.pinned import PinPolicy, pin_finished
    from snaketune.training.run_identity import resolve_hub_model
    from snaketune.training.train_config import load_config

    stage = int(arguments.deepspeed[-1]) if arguments.deepspeed else None
    config = resolve_hub_model(load_config(arguments.config, stage))
    pins = PinPolicy.from_text(arguments.hold_every, config.save_steps, arguments.started)
    work_dir, runs_dir = arguments.work_dir, arguments.runs_dir
    if work_dir is None and runs_dir is None:
        work_dir = Path("work_dirs") / arguments.config.stem

    if arguments.launcher in ("none", "srun"):
        from snaketune.training.crash_guard import check_guard, forget_tracebacks
        from snaketune.training.run_lock import wait_until_free
        from snaketune.training.run_state import find_run_state, write_manifest

        processes = count_processes(arguments.processes, arguments.gpus_per_node if by_srun else None)
        ranks = processes * (arguments.nodes if by_srun else 1)
        state = find_run_state(config, work_dir, runs_dir, ranks, announce=False)
        deadline = min(StopRequest(arguments.time_limit).deadline, time.time() + 60 * arguments.lock_wait)
        if wait_until_free(state.folder, deadline):
            state = find_run_state(config, work_dir, runs_dir, ranks, announce=False)
        if state.finished:
            pin_finished(state.folder, pins)
            if arguments.manifest:
                write_manifest(state, arguments.manifest)
            print(f"Already finished: {state.folder}", flush=True)
            return None
        if not arguments.ignore_guard:
            check_guard(state.folder, state.folder / METRICS)
        if by_srun or ranks > 1:
            own = [sys.executable, *sys.argv, "--launcher", "slurm-node" if by_srun else "pytorch"]
            if by_srun:
                code = launch.run_step(
                    own, arguments.nodes, processes, arguments.cpus_per_process, arguments.gpus_per_node
                )
            else:
                sft.import_for_training(config.model_path)
                code = launch.run_ranks(own, processes)
            if code > 128:
                forget_tracebacks(state.folder)
            return code
    if arguments.launcher == "slurm-node":
        sft.import_for_training(config.model_path)
        own = [sys.executable, *sys.argv, "--launcher", "pytorch"]
        return launch.run_node(own, count_processes(arguments.processes, arguments.gpus_per_node))

    launch.join_environment(arguments.launcher)
    from snaketune.training.train_rank import train_rank

    return train_rank(
        config,
        arguments.config,
        work_dir,
        runs_dir,
        arguments.manifest,
        arguments.time_limit,
        arguments.ignore_guard,
        pins,
    )


if __name__ == "__main__":
    run(main)
