"""
REQUIRED INPUT  {processed_dir}/<dataset>/processed/<any>/<file>.jsonl and the extended tokenizer
OUTPUT          parts/{part}.json: the files of this part are tokenised
                tokenized.json: all files are tokenised and have manifests
                heldout_parts/{part}.json: the held-out lines of these datasets are written

The content of a line alone decides whether it is held out or trained on, so the rules do not depend on each other. Only
the file written last is declared: Snakemake deletes declared outputs before every attempt, and a repeated part must keep
the files that it or an earlier part has finished. Content decides which files are kept
(snaketune/tokenized/chunk_store.py).
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
        "Hold out conversations: {wildcards.part}"
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
        # Not parameters: changing the size of jobs must not rerun them.
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
        "Merge the tokenised parts and write the manifests"
    shell:
        'python "$SCRIPTS"/tokenize_dataset.py {params.options} --tokenizer-path {input.tokenizer:q}'
        " --merge --index {output:q} --prune 2>&1 | keep_log {log:q}"
