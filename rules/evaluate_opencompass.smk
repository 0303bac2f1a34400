"""
REQUIRED INPUT  {run}/hf/ or {run}/turbomind/, the extended tokenizer, {run}/train.json
OUTPUT          {run}/opencompass_config.py, and {run}/evaluation/opencompass.json: the scores on public benchmarks and on
                the user's own question sets

OpenCompass runs in a separate environment and starts its tasks on this machine or through Slurm.
"""


rule render_eval_config:
    input:
        model=benchmarked_model,
        tokenizer=path_of(TOKENIZER),
        train=TRAIN_MANIFEST,
    output:
        EVAL_CONFIG,
    log:
        f"{RUN_LOGS}/render_eval_config.log",
    benchmark:
        f"{BENCHMARKS}/render_eval_config/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        options=eval_config_flags,
        custom_set_digests=custom_set_digests,
    message:
        "Write the OpenCompass config of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/render_eval_config.py --output {output:q} --model {input.model:q} --tokenizer-path {input.tokenizer:q}'
        " --train-manifest {input.train:q} {params.options} 2>&1 | keep_log {log:q}"


rule evaluate_opencompass:
    input:
        config=EVAL_CONFIG,
        model=benchmarked_model,
        parity=lambda wildcards: PARITY.format(run=wildcards.run) if has_parity(wildcards) else [],
    output:
        report(
            OPENCOMPASS,
            caption="report/opencompass.rst",
            category="OpenCompass",
            labels={"run": "{run}"},
        ),
    log:
        f"{RUN_LOGS}/evaluate_opencompass.log",
    benchmark:
        f"{BENCHMARKS}/evaluate_opencompass/{{run}}.tsv"
    conda:
        "../envs/opencompass.yaml"
    threads: workflow.cores or 1
    resources:
        mem_mb=lambda wildcards, attempt: 16000 * attempt,
        runtime=1440,
        gres=benchmark_gres,
    params:
        work_dir=lambda wildcards: OPENCOMPASS_WORK.format(run=wildcards.run),
        options=lambda wildcards: flags(
            **options_of("evaluate_opencompass", RUNS[wildcards.run], "opencompass")
        ),
    message:
        "Run OpenCompass on run {wildcards.run}"
    shell:
        '"$OPENCOMPASS_PYTHON" "$SCRIPTS"/evaluate_opencompass.py {input.config:q} --output {output:q}'
        " --work-dir {params.work_dir:q} {params.options} 2>&1 | keep_log {log:q}"
