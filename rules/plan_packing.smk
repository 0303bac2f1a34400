"""
REQUIRED INPUT  tokenized.json and data_order.txt
OUTPUT          packs/{pack}/plan.json, rows.npy, slices.npy, order.npy: the documents of each packed sequence,
                and the order of the packed sequences; plan.json is written last
"""


rule plan_packing:
    input:
        data=TOKENIZED,
        data_order=DATA_ORDER,
    output:
        plan=PACK_PLAN,
        arrays=[f"{PACK}/{name}" for name in PLAN_ARRAYS],
    log:
        f"{LOGS}/plan_packing/{{data}}/{{pack}}.log",
    benchmark:
        f"{BENCHMARKS}/plan_packing/{{data}}/{{pack}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=60,
    params:
        options=plan_flags,
    message:
        "Plan the packing: {wildcards.pack}"
    shell:
        'python "$SCRIPTS"/plan_packing.py {params.options} --data-order {input.data_order:q} 2>&1 | keep_log {log:q}'
