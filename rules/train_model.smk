"""
REQUIRED INPUT  the training config, the extended tokenizer, the tokenised data and their pack plan
OUTPUT          {run}/training.json, written when training starts: the checkpoints that it will pin for evaluation
                {run}/train.json, written last; its checkpoints are in {run}/checkpoints/<identity>/

Checkpoints are not declared: Snakemake deletes declared outputs before every attempt. On a restart, the script resumes
from the newest complete checkpoint of the same identity (model, data, hyperparameters). If the training is finished,
it only writes the manifest.
"""


rule train_model:
    input:
        config=TRAIN_CONFIG,
        tokenizer=path_of(TOKENIZER),
        plan=path_of(PACK_PLAN),
        data=path_of(TOKENIZED),
        watched=watched_inputs,
        preflight=preflight_gate,
        architecture=proofs_of(lambda wildcards: [wildcards.run]),
    output:
        manifest=TRAIN_MANIFEST,
        started=TRAINING,
    log:
        f"{RUN_LOGS}/train_model.log",
    benchmark:
        f"{BENCHMARKS}/train_model/{{run}}.tsv"
    # An attempt resumes where the last one stopped (time limit, preemption); a guard refuses attempts without progress,
    # and what is refused is not tried again (rules/adapt_snakemake.smk).
    # A Slurm job reads this file again and must not retry the rule itself.
    retries: 10 if workflow.is_main_process else 0
    conda:
        "../envs/snaketune.yaml"
    threads: train_threads
    # On Slurm, one job over all nodes, in which the script starts one task per node. The profile sets `launcher`.
    resources:
        mem_mb=train_memory,
        runtime=cluster_of("runtime"),
        lock_wait=cluster_of("lock_wait"),
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
        options=train_flags,
        model_digest=model_digest,
    message:
        "Train run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/train_model.py {input.config:q} --runs-dir {params.runs_dir:q} --manifest {output.manifest:q} --started {output.started:q}'
        " --time-limit {resources.runtime} --lock-wait {resources.lock_wait} {params.options} --launcher {resources.launcher} --nodes {resources.nodes}"
        " --cpus-per-process {resources.cpus_per_task} --gpus-per-node {resources.gpus_per_node}"
        " 2>&1 | keep_log {log:q}"
