"""Runs XTuner 0.2.0's tokeniser and ours on the same files, compares every byte and prints the time ratio.

XTuner's tokenize_ftdp_datasets.py runs unmodified, in a separate virtual environment that this script creates
once. Both start from the same base tokenizer.json, add the chat tokens themselves and are timed as commands,
including start-up. The files come from --processed-dir, repeated up to --megabytes with changed words, or are
generated.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from measuring import MemoryPeak, cpu_of_children
from nasty_conversations import write_nasty
from repeated_conversations import repeat_files

REPO = Path(__file__).resolve().parent.parent
# Only the tool's imports. xtuner itself is installed without its dependencies, which include torch.
PINS = ("transformers==4.48.0", "tokenizers==0.21.0", "numpy==1.26.4", "mmengine==0.10.7")
XTUNER = "xtuner==0.2.0"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--processed-dir", type=Path, default=REPO.parent / "shared/data/ftdp", help="ftdp layout"
    )
    parser.add_argument(
        "--megabytes", type=float, help="repeat the files up to this total size (default: once)"
    )
    parser.add_argument(
        "--unchanged",
        action="store_true",
        help="repeat the same words, which favours tokenisers that cache texts",
    )
    parser.add_argument(
        "--nasty", type=int, metavar="SAMPLES", help="generate this many odd conversations instead"
    )
    parser.add_argument(
        "--short", type=int, metavar="SAMPLES", help="generate this many one-line conversations instead"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of --nasty")
    parser.add_argument(
        "--tokenizer-path",
        type=Path,
        default=REPO.parent / "shared/data/mistral_v1_tokenizer",
        help="folder with tokenizer.json and tokenizer_config.json",
    )
    parser.add_argument(
        "--work-dir", type=Path, default=REPO / "build/tokenize_vs_xtuner", help="emptied at the start"
    )
    parser.add_argument("--venv", type=Path, default=REPO / "build/xtuner-venv", help="created if missing")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="our worker processes"
    )
    parser.add_argument("--minimum-ratio", type=float, default=0.0, help="fail below this ratio of the times")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    python = make_venv(args.venv)
    shutil.rmtree(args.work_dir, ignore_errors=True)
    processed = args.work_dir / "processed"
    if args.nasty:
        write_nasty(processed, args.nasty, args.seed)
    elif args.short:
        write_short(processed, args.short)
    else:
        repeat_files(args.processed_dir, processed, args.megabytes, args.unchanged)
    base = copy_base(args.tokenizer_path, args.work_dir / "base")
    size = sum(file.stat().st_size for file in processed.rglob("*.jsonl"))
    print(f"{size / 1e6:.1f} MB of conversations, {len(os.sched_getaffinity(0))} CPUs")

    tool = next(args.venv.glob("lib/python3*/site-packages/xtuner/tools/tokenize_ftdp_datasets.py"))
    theirs, their_cpu = timed("XTuner 0.2.0", [python, tool], processed, base, args.work_dir / "xtuner")
    script = REPO / "workflow_scripts/tokenize_dataset.py"
    ours, our_cpu = timed(
        "SnakeTune",
        [sys.executable, script, "--threads", args.threads, "--control-tokens", "control"],
        processed,
        base,
        args.work_dir / "snaketune",
    )
    compare(args.work_dir)
    bare, bare_cpu = time_bare(processed, args.work_dir, args.threads)
    print(f"{ours / bare:.2f} times as long as a bare encode_batch of the same texts, including start-up")
    ratio = theirs / ours
    print(f"every byte equal; {ratio:.1f} times as fast as XTuner ({theirs:.1f} s / {ours:.1f} s)")
    print(
        f"CPU time: XTuner {their_cpu / our_cpu:.1f} times ours ({their_cpu:.1f} s / {our_cpu:.1f} s), "
        f"ours {our_cpu / bare_cpu:.2f} times that of encode_batch"
    )
    if ratio < args.minimum_ratio:
        sys.exit(f"less than {args.minimum_ratio} times as fast as XTuner")


def make_venv(folder: Path) -> Path:
    """Creates the virtual environment for XTuner's tool if it is missing; returns its Python."""
    python = folder / "bin/python"
    marker = folder / "complete"
    if not marker.is_file():
        print(f"making {folder} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PINS], check=True)
        subprocess.run([*pip, "--no-deps", XTUNER], check=True)
        marker.touch()
    return python


def write_short(folder: Path, samples: int) -> None:
    """Writes a dataset of conversations with a short question and a short answer."""
    file = folder / "short" / "processed" / "short.jsonl"
    file.parent.mkdir(parents=True)
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(samples):
            question, answer = f"What is {number} + {number % 97}?", f"It is {number + number % 97}."
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps(messages) + "\n")


