"""
REQUIRED INPUT  the manifests and evaluations of a run
OUTPUT          {run}/config.json: the run's complete settings; {run}/report.html: one page with all results
"""


rule write_run_config:
    output:
        RUN_CONFIG,
    log:
        f"{RUN_LOGS}/write_run_config.log",
    benchmark:
        f"{BENCHMARKS}/write_run_config/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        settings=lambda wildcards: json.dumps(RUNS[wildcards.run], sort_keys=True),
    message:
        "Save the settings of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/write_run_config.py --output {output:q} --settings {params.settings:q} 2>&1 | keep_log {log:q}'


rule render_report:
    input:
        config=RUN_CONFIG,
        train=TRAIN_MANIFEST,
        data=path_of(TOKENIZED),
        plan=path_of(PACK_PLAN),
        run_plan=RUN_PLAN,
        tokenizer=path_of(TOKENIZER),
        parity=lambda wildcards: (
            PARITY.format(run=wildcards.run) if RUNS[wildcards.run]["parity"]["enabled"] else []
        ),
        base=lambda wildcards: EVALUATION.format(run=wildcards.run, label="base"),
        tuned=lambda wildcards: EVALUATION.format(run=wildcards.run, label="tuned"),
        base_tool_calls=tool_calls_of("base"),
        tuned_tool_calls=tool_calls_of("tuned"),
        opencompass=opencompass_of,
        checkpoints=branch(follows_checkpoints, then=CHECKPOINT_CURVE, otherwise=[]),
        hf=HF,
        turbomind=lambda wildcards: TURBOMIND.format(run=wildcards.run) if has_turbomind(wildcards) else [],
    output:
        report(
            REPORT,
            caption="report/run.rst",
            category="Reports",
            labels={"run": "{run}"},
        ),
    log:
        f"{RUN_LOGS}/render_report.log",
    benchmark:
        f"{BENCHMARKS}/render_report/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=20,
    params:
        options=report_flags,
    message:
        "Render the report of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/render_report.py --output {output:q} --run {wildcards.run:q} --config {input.config:q}'
        " --train-manifest {input.train:q} --dataset-manifests {input.data:q}"
        " --base-evaluation {input.base:q} --tuned-evaluation {input.tuned:q} --plan {input.plan:q} --run-plan {input.run_plan:q}"
        ' --tokenizer-path {input.tokenizer:q} --lock "$SCRIPTS"/../envs/snaketune.txt {params.options} 2>&1 | keep_log {log:q}'
