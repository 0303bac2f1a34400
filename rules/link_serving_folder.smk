"""
REQUIRED INPUT  {run}/hf/, of runs with `turbomind.mode: direct`
OUTPUT          {run}/turbomind/: the folder that lmdeploy 0.10 and later serve, with the command in serve.txt
"""


rule link_serving_folder:
    input:
        HF,
    output:
        directory(TURBOMIND),
    log:
        f"{RUN_LOGS}/link_serving_folder.log",
    benchmark:
        f"{BENCHMARKS}/link_serving_folder/{{run}}.tsv"
    wildcard_constraints:
        run=runs_in_mode("direct"),
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        options=lambda wildcards: flags(**options_of("link_serving_folder", RUNS[wildcards.run], "turbomind")),
    message:
        "Create the serving folder of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/link_serving_folder.py {input:q} {output:q} {params.options} 2>&1 | keep_log {log:q}'
