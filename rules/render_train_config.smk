"""
REQUIRED INPUT  the run's settings, and the file of train.config if set
OUTPUT          {run}/train_config.py: an mmengine config, complete and readable
"""


rule render_train_config:
    input:
        lambda wildcards: RUNS[wildcards.run]["train"]["config"] or [],
    output:
        TRAIN_CONFIG,
    log:
        f"{RUN_LOGS}/render_train_config.log",
    benchmark:
        f"{BENCHMARKS}/render_train_config/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=10,
    params:
        options=render_flags,
    message:
        "Render the training config of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/render_train_config.py --output {output:q} {params.options} 2>&1 | keep_log {log:q}'
