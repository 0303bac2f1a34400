"""Runs a script on several ranks, as train_model.py does: ranks.py <ranks> <script> <arguments>."""

from __future__ import annotations

import sys

from snaketune.training.launch import run_ranks

if __name__ == "__main__":
    sys.exit(run_ranks([sys.executable, *sys.argv[2:]], int(sys.argv[1])))
