"""Checks the configuration and defines every path. No rules here.

PATHS (wildcards in braces; all below `results_dir`). The scripts use the same names, from
workflow_scripts/snaketune/common/result_paths.py.

    shared/models/{model}/architecture.json                the proof that the base's architecture trains correctly
    shared/tokenizer/{tokenizer}/                          base tokenizer plus the chat tokens
    shared/data/{data}/heldout/<dataset>/processed/...     held-out lines, in the ftdp layout
    shared/data/{data}/heldout/<dataset>.json              manifest of a dataset's held-out lines
    shared/data/{data}/heldout_parts/{part}.json           the datasets of one split_heldout job, with digests
    shared/data/{data}/parts/{part}.json                   the files, or range of a file, of one tokenising job
    shared/data/{data}/chunks/<dataset>/<file>/...         finished chunks, by content (undeclared, so retries keep them)
    shared/data/{data}/chatml_llamav13_32k/{train,valid}/cn/<dataset>/<file>.bin and .bin.meta (undeclared)
    shared/data/{data}/manifests/<dataset>.json            manifest of a dataset's tokenised files, with hashes (undeclared)
    shared/data/{data}/tokenized.json                      the digests of these manifests, written last
    shared/data/{data}/data_order.txt
    shared/data/{data}/packs/{pack}/plan.json              the pack plan, with rows.npy, slices.npy and order.npy beside it
    shared/preflight/report.{json,txt}                     results of `snakemake preflight` (undeclared)
    shared/preflight/passed.json                           written if preflight passes; trainings can wait for it
    {run}/config.json                                      the run's complete settings
    {run}/train_config.py                                  the mmengine config
    {run}/checkpoints/<identity>/                          run folders (undeclared, so retries keep them)
    {run}/checkpoints/{identity}/held/iter_{step}.json     the checkpoint was pinned for evaluation (undeclared)
    {run}/training.json                                    the training that started, and the checkpoints that it will pin
    {run}/train.json                                       manifest of the training, written last
    {run}/run_plan.json                                    forecast of the run
    {run}/hf/    {run}/turbomind/                          the converted model
    {run}/prompt_readings.json                             fixed prompts as transformers 4 and lmdeploy encode them
    {run}/parity.json                                      proof of the conversions
    {run}/evaluation/{label}.json                          label: base | tuned
    {run}/evaluation/tool_calls.{label}.json               tool calls of the same models
    {run}/saved_checkpoints.json                           the checkpoints to evaluate during training
    {run}/checkpoint_hf/{identity}/iter_{step}/            a checkpoint as a model; the best is kept
    {run}/evaluation/checkpoints/{identity}/iter_{step}.json                its evaluation
    {run}/evaluation/checkpoints/{identity}/tool_calls.iter_{step}.json     its tool calls, if evaluated
    {run}/evaluation/checkpoints.json                      the figures of all checkpoints, in order
    {run}/best                                             link to the folder of the best checkpoint
    {run}/opencompass_config.py                            OpenCompass's config for the tuned model
    {run}/opencompass/<identity>/                          its predictions and logs (undeclared, so retries keep them)
    {run}/evaluation/opencompass.json                      the scores
    {run}/model_card.md    {run}/serve.txt                 its origin and scores; the commands that serve it
    {run}/report.html
    compare/report.html    compare/comparison.json         the comparison of runs, and its figures as JSON
    {run}/logs/<rule>.log    logs/<rule>/...               log of a rule's last attempt; a folder of the same name keeps
                                                           <UTC time>-<job>.log of every attempt (undeclared)
    {run}/logs/train_model.refused                         why the last attempt at training was refused (undeclared)
    benchmarks/<rule>/...

{model}, {tokenizer}, {data} and {pack} combine a readable name with a digest of the settings that determine the content, so runs
with equal settings share these files. A stage's rule, script, log and benchmark have the same name.
"""

import atexit
import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import Quietness

REPO = Path(workflow.basedir)
sys.path.insert(0, str(REPO / "workflow_scripts"))

from snaketune.common import result_paths
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_json
from snaketune.common.fingerprints import FingerprintCache
from snaketune.common.job_table import planned_job, render_job_table
from snaketune.chat_files.processed_layout import find_datasets
from snaketune.packing.plan_format import PLAN_ARRAYS, PLAN_FORMAT, check_weights, own_weights
from snaketune.tokenized.job_parts import MEGABYTE, TOKENIZED_FORMAT, file_sizes, split_datasets, split_parts
from snaketune.chat_format.template_file import template_path
from snaketune.export.turbomind_limits import check_run
from snaketune.tokenized.layout import TEMPLATE_FOLDER
from snaketune.settings.command_line import flags, options_of
from snaketune.settings.load import load_settings
from snaketune.settings.schema import load_schema

