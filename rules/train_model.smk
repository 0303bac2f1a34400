"""
REQUIRED INPUT  the training config, the extended tokenizer, the tokenised data and their pack plan
OUTPUT          {run}/train.json, written last; the checkpoints it names lie in {run}/checkpoints/<identity>/, the log
                of every attempt in {run}/checkpoints/logs/

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
    # In a Slurm job, where this file is read again, the rule is not to be retried as well.
    retries: 10 if workflow.is_main_process else 0
    conda:
        "../envs/snaketune.yaml"
    threads: workflow.cores or 1
    # On Slurm one job over all nodes, in which the script starts one task a rank. `launcher` is the profile's to say.
    resources:
        mem_mb=train_memory,
        runtime=cluster_of("runtime"),
        launcher="none",
        nodes=cluster_of("nodes"),
        tasks=train_tasks(per_node=False),
        tasks_per_node=train_tasks(per_node=True),
        tasks_per_gpu=0,
        cpus_per_task=cluster_of("cpus_per_process"),
        gpus_per_node=cluster_of("gpus_per_node"),
        gres=train_gres,
        mpi=train_mpi,
    params:
        runs_dir=path_of(CHECKPOINTS),
        logs=path_of(ATTEMPT_LOGS),
        options=train_flags,
        model_digest=model_digest,
    message:
        "Train run {wildcards.run}"
    shell:
        'mkdir -p {params.logs:q}; attempt={params.logs:q}/"$(date -u +%Y%m%dT%H%M%SZ)-${{SLURM_JOB_ID:-$$}}.log"; '
        'python "$SCRIPTS"/train_model.py {input.config:q} --runs-dir {params.runs_dir:q} --manifest {output:q}'
        " --time-limit {resources.runtime} {params.options} --launcher {resources.launcher} --nodes {resources.nodes}"
        " --cpus-per-process {resources.cpus_per_task} --gpus-per-node {resources.gpus_per_node}"
        " 2>&1 | (trap '' INT TERM USR1; exec tee {log:q} \"$attempt\")"
