"""
REQUIRED INPUT  {processed_dir}/<dataset>/processed/<any>/<file>.jsonl and the extended tokenizer
OUTPUT          parts/{part}.json: the files of this part are tokenised; tokenized.json: all are, and have manifests
                heldout_parts/{part}.json: the lines of these datasets are set aside for evaluation

A line is set aside, or trained on, by its content alone: the rules need not talk to each other. Only what is written
last is declared: Snakemake deletes declared outputs before every attempt, and a part that is run again is to keep the
files that it, or another part before it, has finished. What is kept is decided by content (snaketune/tokenized/chunk_store.py).
"""


rule split_heldout:
    input:
        sources=sources_of(heldout_part_files),
        tokenizer=heldout_tokenizer,
    output:
        HELDOUT_PART,
    log:
        f"{LOGS}/split_heldout/{{data}}/{{part}}.log",
    benchmark:
        f"{BENCHMARKS}/split_heldout/{{data}}/{{part}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=120,
    params:
        options=heldout_flags,
        digest=digest_of(heldout_part_files),
    message:
        "Set held-out conversations aside: {wildcards.part}"
    shell:
        'python "$SCRIPTS"/split_heldout.py {params.options} --part {wildcards.part} --manifest {output:q}'
        " 2>&1 | keep_log {log:q}"


rule tokenize_dataset:
    input:
        sources=sources_of(part_files),
        tokenizer=lambda wildcards: TOKENIZER.format(tokenizer=DATA_SPECS[wildcards.data]["tokenizer"]),
    output:
        PART,
    log:
        f"{LOGS}/tokenize_dataset/{{data}}/{{part}}.log",
    benchmark:
        f"{BENCHMARKS}/tokenize_dataset/{{data}}/{{part}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=240,
        # Not parameters: another size of jobs is no reason to do one again.
        shard_mb=lambda wildcards: JOB_SIZES[wildcards.data]["shard_mb"] // MEGABYTE,
        batch_mb=lambda wildcards: JOB_SIZES[wildcards.data]["batch_mb"] // MEGABYTE,
    params:
        options=tokenize_flags,
        digest=digest_of(part_files),
    message:
        "Tokenise {wildcards.part}"
    shell:
        'python "$SCRIPTS"/tokenize_dataset.py {params.options} --tokenizer-path {input.tokenizer:q}'
        " --part {wildcards.part} --marker {output:q} --shard-mb {resources.shard_mb} --batch-mb {resources.batch_mb}"
        " --threads {threads} 2>&1 | keep_log {log:q}"


rule merge_tokenized:
    input:
        parts=lambda wildcards: expand(PART, data=wildcards.data, part=PARTS[wildcards.data]),
        tokenizer=lambda wildcards: TOKENIZER.format(tokenizer=DATA_SPECS[wildcards.data]["tokenizer"]),
    output:
        TOKENIZED,
    log:
        f"{LOGS}/merge_tokenized/{{data}}.log",
    benchmark:
        f"{BENCHMARKS}/merge_tokenized/{{data}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=240,
    params:
        options=tokenize_flags,
    message:
        "Join the tokenised parts and write the manifests"
    shell:
        'python "$SCRIPTS"/tokenize_dataset.py {params.options} --tokenizer-path {input.tokenizer:q}'
        " --merge --index {output:q} --prune 2>&1 | keep_log {log:q}"