try:
    SETTINGS = load_settings(config, load_schema())
except UserError as error:
    raise WorkflowError(str(error)) from None

WORKDIR = Path.cwd()  # Snakemake leaves --directory before the exit handlers run
RUNS = SETTINGS.runs
COMPARED = SETTINGS.compared
RESULTS = SETTINGS.results_dir.rstrip("/")

ARCHITECTURE = f"{RESULTS}/{result_paths.ARCHITECTURE}"
TOKENIZER = f"{RESULTS}/{result_paths.TOKENIZER}"
DATA = f"{RESULTS}/{result_paths.DATA}"
HELDOUT_PART = f"{DATA}/heldout_parts/{{part}}.json"
TRAIN_FOLDER = f"{DATA}/{TEMPLATE_FOLDER}/train"
PART = f"{DATA}/parts/{{part}}.json"
TOKENIZED = f"{RESULTS}/{result_paths.TOKENIZED}"
DATA_ORDER = f"{DATA}/data_order.txt"
PACK = f"{DATA}/packs/{{pack}}"
PACK_PLAN = f"{RESULTS}/{result_paths.PACK_PLAN}"
PREFLIGHT = f"{RESULTS}/{result_paths.SHARED}/preflight"
PREFLIGHT_PASSED = f"{PREFLIGHT}/passed.json"
RUN = f"{RESULTS}/{{run}}"
RUN_CONFIG = f"{RUN}/{result_paths.CONFIG}"
TRAIN_CONFIG = f"{RUN}/{result_paths.TRAIN_CONFIG}"
CHECKPOINTS = f"{RUN}/{result_paths.CHECKPOINTS}"
RUN_PLAN = f"{RUN}/{result_paths.RUN_PLAN}"
TRAIN_MANIFEST = f"{RUN}/{result_paths.TRAIN}"
HF = f"{RUN}/{result_paths.HF}"
TURBOMIND = f"{RUN}/{result_paths.TURBOMIND}"
READINGS = f"{RUN}/{result_paths.READINGS}"
MODEL_CARD = f"{RUN}/{result_paths.MODEL_CARD}"
SERVE = f"{RUN}/{result_paths.SERVE}"
PARITY = f"{RUN}/{result_paths.PARITY}"
EVALUATION = f"{RUN}/{result_paths.EVALUATION}"
TOOL_CALLS = f"{RUN}/{result_paths.TOOL_CALLS}"
TRAINING = f"{RUN}/{result_paths.TRAINING}"
PINNED = f"{RUN}/{result_paths.RUN_FOLDER}/{result_paths.PINNED}"
SAVED_CHECKPOINTS = f"{RUN}/{result_paths.SAVED_CHECKPOINTS}"
CHECKPOINT_HF = f"{RUN}/{result_paths.CHECKPOINT_HF}"
CHECKPOINT_EVALUATION = f"{RUN}/{result_paths.CHECKPOINT_EVALUATION}"
CHECKPOINT_TOOL_CALLS = f"{RUN}/{result_paths.CHECKPOINT_TOOL_CALLS}"
CHECKPOINT_CURVE = f"{RUN}/{result_paths.CHECKPOINT_CURVE}"
BEST = f"{RUN}/{result_paths.BEST}"
EVAL_CONFIG = f"{RUN}/{result_paths.EVAL_CONFIG}"
OPENCOMPASS_WORK = f"{RUN}/{result_paths.OPENCOMPASS_WORK}"
OPENCOMPASS = f"{RUN}/{result_paths.OPENCOMPASS}"
REPORT = f"{RUN}/{result_paths.REPORT}"
COMPARE_PAGE = f"{RESULTS}/{result_paths.COMPARE_PAGE}"
COMPARE_FIGURES = f"{RESULTS}/{result_paths.COMPARE_FIGURES}"
LOGS = f"{RESULTS}/logs"
RUN_LOGS = f"{RUN}/{result_paths.LOGS}"
REFUSED = f"{RUN}/{result_paths.REFUSED}"
BENCHMARKS = f"{RESULTS}/benchmarks"