def time_bare(processed: Path, work_dir: Path, threads: int) -> tuple[float, float]:
    """Returns seconds and CPU seconds of the tokenizers library for the same texts and number of threads."""
    command = [sys.executable, Path(__file__).with_name("bare_encode_batch.py"), "--processed-dir", processed]
    command += ["--tokenizer", work_dir / "snaketune/tokenizer/tokenizer.json"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment)
    peak = MemoryPeak(process.pid)
    text, _ = process.communicate()
    if process.returncode:
        sys.exit("bare encode_batch failed")
    seconds, cpu = map(float, text.split()[:2])
    show("encode_batch", seconds, cpu, peak)
    return seconds, cpu


def show(name: str, seconds: float, cpu: float, peak: MemoryPeak) -> None:
    memory = peak.stop() / 1e6
    print(f"{name:14s} {seconds:8.2f} s   {cpu:8.2f} CPU s   peak memory {memory:6.0f} MB", flush=True)


def copy_base(source: Path, target: Path) -> Path:
    """Writes a base that transformers loads only from tokenizer.json, so both tools start from that file."""
    target.mkdir(parents=True)
    shutil.copy(source / "tokenizer.json", target)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {name: config[name] for name in ("bos_token", "eos_token", "unk_token") if config.get(name)}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **kept})
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return target


def timed(name: str, command: list, processed: Path, base: Path, output: Path) -> tuple[float, float]:
    """Runs a tokeniser; prints and returns its seconds and CPU seconds, and prints its peak memory."""
    output.mkdir()
    command = [
        *map(str, command),
        *("--processed-dir", str(processed), "--tokenized-dir", str(output / "tokenized")),
        *("--tokenizer-path", str(base), "--tokenizer-w-special-tokens-save-dir", str(output / "tokenizer")),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    start, used = time.perf_counter(), cpu_of_children()
    with open(output / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak = MemoryPeak(process.pid)
        code = process.wait()
    seconds, cpu = time.perf_counter() - start, cpu_of_children() - used
    if code:
        sys.exit(f"{name} exited with {code}:\n{(output / 'log.txt').read_text(errors='replace')[-3000:]}")
    show(name, seconds, cpu, peak)
    return seconds, cpu


def compare(work_dir: Path) -> None:
    """Exits with an error unless both tools wrote the same files with the same bytes."""
    roots = [work_dir / name / "tokenized/chatml_llamav13_32k" for name in ("xtuner", "snaketune")]
    names = [sorted(file.relative_to(root) for file in root.rglob("*") if file.is_file()) for root in roots]
    if names[0] != names[1]:
        sys.exit(f"different files: {sorted(set(names[0]) ^ set(names[1]))}")
    different = [
        name for name in names[0] if not filecmp.cmp(roots[0] / name, roots[1] / name, shallow=False)
    ]
    if different:
        sys.exit(f"different bytes in {', '.join(map(str, different))}")
    total = sum((roots[0] / name).stat().st_size for name in names[0])
    print(f"compared {len(names[0])} files, {total / 1e6:.1f} MB: {', '.join(map(str, names[0][:8]))}")


if __name__ == "__main__":
    main()
