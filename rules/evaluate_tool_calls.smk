"""
REQUIRED INPUT  {run}/hf/ or the base model, the extended tokenizer, held-out conversations
OUTPUT          {run}/evaluation/tool_calls.{label}.json: answers where the reference does or does not call a tool, with
                verdicts; the loss by role and on plain text
"""


rule evaluate_tool_calls:
    input:
        model=lambda wildcards: HF.format(run=wildcards.run) if wildcards.label == "tuned" else [],
        tokenizer=path_of(TOKENIZER),
        heldout=heldout_parts,
        parity=parity_gate,
        plain_text=lambda wildcards: RUNS[wildcards.run]["tool_calls"]["plain_text"] or [],
    output:
        report(
            TOOL_CALLS,
            caption="report/tool_calls.rst",
            category="Tool calls",
            labels={"run": "{run}", "model": "{label}"},
        ),
    log:
        f"{RUN_LOGS}/evaluate_tool_calls.{{label}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluate_tool_calls/{{run}}.{{label}}.tsv"
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
        options=tool_call_flags,
        heldout_digest=heldout_digest,
        model_digest=lambda wildcards: model_digest(wildcards) if wildcards.label == "base" else None,
    message:
        "Evaluate the tool calls of the {wildcards.label} model of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/evaluate_tool_calls.py --model {params.model:q} --tokenizer-path {input.tokenizer:q}'
        " --heldout-dir {params.heldout_dir:q} --output {output:q} {params.options} 2>&1 | keep_log {log:q}"
