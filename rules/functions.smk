"""Functions that fill a rule's inputs and parameters from its wildcards. No rules here."""


def path_of(pattern):
    """Returns an input function that fills a run's {run}, {tokenizer}, {data} and {pack} into a path pattern."""

    def fill(wildcards):
        run = wildcards.run
        return pattern.format(run=run, tokenizer=tokenizer_key(run), data=data_key(run), pack=pack_key(run))

    return fill


def part_files(wildcards):
    """The JSONL files of a tokenising job."""
    return [chunk.source for chunk in PARTS[wildcards.data][wildcards.part]]


def heldout_part_files(wildcards):
    """The JSONL files of a job that sets lines aside."""
    datasets = DATASETS[wildcards.data]
    return [path for name in HELDOUT_PARTS[wildcards.data][wildcards.part] for path in datasets[name]]


def sources_of(files):
    """Returns an input function. The content of these files counts, through `digest_of`, not their time stamps."""
    return lambda wildcards: [ancient(str(path)) for path in files(wildcards)]


def digest_of(files):
    """Returns a function of the digest of a job's JSONL files."""
    return lambda wildcards: FINGERPRINTS.files(files(wildcards), DATA_SPECS[wildcards.data]["processed_dir"])


def tokenize_flags(wildcards):
    """The flags of tokenize_dataset.py that parts and their merge have in common."""
    spec = DATA_SPECS[wildcards.data]
    options = {key: value for key, value in spec["tokenize"].items() if key != "template_sha256"}
    return flags(
        processed_dir=spec["processed_dir"],
        tokenized_dir=DATA.format(data=wildcards.data),
        max_length=spec["max_tokens"],
        heldout_share=spec["heldout_share"],
        heldout_seed=spec["heldout_seed"],
        **options,
        **BAD_LINES[wildcards.data],
    ) + dataset_flags(wildcards)


def heldout_tokenizer(wildcards):
    """The tokenizer, where it is needed to tell which lines hold a control token and so are bad."""
    spec = DATA_SPECS[wildcards.data]
    needed = spec["tokenize"]["control_tokens"] == "error" and spec["heldout_share"]
    return TOKENIZER.format(tokenizer=spec["tokenizer"]) if needed else []


def heldout_flags(wildcards, input):
    """The flags of split_heldout.py: which lines, and what makes one a bad line."""
    spec = DATA_SPECS[wildcards.data]
    return flags(
        processed_dir=spec["processed_dir"],
        output_dir=f"{DATA}/heldout".format(data=wildcards.data),
        share=spec["heldout_share"],
        seed=spec["heldout_seed"],
        max_length=spec["max_tokens"],
        tokenizer_path=str(input.tokenizer) or None,
        **{key: spec["tokenize"][key] for key in ("template", "mask", "control_tokens")},
    ) + dataset_flags(wildcards)


def dataset_flags(wildcards):
    """The datasets that the config names; by default a script takes all."""
    names = DATA_SPECS[wildcards.data]["datasets"] or []
    return "".join(f" {flags(dataset=name)}" for name in names)


def folder_digest(folder, patterns):
    """Digest over the files of a folder that decide what a model or tokenizer is; a hub name stands for itself."""
    if not Path(folder).is_dir():
        return folder
    return FINGERPRINTS.files([path for pattern in patterns for path in Path(folder).glob(pattern)], folder)


def model_source(run):
    return RUNS[run]["model"]["path"] or RUNS[run]["model"]["hub"]


def model_digest(wildcards):
    return folder_digest(model_source(wildcards.run), ["config.json", "*.safetensors", "*.bin"])


def flags(**options):
    """Quoted command-line flags from keyword arguments; None and False leave a flag out, True gives it alone."""
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [shlex.quote(str(item)) for item in (value if isinstance(value, list) else [value])]
    return " ".join(words)


def base_tokenizer_digest(wildcards):
    return folder_digest(TOKENIZERS[wildcards.tokenizer]["source"], ["tokenizer*", "special_tokens_map.json"])


def plan_flags(wildcards):
    """The flags of plan_packing.py."""
    data, pack = wildcards.data, PACK_SPECS[wildcards.pack]
    return flags(
        train_folder=TRAIN_FOLDER.format(data=data),
        processed_dir=DATA_SPECS[data]["processed_dir"],
        output=PACK.format(data=data, pack=wildcards.pack),
        weight=[f"{name}={weight!r}" for name, weight in pack.get("weights", {}).items()] or None,
        **{key: pack[key] for key in ("mode", "seed", "max_length")},
    )


