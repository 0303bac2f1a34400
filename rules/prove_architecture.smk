"""
REQUIRED INPUT  the config of the base model
OUTPUT          shared/models/{model}/architecture.json: the checks that the architecture passed

It also checks the limits of lmdeploy for a hub model, whose config may not be on this machine when Snakemake starts.

Everything else waits for it (rules/keep_back_jobs.smk): an architecture that would train wrongly is refused before
anything is paid for.
"""


rule prove_architecture:
    output:
        ARCHITECTURE,
    log:
        f"{LOGS}/prove_architecture/{{model}}.log",
    benchmark:
        f"{BENCHMARKS}/prove_architecture/{{model}}.tsv"
    retries: 0  # the result would be the same
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=20,
    params:
        source=lambda wildcards: MODELS[wildcards.model]["source"],
        options=proof_flags,
    message:
        "Prove that the architecture of {params.source} trains correctly"
    shell:
        'python "$SCRIPTS"/prove_architecture.py {params.source:q} --output {output:q} {params.options} 2>&1 | keep_log {log:q}'
