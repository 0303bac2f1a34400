"""Compares two pack plans and reports which documents moved to different rows and steps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from snaketune.common.cli import UserError, run
from snaketune.packing.plan_diff import diff_plans


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("a", type=Path, help="plan folder, or its plan.json")
    add("b", type=Path, help="the other plan")
    add("--global-batch", type=int, default=1, help="rows per optimizer step, over all ranks")
    add("--show", type=int, default=20, help="number of moved documents to list")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.global_batch < 1:
        raise UserError("invalid --global-batch", found=args.global_batch, expected="1 or more")
    found = diff_plans(args.a, args.b, args.global_batch, args.show)
    print(
        json.dumps(found, indent=2, ensure_ascii=False) if args.json else describe(found, args.global_batch)
    )


def describe(found: dict, global_batch: int) -> str:
    """Returns the comparison as text."""
    if found["same"]:
        return "The same plan: same documents, same rows, same order."
    lines = [f"{key}: {old} -> {new}" for key, (old, new) in found["settings"].items()]
    words = {"only_a": "only in A", "only_b": "only in B", "changed": "with different content"}
    for key, names in found["files"].items():
        if names:
            lines.append(
                f"files {words[key]}: {len(names)}, {', '.join(names[:3])}{', ...' if names[3:] else ''}"
            )
    counts = found["documents"]
    lines.append(
        f"documents: {counts['both']:,} in both, {counts['only_a']:,} only in A, {counts['only_b']:,} only in B"
    )
    lines.append(
        f"of those in both: {counts['cut_otherwise']:,} cut differently; uncut or cut the same way,"
        f" {counts['with_others']:,} in a row with other documents, {counts['at_another_step']:,} at a different step of epoch 0"
        f" (steps of {global_batch:,} {'row' if global_batch == 1 else 'rows'})"
    )
    if counts["more_or_less_often"]:
        lines.append(f"more or less often per epoch: {counts['more_or_less_often']:,} of those in both")
    if found["moved"]:
        shown = f"the first {len(found['moved']):,} of " if len(found["moved"]) < counts["moved"] else ""
        lines.append(f"moved: {shown}{counts['moved']:,}, from A -> to B")
    for each in found["moved"]:
        rows, steps = (" -> ".join(map(str, each[key])) for key in ("rows", "steps"))
        lines.append(f"  {each['file']} document {each['sample']}: row {rows}, step {steps}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