TRAIN_CONFIG_KEYS = (
    "lr min_lr_ratio betas weight_decay max_norm warmup_ratio max_epochs max_steps accumulative_counts global_batch"
    " max_skipped_steps zero_stage offload zero3_init sequence_parallel"
    " loss_normalisation cross_entropy"
    " save_steps save_total_limit save_optimizer gradient_checkpointing dtype attention seed"
).split()


def render_flags(wildcards):
    """The flags of render_train_config.py: a user's own config, or one flag for each hyperparameter."""
    run, settings = wildcards.run, RUNS[wildcards.run]
    train = settings["train"]
    if train["config"] is not None:
        return flags(from_config=train["config"])
    switches = {key: str(value).lower() for key, value in train.items() if isinstance(value, bool)}
    evaluate = settings["evaluate"]
    more = {f"lora_{key}": value for key, value in (train["lora"] or {}).items()}
    if train["eval_steps"]:
        more |= {"eval_steps": train["eval_steps"], "heldout_dir": heldout_dir(wildcards)}
        more |= {"eval_max_tokens": evaluate["max_tokens"], "eval_max_samples": evaluate["max_samples"]}
    if train["generate_steps"]:
        more |= {"generate_steps": train["generate_steps"], "prompts": evaluate["prompts"]}
        more |= {"max_new_tokens": evaluate["max_new_tokens"]}
    if train["eval_steps"] or train["generate_steps"]:
        more |= {key: settings["tokenize"][key] for key in ("template", "mask", "control_tokens")}
    return flags(
        model_path=model_source(run),
        tokenizer_path=path_of(TOKENIZER)(wildcards),
        plan=path_of(PACK)(wildcards),
        trust_remote_code=settings["model"]["trust_remote_code"],
        loggers=train["loggers"] or None,
        peak_tflops=train["peak_tflops"],
        **more,
        **{key: switches.get(key, train[key]) for key in TRAIN_CONFIG_KEYS},
    )


def watched_inputs(wildcards):
    """What a training looks at on its way: held-out conversations and prompts, if its settings ask for them."""
    train, prompts = RUNS[wildcards.run]["train"], RUNS[wildcards.run]["evaluate"]["prompts"]
    parts = heldout_parts(wildcards) if train["eval_steps"] else []
    return [*parts, *([prompts] if train["generate_steps"] else [])]


def train_flags(wildcards):
    """The flags of train_model.py: a config of the user's own keeps its ZeRO stage."""
    train = RUNS[wildcards.run]["train"]
    return flags(
        deepspeed=None if train["config"] is not None else f"deepspeed_zero{train['zero_stage']}",
        processes=train["processes"] or "auto",
        hold_every=hold_every(wildcards),
    )


def hold_every(wildcards):
    """How often training holds a checkpoint for evaluation, as train_model.py takes it."""
    wanted = RUNS[wildcards.run]["evaluate"]["checkpoints"]
    return {"none": "0", "all": "save"}.get(wanted) or wanted.removeprefix("every ")


def follows_checkpoints(wildcards):
    """Whether checkpoints are evaluated while training goes on."""
    return RUNS[wildcards.run]["evaluate"]["checkpoints"] != "none"


def train_threads(wildcards):
    """All cores of this machine, but for those that checkpoints are evaluated on meanwhile.

    With one core, or with GPUs, which the training takes, they are evaluated after it.
    """
    cores = workflow.cores or 1
    gpus = any(shutil.which(program) for program in ("nvidia-smi", "rocm-smi"))
    if (
        gpus
        or workflow.resource_settings.nodes is not None
        or cores == 1
        or not follows_checkpoints(wildcards)
    ):
        return cores
    return cores - CHECKPOINT_THREADS


def cluster_of(key):
    """Returns a resource function: a setting of the training's Slurm job."""
    return lambda wildcards: RUNS[wildcards.run]["cluster"][key]


def train_memory(wildcards, attempt):
    """MB on each node."""
    return RUNS[wildcards.run]["cluster"]["mem_mb"] or 12000 * min(attempt, 3)


