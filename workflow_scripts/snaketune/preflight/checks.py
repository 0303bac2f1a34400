"""Checks that run on one machine: its packages, its GPUs, and the tokenizers of the runs."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from snaketune.common.packages import installed_versions, read_pins
from snaketune.preflight.check import Check


def check_versions(lock: Path) -> Check:
    """Compares this interpreter's packages with a lock file, ignoring the build (`+cu128`)."""
    pins = read_pins(lock)
    found = {name: version and version.split("+")[0] for name, version in installed_versions(pins).items()}
    return compare_versions("packages", lock, pins, found, platform.python_version(), sys.executable)


def check_other_versions(name: str, python: str, locks: list[Path]) -> Check:
    """Compares the packages of another interpreter (TurboMind's converter) with its lock files."""
    pins = {package: version for lock in locks for package, version in read_pins(lock).items()}
    program = (
        "import importlib.metadata, json, platform; "
        "found = {d.name.lower().replace('_', '-'): d.version.split('+')[0] for d in importlib.metadata.distributions()}; "
        "print(json.dumps([platform.python_version(), found]))"
    )
    try:
        done = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, check=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, False, f"{python} does not run: {error}", "make setup")
    version, installed = json.loads(done.stdout)
    found = {package: installed.get(package.lower().replace("_", "-")) for package in pins}
    return compare_versions(name, locks[0], pins, found, version, python)


def compare_versions(
    name: str, lock: Path, pins: Mapping[str, str], found: Mapping[str, str | None], version: str, python: str
) -> Check:
    """Returns a check that lists the packages that differ from the lock."""
    others = [
        f"{package} {found[package] or 'missing'} (not {pin})"
        for package, pin in pins.items()
        if found[package] != pin
    ]
    if not others:
        return Check(name, True, f"Python {version}, {len(pins)} packages as in {lock.name}")
    shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    return Check(name, False, f"Python {version}: {shown}", f"{python} -m pip install -r {lock}")


def check_gpus(processes: int | None) -> Check:
    """Checks that torch can use the GPUs, and that no run wants more processes than there are GPUs.

    Args:
        processes: The largest `train.processes` of the runs; None if all use one process per GPU.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
            return Check(
                "GPUs",
                False,
                f"the machine has GPUs, but torch {torch.__version__} sees none",
                "install a CUDA build of torch that the driver supports; on Slurm request GPUs (gres)",
            )
        return Check("GPUs", True, "none: CPUs in float32, gloo between the ranks")
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    memory = min(torch.cuda.mem_get_info(i)[0] for i in range(count)) / 1e9
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = f"{count} x {', '.join(names)}, {memory:.0f} GB free, CUDA {torch.version.cuda}, NCCL {nccl}"
    if processes and processes > count:
        return Check(
            "GPUs", False, found, f"train.processes is {processes}: request that many GPUs, or lower it"
        )
    return Check("GPUs", True, found)


def check_dtypes(dtypes: Iterable[str]) -> Check:
    """Checks that this device can train in the dtypes of the runs (`train.dtype`)."""
    from snaketune.models.device import check_dtype, resolve_dtype, training_device

    device = training_device()
    resolved = {resolve_dtype(dtype, device) for dtype in dtypes}
    for dtype in resolved:
        check_dtype(dtype, device)
    return Check("dtype", True, ", ".join(sorted(str(each).removeprefix("torch.") for each in resolved)))


def check_positions(run: Mapping[str, Any]) -> Check:
    """Compares the longest documents that a run allows with the lengths that its base was made for.

    Passes, since the conversations may be shorter: `snakemake plan` counts the longer ones.

    Args:
        run: `run`, `model`, `trust_remote_code` and `longest`, the most tokens of a document.
    """
    from snaketune.export.hf_tensors import empty_model
    from snaketune.models.positions import read_positions

    positions = read_positions(empty_model(run["model"], run["trust_remote_code"]))
    longest, found = run["longest"], [f"documents of up to {run['longest']:,} tokens"]
    if positions.limit is None:
        found.append("no limit in the base's config")
    elif longest <= positions.limit:
        found.append(f"the base was made for {positions.limit:,}")
    elif positions.learned:
        found.append(f"the base has learned {positions.limit:,} positions: training refuses longer documents")
    else:
        found.append(f"the base was made for only {positions.limit:,}: snakemake plan counts the longer ones")
    if positions.window and longest > positions.window:
        found.append(f"layers with a window see {positions.window:,}")
    return Check(f"positions of {run['run']}", True, "; ".join(found))


def check_tokenizer(run: Mapping[str, Any]) -> Check:
    """Compares the base tokenizer with the model, and with the extended tokenizer if it exists.

    Args:
        run: `run`, `model`, `tokenizer` (its base), `extended` (folder), `template` and `trust_remote_code`.
    """
    from snaketune.chat_format.template_file import load_template
    from snaketune.encoding.base_tokenizer import read_base
    from snaketune.encoding.extend_tokenizer import extend
    from snaketune.encoding.tokenizer import load_tokenizer
    from snaketune.models.vocabulary_rows import read_vocabulary
    from snaketune.preflight.sizes import embedding_rows

    name = f"tokenizer of {run['run']}"
    text, folder = read_base(run["tokenizer"], run["trust_remote_code"])
    wanted = extend(text, folder, load_template(run["template"]))[1]
    rows = embedding_rows(run["model"], run["trust_remote_code"])
    if wanted.base_vocab_size > rows:
        return Check(
            name,
            False,
            f"{run['tokenizer']} needs {wanted.base_vocab_size:,} embedding rows, {run['model']} has {rows:,}",
            "set tokenizer.path to the tokenizer that the model was trained with",
        )
    own = Path(run["model"]) / "tokenizer.json"
    if own.is_file():
        ours = wanted.tokenizer.get_vocab(with_added_tokens=True)
        others = [token for token, number in read_vocabulary(own).items() if ours.get(token) != number]
        if others:
            return Check(
                name,
                False,
                f"{len(others):,} tokens of {own}, such as {others[0]!r}, have different ids in {run['tokenizer']}",
                "set tokenizer.path to the tokenizer that the model was trained with",
            )
    if (Path(run["extended"]) / "manifest.json").is_file():
        made = load_tokenizer(run["extended"])
        if (made.sha256, made.base_sha256, made.ids) != (wanted.sha256, wanted.base_sha256, wanted.ids):
            return Check(
                name,
                False,
                f"{run['extended']} was made from a different base, or changed: {_difference(made, wanted)}",
                f"delete {run['extended']}; snakemake remakes it and everything that depends on it",
            )
    ids = " ".join(
        f"{token} {number}" for token, number in sorted(wanted.ids.items(), key=lambda item: item[1])
    )
    return Check(name, True, f"{ids}; {wanted.vocab_size:,} ids, {rows:,} rows in the model")


def _difference(made, wanted) -> str:
    for token, number in wanted.ids.items():
        if made.ids.get(token) != number:
            return f"{token} is {made.ids.get(token)}, now {number}"
    if made.base_sha256 != wanted.base_sha256:
        return f"base {made.base_sha256[:12]}, now {wanted.base_sha256[:12]}"
    return f"tokenizer.json {made.sha256[:12]}, now {wanted.sha256[:12]}"
