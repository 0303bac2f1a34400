"""
REQUIRED INPUT  the run's settings; with train.config set, that file
OUTPUT          {run}/train_config.py: an mmengine config, complete and readable
"""

TRAIN_CONFIG_KEYS = (
    "max_length lr min_lr_ratio betas weight_decay max_norm warmup_ratio max_epochs max_steps accumulative_counts zero_stage"
    " save_steps save_total_limit save_optimizer gradient_checkpointing dtype attention seed"
).split()


def render_flags(wildcards):
    """The flags of render_train_config.py: a user's own config, or one flag for each hyperparameter."""
    run, settings = wildcards.run, RUNS[wildcards.run]
    train = settings["train"]
    if train["config"] is not None:
        return flags(from_config=train["config"])
    switches = {key: str(value).lower() for key, value in train.items() if isinstance(value, bool)}
    return flags(
        model_path=model_source(run),
        tokenizer_path=path_of(TOKENIZER)(wildcards),
        train_folder=path_of(TRAIN_FOLDER)(wildcards),
        data_order=path_of(DATA_ORDER)(wildcards),
        trust_remote_code=settings["model"]["trust_remote_code"],
        **{key: switches.get(key, train[key]) for key in TRAIN_CONFIG_KEYS},
    )


rule render_train_config:
    input:
        lambda wildcards: RUNS[wildcards.run]["train"]["config"] or [],
    output:
        TRAIN_CONFIG,
    log:
        f"{LOGS}/render_train_config/{{run}}.log",
    benchmark:
        f"{BENCHMARKS}/render_train_config/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=10,
    params:
        script=script("render_train_config.py"),
        options=render_flags,
    message:
        "Render the training config of run {wildcards.run}"
    shell:
        "{params.script} --output {output:q} {params.options} 2>&1 | tee {log:q}"