def train_tasks(per_node):
    """Returns a function of one of sbatch's two ways to ask for tasks; the Slurm plugin takes only the one that fits."""

    def tasks(wildcards):
        run = RUNS[wildcards.run]
        ranks = run["train"]["processes"] or run["cluster"]["gpus_per_node"] or 1
        if per_node:
            return ranks if ranks > 1 else 0
        return 0 if ranks > 1 else run["cluster"]["nodes"]

    return tasks


def train_mpi(wildcards):
    """How the Slurm plugin starts the job: an empty value like the other leaves srun to train_model.py."""
    return "srun" if train_tasks(True)(wildcards) else ""


def train_gres(wildcards):
    gpus = RUNS[wildcards.run]["cluster"]["gpus_per_node"]
    return f"gpu:{gpus}" if gpus else ""


def evaluate_gres(wildcards):
    return "gpu:1" if RUNS[wildcards.run]["cluster"]["gpus_per_node"] else ""


def heldout_parts(wildcards):
    """What was set aside; nothing when the run has a held-out folder of its own."""
    data = data_key(wildcards.run)
    if wildcards.run in OWN_HELDOUT:
        return []
    return expand(HELDOUT_PART, data=data, part=HELDOUT_PARTS[data])


def heldout_dir(wildcards):
    return RUNS[wildcards.run]["heldout"]["processed_dir"] or path_of(f"{DATA}/heldout")(wildcards)


def heldout_digest(wildcards):
    """Content of a held-out folder of the user's own; what was set aside is tracked by its parts."""
    own = OWN_HELDOUT.get(wildcards.run)
    return own and FINGERPRINTS.files(
        [path for paths in own.values() for path in paths], heldout_dir(wildcards)
    )


def hf_flags(wildcards):
    """The flags of convert_pth_to_hf.py."""
    run = RUNS[wildcards.run]
    return flags(**run["hf"], trust_remote_code=run["model"]["trust_remote_code"])


def model_options(wildcards):
    """What both evaluations are told of which model it is: base, tuned or that of a checkpoint."""
    label = wildcards.get("label") or f"iter_{wildcards.step}"
    return {"label": label, "base_model": label == "base"}


def evaluate_flags(wildcards):
    """The flags of evaluate_model.py; checkpoints answer no prompts."""
    settings = RUNS[wildcards.run]["evaluate"]
    return flags(
        **model_options(wildcards),
        prompts=settings["prompts"] if wildcards.get("label") else None,
        max_length=settings["max_tokens"],
        max_samples=settings["max_samples"],
        max_new_tokens=settings["max_new_tokens"],
        **{key: RUNS[wildcards.run]["tokenize"][key] for key in ("template", "mask", "control_tokens")},
        trust_remote_code=RUNS[wildcards.run]["model"]["trust_remote_code"],
    )


def tool_call_flags(wildcards, input):
    """The flags of evaluate_tool_calls.py."""
    settings = RUNS[wildcards.run]["tool_calls"]
    return flags(
        **model_options(wildcards),
        plain_text=input.get("plain_text") or None,
        max_length=settings["max_tokens"],
        **{key: settings[key] for key in ("max_points", "max_new_tokens", "max_samples", "batch_tokens")},
        **{key: RUNS[wildcards.run]["tokenize"][key] for key in ("mask", "control_tokens")},
        trust_remote_code=RUNS[wildcards.run]["model"]["trust_remote_code"],
    )


def tool_calls_of(label):
    """Returns an input function: what a run's model says of tools, where the run asks for it."""
    return lambda wildcards: (
        TOOL_CALLS.format(run=wildcards.run, label=label)
        if RUNS[wildcards.run]["tool_calls"]["enabled"]
        else []
    )


def asks_checkpoints(run):
    """Whether checkpoints are asked for tool calls too: the best is chosen by it."""
    return RUNS[run]["evaluate"]["best_metric"] != "loss"


def followed_evaluations(label):
    """Returns an input function: of the base or tuned model, the evaluations that those of checkpoints are laid beside."""

    def files(wildcards):
        patterns = [EVALUATION, *([TOOL_CALLS] if asks_checkpoints(wildcards.run) else [])]
        return expand(patterns, run=wildcards.run, label=label)

    return files


def checkpoint_evaluations(wildcards):
    """The evaluations of all checkpoints of a run, known when its training has started."""
    saved = read_json(checkpoints.list_checkpoints.get(run=wildcards.run).output[0])
    patterns = [CHECKPOINT_EVALUATION, *([CHECKPOINT_TOOL_CALLS] if asks_checkpoints(wildcards.run) else [])]
    return expand(patterns, run=wildcards.run, identity=Path(saved["run_folder"]).name, step=saved["steps"])


