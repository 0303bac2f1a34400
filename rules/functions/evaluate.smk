"""Functions of the rules that evaluate models and write pages. No rules here."""


def evaluate_gres(wildcards):
    return "gpu:1" if RUNS[wildcards.run]["cluster"]["gpus_per_node"] else ""


def model_options(wildcards):
    """Returns the options that identify the model in both evaluations: base, tuned or a checkpoint's."""
    label = wildcards.get("label") or f"iter_{wildcards.step}"
    return {"label": label, "base_model": label == "base"}


def evaluate_flags(wildcards):
    """Returns the flags of evaluate_model.py. Checkpoints answer no prompts."""
    options = options_of(
        "evaluate_model", RUNS[wildcards.run], "evaluate", "tokenize", "model", "train.attention"
    )
    if not wildcards.get("label"):
        options["prompts"] = None
    return flags(**model_options(wildcards), **options)


def tool_call_flags(wildcards, input):
    """Returns the flags of evaluate_tool_calls.py. Snakemake does not compare them: the function takes `input`."""
    limits = ("tool_calls.plain_text", "tool_calls.max_tokens")
    sections = (*limits, "tool_calls", "tokenize", "model", "train.attention")
    options = options_of("evaluate_tool_calls", RUNS[wildcards.run], *sections)
    return flags(**model_options(wildcards), **options)


def tool_calls_of(label):
    """Returns an input function: the tool-call evaluation of a run's model, if the run enables it."""
    return lambda wildcards: (
        TOOL_CALLS.format(run=wildcards.run, label=label)
        if RUNS[wildcards.run]["tool_calls"]["enabled"]
        else []
    )


def asks_checkpoints(run):
    """True if checkpoints are also evaluated on tool calls, by which the best is chosen."""
    return RUNS[run]["evaluate"]["best_metric"] != "loss"


def followed_evaluations(label):
    """Returns an input function: the base or tuned model's evaluations to compare those of checkpoints with."""

    def files(wildcards):
        patterns = [EVALUATION, *([TOOL_CALLS] if asks_checkpoints(wildcards.run) else [])]
        return expand(patterns, run=wildcards.run, label=label)

    return files


def checkpoint_evaluations(wildcards):
    """Returns the evaluations of all checkpoints of a run, which are known once its training has started."""
    saved = read_json(checkpoints.list_checkpoints.get(run=wildcards.run).output[0])
    patterns = [CHECKPOINT_EVALUATION, *([CHECKPOINT_TOOL_CALLS] if asks_checkpoints(wildcards.run) else [])]
    return expand(patterns, run=wildcards.run, identity=Path(saved["run_folder"]).name, step=saved["steps"])


def choose_flags(wildcards):
    """Returns the flags of choose_checkpoint.py."""
    return flags(**options_of("choose_checkpoint", RUNS[wildcards.run], "evaluate"))


def opencompass_of(wildcards):
    """Returns OpenCompass's scores, if the run enables them."""
    return OPENCOMPASS.format(run=wildcards.run) if RUNS[wildcards.run]["opencompass"]["enabled"] else []


def benchmarked_model(wildcards):
    """Returns the model folder that OpenCompass loads."""
    pattern = TURBOMIND if RUNS[wildcards.run]["opencompass"]["backend"] == "turbomind" else HF
    return pattern.format(run=wildcards.run)


def benchmark_gpus(wildcards):
    """Returns the GPUs per OpenCompass task."""
    run = RUNS[wildcards.run]
    return (
        run["turbomind"]["tp"] if run["opencompass"]["backend"] == "turbomind" else run["opencompass"]["gpus"]
    )


def benchmark_gres(wildcards):
    """Returns the GPUs of the job itself: none if OpenCompass requests GPUs from Slurm."""
    gpus = benchmark_gpus(wildcards)
    return f"gpu:{gpus}" if gpus and RUNS[wildcards.run]["opencompass"]["runner"] == "local" else ""


def eval_config_flags(wildcards):
    """Returns the flags of render_eval_config.py."""
    sections = ("opencompass.gpus", "opencompass.groups", "opencompass.custom", "opencompass")
    options = options_of("render_eval_config", RUNS[wildcards.run], *sections)
    return flags(abbr=wildcards.run, **(options | {"gpus": benchmark_gpus(wildcards)}))


def custom_set_digests(wildcards):
    return [FINGERPRINTS.file(path) for path in RUNS[wildcards.run]["opencompass"]["custom"].values()]


def report_flags(wildcards, input):
    """Returns the flags of render_report.py, without inputs that the run does not have."""
    run = wildcards.run
    return flags(
        hf_manifest=f"{input.hf}/{result_paths.MANIFEST}",
        turbomind_manifest=f"{input.turbomind}/{result_paths.MANIFEST}" if has_turbomind(wildcards) else None,
        base_tool_calls=input.get("base_tool_calls") or None,
        tuned_tool_calls=input.get("tuned_tool_calls") or None,
        opencompass=input.get("opencompass") or None,
        checkpoints=input.get("checkpoints") or None,
        parity=input.get("parity") or None,
        benchmarks=BENCHMARKS,
        benchmark_names=[run, data_key(run), tokenizer_key(run)],
    )


def compare_flags():
    """Returns the arguments of compare_runs.py: the runs' folders, baseline first, and the data they share."""
    folders = [shlex.quote(str(Path(RUN_CONFIG.format(run=run)).parent)) for run in COMPARED]
    shared = dict.fromkeys(key(run) for key in (data_key, tokenizer_key) for run in COMPARED)
    return " ".join([*folders, flags(benchmarks=BENCHMARKS, shared_names=list(shared))])


def compared_page(wildcards):
    """Returns the comparison page; raises an error if there are fewer than two runs."""
    if len(COMPARED) < 2:
        raise WorkflowError(
            "config: there is only one run to compare\n"
            f"  found:    {COMPARED[0]}\n"
            "  to fix:   add runs under `runs:`, or list more of them in compare.runs; see docs/runs.md"
        )
    return COMPARE_PAGE
