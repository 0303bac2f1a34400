"""
REQUIRED INPUT  settings, trainings and evaluations of the runs that `compare` names
OUTPUT          compare/report.html: the comparison of the runs; compare/comparison.json: its figures
"""


rule compare_runs:
    input:
        configs=expand(RUN_CONFIG, run=COMPARED),
        trains=expand(TRAIN_MANIFEST, run=COMPARED),
        evaluations=expand(EVALUATION, run=COMPARED, label="tuned"),
        tool_calls=expand(
            TOOL_CALLS,
            run=[run for run in COMPARED if RUNS[run]["tool_calls"]["enabled"]],
            label="tuned",
        ),
    output:
        page=report(
            COMPARE_PAGE,
            caption="report/compare.rst",
            category="Reports",
            labels={"run": "all runs"},
        ),
        figures=COMPARE_FIGURES,
    log:
        f"{LOGS}/compare_runs/compare.log",
    benchmark:
        f"{BENCHMARKS}/compare_runs/compare.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        options=compare_flags(),
    message:
        "Compare the runs side by side"
    shell:
        'python "$SCRIPTS"/compare_runs.py {params.options} --output {output.page:q} --json {output.figures:q}'
        " 2>&1 | keep_log {log:q}"
