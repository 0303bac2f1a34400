"""Shows the documents that an optimizer step trained on, with file, line and tokens, and the step's loss.

Works for any run, finished or still training, with a pack plan or with XTuner's packing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from snaketune.common.cli import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--run", type=Path, required=True, help="run folder, its train.json, or results/<run> of the workflow"
    )
    add("--step", type=int, required=True, help="optimizer step, from 1")
    add("--rank", type=int, help="show only this rank")
    add("--processed-dir", type=Path, help="folder of the JSONL files, if they have moved")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from snaketune.training.step_trace import trace_step

    trace = trace_step(args.run, args.step, args.rank, args.processed_dir)
    print(json.dumps(trace, indent=2, ensure_ascii=False) if args.json else describe(trace))


def describe(trace: dict) -> str:
    """Returns a trace as text."""
    metrics = trace["metrics"]
    loss = "not trained yet" if metrics is None else f"loss {metrics['loss']}"
    lines = [f"{trace['run_folder']}, step {trace['step']}: {loss}"]
    for row in trace["rows"]:
        first, last = row["rank"], row["rank"] + trace["sequence_parallel"] - 1
        lines.append(
            f"{f'rank {first}' if first == last else f'ranks {first} to {last}'}, micro-batch {row['micro_batch']}: row {row['row']}, {row['tokens']:,} tokens"
            f" (entry {row['entry']} of epoch {row['epoch']})"
        )
        for each in row["documents"]:
            place = (
                f"{each['bin']} document {each['sample']}"
                if each["line"] is None
                else f"{_short(each['source'])}:{each['line']}"
            )
            part = (
                f"{each['tokens']:,} tokens"
                if (each["start"], each["stop"]) == (0, each["tokens"])
                else f"tokens {each['start']:,} to {each['stop'] - 1:,} of {each['tokens']:,}"
            )
            lines.append(f"    {each['dataset']}  {place}  {part}")
    lines += [f"no line numbers for {name}: {note}" for name, note in trace["notes"].items()]
    return "\n".join(lines)


def _short(path: str) -> str:
    """Returns the path relative to the working folder, if it is below it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    run(main)
