"""
REQUIRED INPUT  {processed_dir}/{dataset}/processed/<any>/<file>.jsonl and the extended tokenizer
OUTPUT          the dataset's .bin and .bin.meta files, the lines set aside for evaluation, and a manifest of each

A line is set aside, or trained on, by its content alone: the two rules need not talk to each other.
"""


rule split_heldout:
    input:
        dataset_sources,
    output:
        folder=directory(HELDOUT),
        manifest=HELDOUT_MANIFEST,
    log:
        f"{LOGS}/split_heldout/{{data}}/{{dataset}}.log",
    benchmark:
        f"{BENCHMARKS}/split_heldout/{{data}}/{{dataset}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=60,
    params:
        processed_dir=lambda wildcards: DATA_SPECS[wildcards.data]["processed_dir"],
        heldout_dir=lambda wildcards, output: str(Path(output.folder).parent),
        share=lambda wildcards: DATA_SPECS[wildcards.data]["heldout_share"],
        seed=lambda wildcards: DATA_SPECS[wildcards.data]["heldout_seed"],
        digest=dataset_digest,
    message:
        "Set held-out conversations of {wildcards.dataset} aside"
    shell:
        'python "$SCRIPTS"/split_heldout.py --processed-dir {params.processed_dir:q} --dataset {wildcards.dataset:q}'
        " --output-dir {params.heldout_dir:q} --manifest {output.manifest:q}"
        " --share {params.share} --seed {params.seed} 2>&1 | tee {log:q}"


rule tokenize_dataset:
    input:
        sources=dataset_sources,
        tokenizer=lambda wildcards: TOKENIZER.format(tokenizer=DATA_SPECS[wildcards.data]["tokenizer"]),
    output:
        train=directory(TRAIN_BINS),
        valid=directory(VALID_BINS),
        manifest=DATASET_MANIFEST,
    log:
        f"{LOGS}/tokenize_dataset/{{data}}/{{dataset}}.log",
    benchmark:
        f"{BENCHMARKS}/tokenize_dataset/{{data}}/{{dataset}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=240,
    params:
        processed_dir=lambda wildcards: DATA_SPECS[wildcards.data]["processed_dir"],
        tokenized_dir=lambda wildcards: DATA.format(data=wildcards.data),
        max_tokens=lambda wildcards: DATA_SPECS[wildcards.data]["max_tokens"],
        share=lambda wildcards: DATA_SPECS[wildcards.data]["heldout_share"],
        seed=lambda wildcards: DATA_SPECS[wildcards.data]["heldout_seed"],
        digest=dataset_digest,
    message:
        "Tokenise {wildcards.dataset}"
    shell:
        'python "$SCRIPTS"/tokenize_dataset.py --processed-dir {params.processed_dir:q} --dataset {wildcards.dataset:q}'
        " --tokenized-dir {params.tokenized_dir:q} --tokenizer-path {input.tokenizer:q}"
        " --manifest {output.manifest:q} --max-length {params.max_tokens}"
        " --heldout-share {params.share} --heldout-seed {params.seed} --threads {threads} 2>&1 | tee {log:q}"