# Cores of this machine that training leaves free for evaluating its checkpoints.
CHECKPOINT_THREADS = max(1, (workflow.cores or 1) // 4)

# Commands find their interpreter and scripts through the prefix of every shell command. Snakemake does not track it, so
# moving the checkout or its environments is not a change. Under `--sdm conda` the rule's environment is first on PATH.
# Otherwise Snakemake's own environment has everything except the TurboMind converter and OpenCompass.
USES_CONDA = bool(workflow.deployment_settings.deployment_method)
TURBOMIND_PYTHON = "python" if USES_CONDA else SETTINGS.environments["turbomind_python"]
OPENCOMPASS_PYTHON = "python" if USES_CONDA else SETTINGS.environments["opencompass_python"]
PREFIX = [
    "set -euo pipefail",
    f"export SCRIPTS={shlex.quote(str(REPO / 'workflow_scripts'))}",
    f"export TURBOMIND_PYTHON={shlex.quote(TURBOMIND_PYTHON)}",
    f"export OPENCOMPASS_PYTHON={shlex.quote(OPENCOMPASS_PYTHON)}",
]
if not USES_CONDA:
    PREFIX.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
if not any(run["model"]["hub"] for run in RUNS.values()):
    # Jobs may use the network only if the config names a hub model.
    PREFIX.append("export HF_HUB_OFFLINE=1")
# The end of every rule's pipe: writes the output to the rule's log, which Snakemake deletes before the next attempt, and
# to a file that is kept. It ignores signals, so the last lines are logged too.
PREFIX.append(
    "keep_log() {{ local kept=${{1%.log}}; mkdir -p \"$kept\"; trap '' INT TERM USR1;"
    ' exec tee "$1" "$kept/$(date -u +%Y%m%dT%H%M%SZ)-${{SLURM_JOB_ID:-$$}}.log"; }}'
)
shell.prefix("; ".join(PREFIX) + "; ")

CONVERTED = [
    run for run in RUNS.values() if run["turbomind"]["enabled"] and run["turbomind"]["mode"] == "convert"
]
if CONVERTED and not USES_CONDA:
    if not Path(SETTINGS.environments["turbomind_python"]).is_file():
        raise WorkflowError(
            "config: environments.turbomind_python does not exist\n"
            f"  found:    {SETTINGS.environments['turbomind_python']}\n"
            "  to fix:   run `make setup`, or set turbomind.mode: direct or turbomind.enabled: false"
        )

# What lmdeploy cannot serve is known from the base's config.json, so no run trains for it in vain.
try:
    for name, run in RUNS.items():
        check_run(name, run)
except UserError as error:
    raise WorkflowError(str(error)) from None

if any(run["opencompass"]["enabled"] for run in RUNS.values()) and not USES_CONDA:
    if not Path(OPENCOMPASS_PYTHON).is_file():
        raise WorkflowError(
            "config: environments.opencompass_python does not exist\n"
            f"  found:    {OPENCOMPASS_PYTHON}\n"
            "  to fix:   run `make setup-opencompass`, or set opencompass.enabled: false"
        )

FINGERPRINTS = FingerprintCache(f"{RESULTS}/shared/fingerprints.json")
atexit.register(FINGERPRINTS.save)


def readable_key(path, settings):
    """Names a set of shared files by the last part of a path and a digest of the settings behind the content."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(str(path)).resolve().name) or "root"
    return f"{stem}-{sha256_json(settings)[:8]}"


def template_of(run):
    """Returns the run's chat template and the digest of its file, shipped or the user's own."""
    template = RUNS[run]["tokenize"]["template"]
    return {"template": template, "template_sha256": FINGERPRINTS.file(template_path(template))}


def base_tokenizer(run):
    """Returns the base tokenizer's folder or hub name, whether its code may run, and the template."""
    settings = RUNS[run]
    source = settings["tokenizer"]["path"] or settings["model"]["path"] or settings["model"]["hub"]
    return {"source": source, "trust_remote_code": settings["model"]["trust_remote_code"]} | template_of(run)


def tokenizer_key(run):
    tokenizer = base_tokenizer(run)
    return readable_key(tokenizer["source"], tokenizer)


# Settings that do not affect the bytes of tokenised files: job sizes and the handling of bad lines.
SIZE_KEYS = ("shard_mb", "batch_mb")
BAD_LINE_KEYS = ("on_bad_sample", "max_bad_share")


def tokenize_options(run):
    """Returns a run's tokenising options that affect the bytes."""
    options = RUNS[run]["tokenize"]
    no_bytes = (*SIZE_KEYS, *BAD_LINE_KEYS)
    return {key: options[key] for key in options if key not in no_bytes} | template_of(run)


def data_spec(run):
    """Returns everything that determines the bytes of a run's tokenised data, except the conversations."""
    settings = RUNS[run]
    heldout = settings["heldout"]
    aside = heldout["processed_dir"] is None
    return {
        "processed_dir": settings["data"]["processed_dir"],
        "datasets": settings["data"]["datasets"],
        "max_tokens": settings["data"]["max_tokens"],
        "tokenize": tokenize_options(run),
        "tokenizer": tokenizer_key(run),
        "heldout_share": heldout["share"] if aside else 0,
        "heldout_seed": heldout["seed"] if aside else 0,
        "format": TOKENIZED_FORMAT,
    }


def data_key(run):
    spec = data_spec(run)
    return readable_key(spec["processed_dir"], spec)


def pack_spec(run):
    """Returns everything that determines a run's pack plan, except the data."""
    packing = {key: value for key, value in RUNS[run]["packing"].items() if key != "weights"}
    weights = own_weights(RUNS[run]["packing"]["weights"])
    spec = packing | {"max_length": RUNS[run]["train"]["max_length"], "format": PLAN_FORMAT}
    return spec | ({"weights": weights} if weights else {})


def pack_key(run):
    spec = pack_spec(run)
    return readable_key(f"{spec['mode']}-{spec['max_length']}", spec)


def model_spec(run):
    """Returns everything that decides whether a base's architecture trains correctly."""
    settings = RUNS[run]
    source = settings["model"]["path"] or settings["model"]["hub"]
    config = Path(source) / "config.json"
    return {
        "source": source,
        "config_sha256": FINGERPRINTS.file(config) if config.is_file() else None,
        "options": flags(**options_of("prove_architecture", settings, "model", "packing", "train")),
    }


def model_key(run):
    spec = model_spec(run)
    return readable_key(spec["source"], spec)


# A run with its own training config is checked when it starts.
MODELS = {model_key(run): model_spec(run) for run in RUNS if RUNS[run]["train"]["config"] is None}
TOKENIZERS = {tokenizer_key(run): base_tokenizer(run) for run in RUNS}
DATA_SPECS = {data_key(run): data_spec(run) for run in RUNS}
PACK_SPECS = {pack_key(run): pack_spec(run) for run in RUNS}
# If runs share their data, the values of the last run apply.
JOB_SIZES = {data_key(run): {key: RUNS[run]["tokenize"][key] * MEGABYTE for key in SIZE_KEYS} for run in RUNS}
BAD_LINES = {data_key(run): {key: RUNS[run]["tokenize"][key] for key in BAD_LINE_KEYS} for run in RUNS}


wildcard_constraints:
    model="|".join(map(re.escape, MODELS)),
    tokenizer="|".join(map(re.escape, TOKENIZERS)),
    data="|".join(map(re.escape, DATA_SPECS)),
    pack="|".join(map(re.escape, PACK_SPECS)),
    part="[A-Za-z0-9_.-]+",
    run="|".join(map(re.escape, RUNS)),
    label="base|tuned",
    identity="[0-9a-f]{12}",
    step="[0-9]+",


def list_datasets(processed_dir, names):
    """Finds the dataset folders and their JSONL files. Checks that all named datasets exist."""
    found = find_datasets(processed_dir)
    for name in found:
        if "{" in name or "}" in name:
            raise UserError(f"invalid dataset folder name {name!r}", fix="rename the folder without braces")
    missing = [name for name in names or [] if name not in found]
    if missing or not found:
        raise UserError(
            (
                f"config: dataset {missing[0]} not found in {processed_dir}"
                if missing
                else f"config: no dataset found in data.processed_dir: {processed_dir}"
            ),
            found=", ".join(found) or "no folder with processed/**/*.jsonl",
            expected=f"{processed_dir}/<dataset>/processed/<any>/<file>.jsonl",
            fix="correct data.datasets" if missing else "correct data.processed_dir",
        )
    return {name: found[name] for name in (names or found)}


try:
    DATASETS = {
        key: list_datasets(spec["processed_dir"], spec["datasets"]) for key, spec in DATA_SPECS.items()
    }
    for run in RUNS:
        packing = RUNS[run]["packing"]
        check_weights(packing["weights"], DATASETS[data_key(run)], packing["mode"])
    SIZES = {key: file_sizes(datasets) for key, datasets in DATASETS.items()}
    OWN_HELDOUT = {
        run: list_datasets(RUNS[run]["heldout"]["processed_dir"], None)
        for run in RUNS
        if RUNS[run]["heldout"]["processed_dir"] is not None
    }
except UserError as error:
    raise WorkflowError(str(error)) from None

# The files of each job, from names and sizes alone, so a dry run reads no content.
PARTS = {
    key: split_parts(datasets, SIZES[key], JOB_SIZES[key]["shard_mb"], JOB_SIZES[key]["batch_mb"])
    for key, datasets in DATASETS.items()
}
HELDOUT_PARTS = {key: split_datasets(datasets, SIZES[key]) for key, datasets in DATASETS.items()}
