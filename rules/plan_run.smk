"""
REQUIRED INPUT  the run's settings, its pack plan, the extended tokenizer, the config of the base model
OUTPUT          {run}/run_plan.json: steps, tokens, memory for each ZeRO stage and offload, hours, disk
"""


rule plan_run:
    input:
        config=RUN_CONFIG,
        plan=path_of(PACK_PLAN),
        tokenizer=path_of(TOKENIZER),
        architecture=proofs_of(lambda wildcards: [wildcards.run]),
    output:
        RUN_PLAN,
    log:
        f"{RUN_LOGS}/plan_run.log",
    benchmark:
        f"{BENCHMARKS}/plan_run/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=20,
    params:
        folder=lambda wildcards, input: str(Path(input.plan).parent),
        options=lambda wildcards: flags(**options_of("plan_run", RUNS[wildcards.run], "forecast")),
    message:
        "Forecast memory, hours and disk of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/plan_run.py --config {input.config:q} --plan {params.folder:q}'
        " --tokenizer-path {input.tokenizer:q} --output {output:q} {params.options} 2>&1 | keep_log {log:q}"
