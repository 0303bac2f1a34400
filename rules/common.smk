"""The configuration, checked, and the grammar of every path. No rules here.

PATH GRAMMAR (wildcards in braces; everything lies below `results_dir`). The scripts read a run's files by the same names:
they stand in workflow_scripts/snaketune/common/result_paths.py.

    shared/tokenizer/{tokenizer}/                          base tokenizer + the chat tokens
    shared/data/{data}/heldout/<dataset>/processed/...     the lines set aside, in the ftdp layout
    shared/data/{data}/heldout/<dataset>.json              what was set aside of a dataset (manifest)
    shared/data/{data}/heldout_parts/{part}.json           the datasets of one job that sets lines aside, with digests
    shared/data/{data}/parts/{part}.json                   the files, or range of one, of one tokenising job
    shared/data/{data}/chunks/<dataset>/<file>/...         what is done, by content (undeclared, so retries keep it)
    shared/data/{data}/chatml_llamav13_32k/{train,valid}/cn/<dataset>/<file>.bin and .bin.meta (undeclared)
    shared/data/{data}/manifests/<dataset>.json            what was tokenised, with hashes (undeclared)
    shared/data/{data}/tokenized.json                      the digests of these manifests, written last
    shared/data/{data}/data_order.txt
    shared/data/{data}/packs/{pack}/plan.json              the pack plan: rows.npy, slices.npy and order.npy beside it
    shared/preflight/report.{json,txt}                     what `snakemake preflight` found (undeclared)
    shared/preflight/passed.json                           it passed: what trainings may wait for
    {run}/config.json                                      the run's complete settings
    {run}/train_config.py                                  the mmengine config
    {run}/checkpoints/<identity>/                          run folders (undeclared, so retries keep them)
    {run}/checkpoints/{identity}/held/iter_{step}.json     it was held for evaluation (undeclared)
    {run}/training.json                                    what trains, and which checkpoints are held for evaluation
    {run}/train.json                                       what was trained (manifest, last)
    {run}/run_plan.json                                    what the run will take
    {run}/hf/    {run}/turbomind/                          the model
    {run}/prompt_readings.json                             fixed prompts as transformers 4 and lmdeploy encode them
    {run}/parity.json                                      the conversions, proved
    {run}/evaluation/{label}.json                          label: base | tuned
    {run}/evaluation/tool_calls.{label}.json               the same models, where held-out conversations call tools
    {run}/saved_checkpoints.json                           the checkpoints to evaluate while training goes on
    {run}/checkpoint_hf/{identity}/iter_{step}/            one of them as a model; the best stays
    {run}/evaluation/checkpoints/{identity}/iter_{step}.json                its evaluation
    {run}/evaluation/checkpoints/{identity}/tool_calls.iter_{step}.json     the same, where it is asked for tool calls
    {run}/evaluation/checkpoints.json                      their figures from the first to the last
    {run}/best                                             link to the folder of the best
    {run}/opencompass_config.py                            OpenCompass's config of the tuned model
    {run}/opencompass/<identity>/                          its predictions and logs (undeclared, so retries keep them)
    {run}/evaluation/opencompass.json                      the scores
    {run}/model_card.md    {run}/serve.txt                 what it was made from and how it does; how it is served
    {run}/report.html
    compare/report.html    compare/comparison.json         the runs side by side, and every figure of that page
    {run}/logs/<rule>.log    logs/<rule>/...               what a rule's last attempt said; beside it, in a folder of the
                                                           log's name, <UTC time>-<job>.log of every one (undeclared)
    benchmarks/<rule>/...

{tokenizer}, {data} and {pack} are made of a readable name and a digest of the settings that decide their content, so
runs that agree on these settings share the files. A stage's rule, script, log and benchmark have one name.
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
from snaketune.tokenized.layout import TEMPLATE_FOLDER
from snaketune.settings.command_line import flags, options_of
from snaketune.settings.load import load_settings
from snaketune.settings.schema import load_schema

try:
    SETTINGS = load_settings(config, load_schema())
except UserError as error:
    raise WorkflowError(str(error)) from None

WORKDIR = Path.cwd()  # Snakemake leaves --directory before what is registered for its exit
RUNS = SETTINGS.runs
COMPARED = SETTINGS.compared
RESULTS = SETTINGS.results_dir.rstrip("/")

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
BENCHMARKS = f"{RESULTS}/benchmarks"

# Cores of this machine that a training leaves to the evaluation of its checkpoints.
CHECKPOINT_THREADS = max(1, (workflow.cores or 1) // 4)

# Commands find their interpreter and scripts through the prefix of every shell command, which is not tracked: where
# the checkout and its environments lie must not count as a change. Under `--sdm conda` the rule's own environment is
# first on PATH; otherwise the environment of this Snakemake has everything but the TurboMind converter and OpenCompass.
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
    # Only a config that names a hub model lets a job use the network.
    PREFIX.append("export HF_HUB_OFFLINE=1")
# The end of every rule's pipe: what it says goes to its log, which Snakemake deletes before another attempt, and to a
# file that stays. On a signal it stays to the last word.
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
            "  to fix:   `make setup` makes it; or set turbomind.mode: direct, or turbomind.enabled: false"
        )

if any(run["opencompass"]["enabled"] for run in RUNS.values()) and not USES_CONDA:
    if not Path(OPENCOMPASS_PYTHON).is_file():
        raise WorkflowError(
            "config: environments.opencompass_python does not exist\n"
            f"  found:    {OPENCOMPASS_PYTHON}\n"
            "  to fix:   `make setup-opencompass` makes it; or set opencompass.enabled: false"
        )

FINGERPRINTS = FingerprintCache(f"{RESULTS}/shared/fingerprints.json")
atexit.register(FINGERPRINTS.save)


def readable_key(path, settings):
    """Names a set of shared files: the last part of a path, and a digest of the settings that decide the content."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(str(path)).resolve().name) or "root"
    return f"{stem}-{sha256_json(settings)[:8]}"


