"""Functions of the preflight and training rules. No rules here."""


def render_flags(wildcards):
    """Returns the flags of render_train_config.py: the user's own config, or one flag for each setting of `train`.

    Snakemake compares the text, so the flags keep the order that they have in older results.
    """
    settings = RUNS[wildcards.run]
    train, take = settings["train"], functools.partial(options_of, "render_train_config", settings)
    if train["config"] is not None:
        return flags(**take("train.config"))
    watched = {}
    if train["eval_steps"]:
        watched |= take("train.eval_steps") | {"heldout_dir": heldout_dir(wildcards)}
        watched |= take("evaluate.max_tokens", "evaluate.max_samples")
    if train["generate_steps"]:
        watched |= take("train.generate_steps", "evaluate.prompts", "evaluate.max_new_tokens")
    lora = dict.fromkeys(f"lora_{key}" for key in train["lora"] or {})
    first = take("model", "train.loggers", "train.peak_tflops") | lora
    options = first | watched | (take("tokenize") if watched else {}) | take("train")
    # The pack plan has the length of rows. 0 steps need no flag.
    options |= {"max_length": None, **{key: train[key] or None for key in ("eval_steps", "generate_steps")}}
    return flags(
        model_path=model_source(wildcards.run),
        tokenizer_path=path_of(TOKENIZER)(wildcards),
        plan=path_of(PACK)(wildcards),
        **options,
    )


def watched_inputs(wildcards):
    """Returns the held-out conversations and prompts that training evaluates on, if its settings enable this."""
    train, prompts = RUNS[wildcards.run]["train"], RUNS[wildcards.run]["evaluate"]["prompts"]
    parts = heldout_parts(wildcards) if train["eval_steps"] else []
    return [*parts, *([prompts] if train["generate_steps"] else [])]


def train_flags(wildcards):
    """Returns the flags of train_model.py. The user's own config keeps its ZeRO stage."""
    train = RUNS[wildcards.run]["train"]
    return flags(
        deepspeed=None if train["config"] is not None else f"deepspeed_zero{train['zero_stage']}",
        processes=train["processes"] or "auto",
        hold_every=hold_every(wildcards),
    )


def hold_every(wildcards):
    """Returns how often training pins a checkpoint for evaluation, as train_model.py takes it."""
    wanted = RUNS[wildcards.run]["evaluate"]["checkpoints"]
    return {"none": "0", "all": "save"}.get(wanted) or wanted.removeprefix("every ")


def follows_checkpoints(wildcards):
    """True if checkpoints are evaluated during training."""
    return RUNS[wildcards.run]["evaluate"]["checkpoints"] != "none"


def train_threads(wildcards):
    """Returns all cores of this machine except those that evaluate checkpoints meanwhile; on Slurm, those of a rank.

    With one core, or with GPUs, which training occupies, checkpoints are evaluated after training.
    """
    if workflow.resource_settings.nodes is not None:  # `workflow.cores` is not a limit there
        return cluster_of("cpus_per_process")(wildcards)
    cores = workflow.cores or 1
    gpus = any(shutil.which(program) for program in ("nvidia-smi", "rocm-smi"))
    if gpus or cores == 1 or not follows_checkpoints(wildcards):
        return cores
    return cores - CHECKPOINT_THREADS


def train_memory(wildcards, attempt):
    """Returns MB per node."""
    return RUNS[wildcards.run]["cluster"]["mem_mb"] or 12000 * min(attempt, 3)


def train_tasks(per_node):
    """Returns a function for one of sbatch's two ways to request tasks. The Slurm plugin accepts only one of them."""

    def tasks(wildcards):
        run = RUNS[wildcards.run]
        ranks = run["train"]["processes"] or run["cluster"]["gpus_per_node"] or 1
        if per_node:
            return ranks if ranks > 1 else 0
        return 0 if ranks > 1 else run["cluster"]["nodes"]

    return tasks


def train_mpi(wildcards):
    """Returns the Slurm plugin's resource `mpi`. With either value, train_model.py calls srun, not the plugin."""
    return "srun" if train_tasks(True)(wildcards) else ""


def train_gres(wildcards):
    gpus = RUNS[wildcards.run]["cluster"]["gpus_per_node"]
    return f"gpu:{gpus}" if gpus else ""


def preflight_gate(wildcards):
    """Returns the gate before training, if the config requires it. Passing it again does not rerun the training."""
    return ancient(PREFLIGHT_PASSED) if RUNS[wildcards.run]["preflight"]["required"] else []


def preflight_settings(wildcards):
    """Returns the settings that preflight.py checks, as JSON."""
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
                "longest": min(train["max_length"], settings["data"]["max_tokens"]),
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
    """Returns a resource function of the preflight job: two ranks on one node or on two, and all GPUs of a node."""

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
