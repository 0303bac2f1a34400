"""
REQUIRED INPUT  {run}/hf/ or the base model, the extended tokenizer, held-out conversations
OUTPUT          {run}/evaluation/{label}.json: loss and perplexity per dataset, and generations
"""


rule evaluate_model:
    input:
        model=lambda wildcards: HF.format(run=wildcards.run) if wildcards.label == "tuned" else [],
        tokenizer=path_of(TOKENIZER),
        heldout=heldout_parts,
        parity=parity_gate,
        prompts=lambda wildcards: RUNS[wildcards.run]["evaluate"]["prompts"] or [],
    output:
        report(
            EVALUATION,
            caption="report/evaluation.rst",
            category="Held-out loss",
            labels={"run": "{run}", "model": "{label}"},
        ),
    log:
        f"{RUN_LOGS}/evaluate_model.{{label}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluate_model/{{run}}.{{label}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: workflow.cores or 1
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gres=evaluate_gres,
    params:
        model=lambda wildcards, input: input.get("model") or model_source(wildcards.run),
        heldout_dir=heldout_dir,
        options=evaluate_flags,
        heldout_digest=heldout_digest,
        model_digest=lambda wildcards: model_digest(wildcards) if wildcards.label == "base" else None,
    message:
        "Evaluate the {wildcards.label} model of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/evaluate_model.py --model {params.model:q} --tokenizer-path {input.tokenizer:q}'
        " --heldout-dir {params.heldout_dir:q} --output {output:q} {params.options} 2>&1 | keep_log {log:q}"
