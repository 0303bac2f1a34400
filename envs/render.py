"""Generates the environment files: `<name>.in` -> `<name>.txt` (exact pins, for pip) -> `<name>.yaml` (for conda).

python envs/render.py            write the .yaml files from the .txt files
python envs/render.py --check    exit 1 if a .yaml file is out of date
python envs/render.py --lock     first pin the newest releases that the .in files allow, in new virtual environments
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ENVS = Path(__file__).resolve().parent
PYTHON_VERSION = "3.11"
CONDA = ("snaketune", "turbomind", "opencompass")


def pins(name: str) -> list[str]:
    """Returns the `package==version` lines of a .txt file."""
    lines = (ENVS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def render_conda(name: str) -> str:
    """Returns the conda environment that holds exactly the pins of `<name>.txt`."""
    head = f"# Written by envs/render.py from {name}.txt, for `snakemake --sdm conda`.\n"
    if name == "turbomind":
        head += "# lmdeploy itself follows by turbomind.post-deploy.sh, without its declared dependencies.\n"
    packages = "".join(f"      - {pin}\n" for pin in pins(name))
    return (
        f"{head}channels:\n  - conda-forge\n  - nodefaults\ndependencies:\n"
        f"  - python={PYTHON_VERSION}\n  - pip\n  - pip:\n{packages}"
    )


def render_post_deploy() -> str:
    """Returns the script that Snakemake runs in the converter's conda environment after creating it."""
    packages = " ".join(f"'{pin}'" for pin in pins("turbomind-nodeps"))
    return f"#!/bin/bash\n# Written by envs/render.py from turbomind-nodeps.txt.\nset -euo pipefail\npip install --no-deps {packages}\n"


def outputs() -> dict[Path, str]:
    """Returns the text of every generated file by path."""
    files = {ENVS / f"{name}.yaml": render_conda(name) for name in CONDA}
    files[ENVS / "turbomind.post-deploy.sh"] = render_post_deploy()
    return files


def lock(name: str, base: str | None = None) -> None:
    """Pins `<name>.in` in `<name>.txt` with pip, without the packages that `base` already pins."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        constraints = ["-r", str(ENVS / f"{base}.txt")] if base else []
        subprocess.run(
            [python, "-m", "pip", "install", "-r", ENVS / f"{name}.in", *constraints],
            check=True,
            stdout=sys.stderr,
        )
        frozen = subprocess.run(
            [python, "-m", "pip", "freeze", "--all"], check=True, capture_output=True, text=True
        ).stdout
    known = set(pins(base)) if base else set()
    # Drop "+cpu", the build for this machine, and CUDA packages, which torch pulls in.
    lines = [
        line.split("+")[0]
        for line in frozen.splitlines()
        if not line.startswith(("nvidia-", "triton", "pip=="))
    ]
    text = f"# Written by envs/render.py --lock from {name}.in.\n"
    (ENVS / f"{name}.txt").write_text(
        text + "".join(f"{x}\n" for x in lines if x not in known), encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("--lock", action="store_true", help="pin the .in files first")
    args = parser.parse_args()
    if args.lock:
        lock("snaketune")
        lock("dev", base="snaketune")
        lock("turbomind")
        lock("opencompass")
    stale = [
        path
        for path, text in outputs().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if args.check:
        print("".join(f"out of date: {path.name}; run `python envs/render.py`\n" for path in stale), end="")
        return int(bool(stale))
    for path in stale:
        path.write_text(outputs()[path], encoding="utf-8")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
