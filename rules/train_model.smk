"""
REQUIRED INPUT  the training config, the extended tokenizer, the tokenised data and their pack plan
OUTPUT          {run}/train.json, written last; the checkpoints it names lie in {run}/checkpoints/<identity>/

Checkpoints are not declared: Snakemake deletes declared outputs before every attempt. Started again, the script
goes on from the newest whole checkpoint of the same identity (model, data, hyperparameters), or finds that the
training is done and only writes the manifest.
"""


rule train_model:
    input:
        config=TRAIN_CONFIG,
        tokenizer=path_of(TOKENIZER),
        plan=path_of(PACK_PLAN),
        data=path_of(TOKENIZED),
        watched=watched_inputs,
    output:
        TRAIN_MANIFEST,
    log:
        f"{LOGS}/train_model/{{run}}.log",
    benchmark:
        f"{BENCHMARKS}/train_model/{{run}}.tsv"
    # Attempts go on where the last one stopped, at its time limit or preempted; a guard refuses those without progress.
    retries: 10
    conda:
        "../envs/snaketune.yaml"
    threads: workflow.cores or 1
    resources:
        mem_mb=lambda wildcards, attempt: 12000 * min(attempt, 3),
        runtime=1440,
    params:
        runs_dir=path_of(CHECKPOINTS),
        options=train_flags,
        model_digest=model_digest,
    message:
        "Train run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/train_model.py {input.config:q} --runs-dir {params.runs_dir:q} --manifest {output:q}'
        " --time-limit {resources.runtime} {params.options} 2>&1 | (trap '' INT TERM USR1; exec tee {log:q})"