def choose_flags(wildcards):
    """The flags of choose_checkpoint.py."""
    settings = RUNS[wildcards.run]["evaluate"]
    return flags(metric=settings["best_metric"], keep=settings["keep_models"])


def opencompass_of(wildcards):
    """The scores of OpenCompass, where the run asks for them."""
    return OPENCOMPASS.format(run=wildcards.run) if RUNS[wildcards.run]["opencompass"]["enabled"] else []


def benchmarked_model(wildcards):
    """The folder that OpenCompass loads."""
    pattern = TURBOMIND if RUNS[wildcards.run]["opencompass"]["backend"] == "turbomind" else HF
    return pattern.format(run=wildcards.run)


def benchmark_gpus(wildcards):
    """GPUs of one of OpenCompass's tasks."""
    run = RUNS[wildcards.run]
    return (
        run["turbomind"]["tp"] if run["opencompass"]["backend"] == "turbomind" else run["opencompass"]["gpus"]
    )


def benchmark_gres(wildcards):
    """GPUs of the job itself: none where OpenCompass asks Slurm for its own."""
    gpus = benchmark_gpus(wildcards)
    return f"gpu:{gpus}" if gpus and RUNS[wildcards.run]["opencompass"]["runner"] == "local" else ""


def eval_config_flags(wildcards):
    """The flags of render_eval_config.py."""
    settings = RUNS[wildcards.run]["opencompass"]
    other = ("enabled", "custom", "data_dir", "gpus", "groups")
    return flags(
        abbr=wildcards.run,
        gpus=benchmark_gpus(wildcards),
        groups=settings["groups"] or None,
        custom=[f"{name}={path}" for name, path in settings["custom"].items()] or None,
        **{key: settings[key] for key in settings if key not in other},
    )


def custom_set_digests(wildcards):
    return [FINGERPRINTS.file(path) for path in RUNS[wildcards.run]["opencompass"]["custom"].values()]


def has_turbomind(wildcards):
    return RUNS[wildcards.run]["turbomind"]["enabled"]


def is_converted(wildcards):
    """Whether the run has files of the engine's own, which can be proved."""
    return has_turbomind(wildcards) and RUNS[wildcards.run]["turbomind"]["mode"] == "convert"


def runs_in_mode(mode):
    """A pattern of the runs whose TurboMind folder is made in this way."""
    names = [re.escape(run) for run in RUNS if RUNS[run]["turbomind"]["mode"] == mode]
    return "|".join(names) or "(?!)"


def own_prompts(wildcards):
    return RUNS[wildcards.run]["evaluate"]["prompts"] or []


def parity_flags(wildcards, input):
    """The flags of check_parity.py; what the run does not have is not compared."""
    settings = RUNS[wildcards.run]
    return flags(
        turbomind=input.get("turbomind") or None,
        readings=input.get("readings") or None,
        prompts=settings["evaluate"]["prompts"],
        template=settings["tokenize"]["template"],
        mask=settings["tokenize"]["mask"],
        control_tokens=settings["tokenize"]["control_tokens"],
        trust_remote_code=settings["model"]["trust_remote_code"],
    )


def report_flags(wildcards, input):
    """The flags of render_report.py; what the run does not have is not shown."""
    run = wildcards.run
    return flags(
        hf_manifest=f"{input.hf}/manifest.json",
        turbomind_manifest=f"{input.turbomind}/manifest.json" if has_turbomind(wildcards) else None,
        base_tool_calls=input.get("base_tool_calls") or None,
        tuned_tool_calls=input.get("tuned_tool_calls") or None,
        opencompass=input.get("opencompass") or None,
        checkpoints=input.get("checkpoints") or None,
        parity=input.get("parity") or None,
        benchmarks=BENCHMARKS,
        benchmark_names=[run, data_key(run), tokenizer_key(run)],
    )


def compare_flags():
    """The arguments of compare_runs.py: the runs' folders, the baseline first, and what the runs share."""
    folders = [shlex.quote(str(Path(RUN_CONFIG.format(run=run)).parent)) for run in COMPARED]
    shared = dict.fromkeys(key(run) for key in (data_key, tokenizer_key) for run in COMPARED)
    return " ".join([*folders, flags(benchmarks=BENCHMARKS, shared_names=list(shared))])


