#!/bin/bash
# Written by envs/render.py from turbomind-nodeps.txt.
set -euo pipefail
pip install --no-deps 'lmdeploy==0.9.2.post1'
