"""
REQUIRED INPUT  a running or finished training, with `evaluate.checkpoints`
OUTPUT          {run}/saved_checkpoints.json: the checkpoints to evaluate, once the training has started
                {run}/checkpoint_hf/{identity}/iter_{step}/: a checkpoint as a Hugging Face folder
                {run}/evaluation/checkpoints/{identity}/...: its evaluations
                {run}/evaluation/checkpoints.json: all of them, and the best; {run}/best: a link to its folder

The training is not an input of these jobs: they run beside it. `list_checkpoints` and `convert_checkpoint` are kept back
until the training has written the files that they read (rules/keep_back_jobs.smk). {identity} names the training's run
folder, so each training has its own files and no evaluation is repeated. A pinned checkpoint is exempt from
`save_total_limit` until it is converted; its evaluation removes it.
"""


# Has the training's inputs, so a new training lists its checkpoints again.
checkpoint list_checkpoints:
    input:
        config=TRAIN_CONFIG,
        tokenizer=path_of(TOKENIZER),
        plan=path_of(PACK_PLAN),
        data=path_of(TOKENIZED),
        watched=watched_inputs,
        preflight=preflight_gate,
    output:
        SAVED_CHECKPOINTS,
    log:
        f"{RUN_LOGS}/list_checkpoints.log",
    benchmark:
        f"{BENCHMARKS}/list_checkpoints/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
    params:
        started=path_of(TRAINING),
        every=hold_every,
        model_digest=model_digest,
    message:
        "List the checkpoints of run {wildcards.run} to evaluate"
    shell:
        'python "$SCRIPTS"/list_checkpoints.py {params.started:q} --output {output:q} 2>&1 | keep_log {log:q}'


rule convert_checkpoint:
    input:
        ancient(SAVED_CHECKPOINTS),
    output:
        directory(CHECKPOINT_HF),
    log:
        f"{RUN_LOGS}/convert_checkpoint.{{identity}}.{{step}}.log",
    benchmark:
        f"{BENCHMARKS}/convert_checkpoint/{{run}}.{{identity}}.{{step}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
    params:
        held=PINNED,
        options=hf_flags,
    message:
        "Convert step {wildcards.step} of run {wildcards.run} to Hugging Face"
    shell:
        'python "$SCRIPTS"/convert_pth_to_hf.py {params.held:q}/train_config.py {params.held:q}/iter_{wildcards.step}.pth'
        " {output:q} {params.options} 2>&1 | keep_log {log:q}"


rule evaluate_checkpoint:
    input:
        model=CHECKPOINT_HF,
        tokenizer=path_of(TOKENIZER),
        heldout=heldout_parts,
    output:
        CHECKPOINT_EVALUATION,
    log:
        f"{RUN_LOGS}/evaluate_checkpoint.{{identity}}.{{step}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluate_checkpoint/{{run}}.{{identity}}.{{step}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: CHECKPOINT_THREADS
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gres=evaluate_gres,
    params:
        script="evaluate_model.py",
        held=f"{PINNED}/iter_{{step}}.pth",
        heldout_dir=heldout_dir,
        options=evaluate_flags,
        heldout_digest=heldout_digest,
    message:
        "Evaluate step {wildcards.step} of run {wildcards.run}"
    shell:
        "rm -rf -- {params.held:q};"
        ' python "$SCRIPTS"/{params.script} --model {input.model:q} --tokenizer-path {input.tokenizer:q}'
        " --heldout-dir {params.heldout_dir:q} --output {output:q} {params.options} 2>&1 | keep_log {log:q}"


use rule evaluate_checkpoint as evaluate_checkpoint_tool_calls with:
    input:
        model=CHECKPOINT_HF,
        tokenizer=path_of(TOKENIZER),
        heldout=heldout_parts,
        plain_text=lambda wildcards: RUNS[wildcards.run]["tool_calls"]["plain_text"] or [],
    output:
        CHECKPOINT_TOOL_CALLS,
    log:
        f"{RUN_LOGS}/evaluate_checkpoint_tool_calls.{{identity}}.{{step}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluate_checkpoint_tool_calls/{{run}}.{{identity}}.{{step}}.tsv"
    params:
        script="evaluate_tool_calls.py",
        held=f"{PINNED}/iter_{{step}}.pth",
        heldout_dir=heldout_dir,
        options=tool_call_flags,
        heldout_digest=heldout_digest,
    message:
        "Evaluate the tool calls of step {wildcards.step} of run {wildcards.run}"


rule choose_checkpoint:
    input:
        train=TRAIN_MANIFEST,
        hf=HF,
        base=followed_evaluations("base"),
        tuned=followed_evaluations("tuned"),
        evaluations=checkpoint_evaluations,
    output:
        figures=CHECKPOINT_CURVE,
        best=directory(BEST),
    log:
        f"{RUN_LOGS}/choose_checkpoint.log",
    benchmark:
        f"{BENCHMARKS}/choose_checkpoint/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        options=choose_flags,
    message:
        "Choose the best checkpoint of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/choose_checkpoint.py --train-manifest {input.train:q} --tuned-model {input.hf:q} --base {input.base:q}'
        " --tuned {input.tuned:q} --evaluations {input.evaluations:q} --output {output.figures:q} --best {output.best:q}"
        " {params.options} 2>&1 | keep_log {log:q}"