def compared_page(wildcards):
    """The page that lays runs side by side, if there are two."""
    if len(COMPARED) < 2:
        raise WorkflowError(
            "config: there is only one run to compare\n"
            f"  found:    {COMPARED[0]}\n"
            "  to fix:   add runs under `runs:`, or name more of them in compare.runs; see docs/runs.md"
        )
    return COMPARE_PAGE


def has_parity(wildcards):
    return RUNS[wildcards.run]["parity"]["enabled"]


def model_card_flags(wildcards, input):
    """The flags of write_model_card.py."""
    converted = is_converted(wildcards)
    return flags(
        evaluations=list(input.evaluations),
        parity=input.get("parity") or None,
        turbomind=input.get("turbomind") if converted else None,
        direct=None if converted else input.get("turbomind") or None,
        chat_template=RUNS[wildcards.run]["turbomind"]["chat_template"] if converted else None,
    )


def parity_gate(wildcards):
    """The gate before the tuned model's evaluation, where the config asks for it."""
    gated = wildcards.label == "tuned" and RUNS[wildcards.run]["parity"]["enabled"]
    return PARITY.format(run=wildcards.run) if gated else []


def preflight_gate(wildcards):
    """The gate before a training, where the config asks for it; that it was passed again is no reason to train again."""
    return ancient(PREFLIGHT_PASSED) if RUNS[wildcards.run]["preflight"]["required"] else []


def preflight_settings(wildcards):
    """What preflight.py looks at, as JSON."""
    runs = []
    for run, settings in RUNS.items():
        train = settings["train"]
        base = base_tokenizer(run)
        runs.append(
            {
                "run": run,
                "model": model_source(run),
                "trust_remote_code": settings["model"]["trust_remote_code"],
                "tokenizer": base["source"],
                "template": base["template"],
                "extended": TOKENIZER.format(tokenizer=tokenizer_key(run)),
                "hf_dtype": settings["hf"]["dtype"],
                "turbomind": settings["turbomind"]["enabled"],
                "lora_rank": train["lora"] and train["lora"]["rank"],
                **{
                    key: train[key]
                    for key in ("dtype", "zero_stage", "save_optimizer", "save_total_limit", "processes")
                },
            }
        )
    sizes = [sum(SIZES[key].values()) for key in DATA_SPECS if not Path(TOKENIZED.format(data=key)).is_file()]
    with_turbomind = any(run["turbomind"] for run in runs) and not USES_CONDA
    return json.dumps(
        {
            "runs": runs,
            "jsonl_bytes": sum(sizes),
            "turbomind_python": SETTINGS.environments["turbomind_python"] if with_turbomind else None,
        },
        sort_keys=True,
    )


def probe_shape(key):
    """Returns a resource function of the preflight job: two ranks on a node, or one on each of two; all GPUs of a node."""

    def shape(wildcards):
        clusters = [run["cluster"] for run in RUNS.values()]
        nodes = min(2, max(cluster["nodes"] for cluster in clusters))
        gpus = max(cluster["gpus_per_node"] for cluster in clusters)
        per_node = 2 if nodes == 1 and gpus != 1 else 1
        return {
            "nodes": nodes,
            "tasks": 0 if per_node > 1 else nodes,
            "tasks_per_node": per_node if per_node > 1 else 0,
            "gpus_per_node": gpus,
            "gres": f"gpu:{gpus}" if gpus else "",
            "mpi": "srun" if per_node > 1 else "",
        }[key]

    return shape


def print_plan():
    """Prints after a dry run what it would cost. Snakemake has no handler for dry runs: this one runs at its exit."""
    if not workflow.dryrun or Quietness.ALL in (workflow.output_settings.quiet or ()):
        return
    # A dry run does not know its executor: only that of a cluster comes with a number of jobs.
    cluster = workflow.resource_settings.nodes is not None
    order = workflow.dag.toposorted(set(workflow.dag.needrun_jobs(exclude_finished=False)))
    jobs = [
        planned_job(
            job.rule.name,
            cluster and job.rule.name not in workflow._localrules,
            job.threads,
            job.resources,
            job.benchmark and WORKDIR / job.benchmark,
        )
        for level in order
        for job in sorted(level, key=str)
        if not job.is_norun
    ]
    if jobs:
        print(f"\n{render_plan(jobs, WORKDIR / BENCHMARKS)}", end="")
