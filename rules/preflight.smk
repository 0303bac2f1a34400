"""
REQUIRED INPUT  only the settings
OUTPUT          shared/preflight/report.json and report.txt (undeclared): the result of each check, or its fix
                shared/preflight/passed.json: all checks passed; trainings wait for it with `preflight.required`

Every `snakemake preflight` checks again: its files are temporary.
"""


rule begin_preflight:
    input:
        architecture=proofs_of(lambda wildcards: RUNS),
    output:
        temp(f"{PREFLIGHT}/nonce.json"),
    log:
        f"{LOGS}/begin_preflight.log",
    benchmark:
        f"{BENCHMARKS}/begin_preflight.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
    params:
        folder=lambda wildcards, output: str(Path(output[0]).parent),
        settings=preflight_settings,
    message:
        "Write a shared file for the nodes to read"
    shell:
        'python "$SCRIPTS"/preflight.py begin --folder {params.folder:q} --settings {params.settings:q} 2>&1 | keep_log {log:q}'


rule probe_partition:
    input:
        f"{PREFLIGHT}/nonce.json",
    output:
        temp(directory(f"{PREFLIGHT}/answers")),
    log:
        f"{LOGS}/probe_partition.log",
    benchmark:
        f"{BENCHMARKS}/probe_partition.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 2
    # On Slurm: the shape of the largest training, on at most two nodes.
    resources:
        mem_mb=8000,
        runtime=10,
        launcher="none",
        nodes=probe_shape("nodes"),
        tasks=probe_shape("tasks"),
        tasks_per_node=probe_shape("tasks_per_node"),
        tasks_per_gpu=0,
        cpus_per_task=1,
        gpus_per_node=probe_shape("gpus_per_node"),
        gres=probe_shape("gres"),
        mpi=probe_shape("mpi"),
    params:
        folder=lambda wildcards, input: str(Path(input[0]).parent),
        envs=str(REPO / "envs"),
        settings=preflight_settings,
    message:
        "Check packages, GPUs, network, disk and tokenizers where jobs run"
    shell:
        'python "$SCRIPTS"/preflight.py probe --folder {params.folder:q} --envs {params.envs:q}'
        " --settings {params.settings:q} --launcher {resources.launcher} --nodes {resources.nodes}"
        " --gpus-per-node {resources.gpus_per_node} 2>&1 | keep_log {log:q}"


rule preflight:
    input:
        f"{PREFLIGHT}/nonce.json",
        f"{PREFLIGHT}/answers",
    log:
        f"{LOGS}/preflight.log",
    retries: 0  # a retry would fail again, and nonce.json is used up
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
    params:
        folder=lambda wildcards, input: str(Path(input[0]).parent),
    message:
        "Report the checks"
    shell:
        'python "$SCRIPTS"/preflight.py report --folder {params.folder:q} 2>&1 | keep_log {log:q}'


# The same before a training that requires it: runs once, and again when its settings change.
use rule preflight as pass_preflight with:
    output:
        PREFLIGHT_PASSED,
    log:
        f"{LOGS}/pass_preflight.log",
    params:
        folder=lambda wildcards, input: str(Path(input[0]).parent),
        settings=preflight_settings,
