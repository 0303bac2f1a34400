"""
REQUIRED INPUT  {run}/hf/ or the base model, the extended tokenizer, held-out conversations
OUTPUT          {run}/evaluation/{label}.json: loss and perplexity by dataset, and generations
"""


def heldout_manifests(wildcards):
    """The manifests of what was set aside; nothing when the run has a held-out folder of its own."""
    data = data_key(wildcards.run)
    if wildcards.run in OWN_HELDOUT:
        return []
    return expand(HELDOUT_MANIFEST, data=data, dataset=DATASETS[data])


def heldout_dir(wildcards):
    return RUNS[wildcards.run]["heldout"]["processed_dir"] or path_of(f"{DATA}/heldout")(wildcards)


def heldout_digest(wildcards):
    """Content of a held-out folder of the user's own; what was set aside is tracked by its manifests."""
    own = OWN_HELDOUT.get(wildcards.run)
    return own and FINGERPRINTS.files(
        [path for paths in own.values() for path in paths], heldout_dir(wildcards)
    )


def evaluate_flags(wildcards):
    settings = RUNS[wildcards.run]["evaluate"]
    return flags(
        label=wildcards.label,
        base_model=wildcards.label == "base",
        prompts=settings["prompts"],
        max_length=settings["max_tokens"],
        max_samples=settings["max_samples"],
        max_new_tokens=settings["max_new_tokens"],
        trust_remote_code=RUNS[wildcards.run]["model"]["trust_remote_code"],
    )


rule evaluate_model:
    input:
        model=lambda wildcards: HF.format(run=wildcards.run) if wildcards.label == "tuned" else [],
        tokenizer=path_of(TOKENIZER),
        heldout=heldout_manifests,
        prompts=lambda wildcards: RUNS[wildcards.run]["evaluate"]["prompts"] or [],
    output:
        EVALUATION,
    log:
        f"{LOGS}/evaluate_model/{{run}}.{{label}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluate_model/{{run}}.{{label}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: workflow.cores or 1
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
    params:
        script=script("evaluate_model.py"),
        model=lambda wildcards, input: input.get("model") or model_source(wildcards.run),
        heldout_dir=heldout_dir,
        options=evaluate_flags,
        heldout_digest=heldout_digest,
        model_digest=lambda wildcards: model_digest(wildcards) if wildcards.label == "base" else None,
    message:
        "Evaluate the {wildcards.label} model of run {wildcards.run}"
    shell:
        "{params.script} --model {params.model:q} --tokenizer-path {input.tokenizer:q}"
        " --heldout-dir {params.heldout_dir:q} --output {output:q} {params.options} 2>&1 | tee {log:q}"
