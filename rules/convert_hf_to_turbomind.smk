"""
REQUIRED INPUT  {run}/hf/
OUTPUT          {run}/turbomind/: the folder that lmdeploy 0.9.2.post1 serves

Runs in the converter's environment, with or without a GPU.
"""


rule convert_hf_to_turbomind:
    input:
        HF,
    output:
        directory(TURBOMIND),
    log:
        f"{RUN_LOGS}/convert_hf_to_turbomind.log",
    benchmark:
        f"{BENCHMARKS}/convert_hf_to_turbomind/{{run}}.tsv"
    wildcard_constraints:
        run=runs_in_mode("convert"),
    conda:
        "../envs/turbomind.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
    params:
        model_name=lambda wildcards: RUNS[wildcards.run]["turbomind"]["model_name"],
        options=lambda wildcards: flags(
            **options_of("convert_hf_to_turbomind", RUNS[wildcards.run], "turbomind")
        ),
    message:
        "Convert run {wildcards.run} to TurboMind"
    shell:
        '"$TURBOMIND_PYTHON" "$SCRIPTS"/convert_hf_to_turbomind.py {params.model_name:q} {input:q} --dst-path {output:q} {params.options} 2>&1 | keep_log {log:q}'