def template_of(run):
    """The run's chat template; its file, shipped or the user's own, counts by its content."""
    template = RUNS[run]["tokenize"]["template"]
    return {"template": template, "template_sha256": FINGERPRINTS.file(template_path(template))}


def base_tokenizer(run):
    """The folder or hub name that the run's tokenizer is made from, whether its code may run, and the template."""
    settings = RUNS[run]
    source = settings["tokenizer"]["path"] or settings["model"]["path"] or settings["model"]["hub"]
    return {"source": source, "trust_remote_code": settings["model"]["trust_remote_code"]} | template_of(run)


def tokenizer_key(run):
    tokenizer = base_tokenizer(run)
    return readable_key(tokenizer["source"], tokenizer)


# What decides no byte of the tokenised files: the sizes of the jobs, and what becomes of bad lines.
SIZE_KEYS = ("shard_mb", "batch_mb")
BAD_LINE_KEYS = ("on_bad_sample", "max_bad_share")


def tokenize_options(run):
    """The options of a run's tokenisation that decide bytes."""
    options = RUNS[run]["tokenize"]
    no_bytes = (*SIZE_KEYS, *BAD_LINE_KEYS)
    return {key: options[key] for key in options if key not in no_bytes} | template_of(run)


def data_spec(run):
    """Everything that decides the bytes of a run's tokenised data, but for the conversations themselves."""
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
    """Everything that decides a run's pack plan, but for the data."""
    packing = {key: value for key, value in RUNS[run]["packing"].items() if key != "weights"}
    weights = own_weights(RUNS[run]["packing"]["weights"])
    spec = packing | {"max_length": RUNS[run]["train"]["max_length"], "format": PLAN_FORMAT}
    return spec | ({"weights": weights} if weights else {})


def pack_key(run):
    spec = pack_spec(run)
    return readable_key(f"{spec['mode']}-{spec['max_length']}", spec)


TOKENIZERS = {tokenizer_key(run): base_tokenizer(run) for run in RUNS}
DATA_SPECS = {data_key(run): data_spec(run) for run in RUNS}
PACK_SPECS = {pack_key(run): pack_spec(run) for run in RUNS}
# Of runs that share their data, the last one's hold.
JOB_SIZES = {data_key(run): {key: RUNS[run]["tokenize"][key] * MEGABYTE for key in SIZE_KEYS} for run in RUNS}
BAD_LINES = {data_key(run): {key: RUNS[run]["tokenize"][key] for key in BAD_LINE_KEYS} for run in RUNS}


wildcard_constraints:
    tokenizer="|".join(map(re.escape, TOKENIZERS)),
    data="|".join(map(re.escape, DATA_SPECS)),
    pack="|".join(map(re.escape, PACK_SPECS)),
    part="[A-Za-z0-9_.-]+",
    run="|".join(map(re.escape, RUNS)),
    label="base|tuned",
    identity="[0-9a-f]{12}",
    step="[0-9]+",


def list_datasets(processed_dir, names):
    """Finds the dataset folders and their JSONL files; checks that the names asked for are there."""
    found = find_datasets(processed_dir)
    for name in found:
        if "{" in name or "}" in name:
            raise UserError(f"the dataset folder {name!r} cannot be used", fix="rename it without braces")
    missing = [name for name in names or [] if name not in found]
    if missing or not found:
        raise UserError(
            (
                f"config: no such dataset in {processed_dir}: {missing[0]}"
                if missing
                else f"config: data.processed_dir holds no dataset: {processed_dir}"
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

# Which files each job takes: from their names and sizes alone, so that a dry run reads none.
PARTS = {
    key: split_parts(datasets, SIZES[key], JOB_SIZES[key]["shard_mb"], JOB_SIZES[key]["batch_mb"])
    for key, datasets in DATASETS.items()
}
HELDOUT_PARTS = {key: split_datasets(datasets, SIZES[key]) for key, datasets in DATASETS.items()}
