"""
REQUIRED INPUT  {run}/train.json, {run}/hf/ and, where the run has it, {run}/turbomind/
OUTPUT          {run}/parity.json: the gate. Compares the logits of checkpoint, Hugging Face and TurboMind, and the token
                ids of training, transformers 4 and 5 and lmdeploy; proves every TurboMind weight

The tuned model is evaluated only after this gate. An unexplained difference stops the workflow here.
"""


rule encode_prompts:
    input:
        model=TURBOMIND,
        hf=HF,
        prompts=own_prompts,
    output:
        READINGS,
    log:
        f"{RUN_LOGS}/encode_prompts.log",
    benchmark:
        f"{BENCHMARKS}/encode_prompts/{{run}}.tsv"
    conda:
        "../envs/turbomind.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
    params:
        options=lambda wildcards: flags(
            **options_of("encode_prompts", RUNS[wildcards.run], "evaluate", "tokenize", "turbomind", "model")
        ),
    message:
        "Encode the fixed prompts of run {wildcards.run} as serving does"
    shell:
        '"$TURBOMIND_PYTHON" "$SCRIPTS"/encode_prompts.py {input.model:q} --hf {input.hf:q} --output {output:q} {params.options} 2>&1 | keep_log {log:q}'


rule check_parity:
    input:
        config=TRAIN_CONFIG,
        checkpoint=TRAIN_MANIFEST,
        hf=HF,
        turbomind=branch(is_converted, then=TURBOMIND, otherwise=[]),
        readings=branch(is_converted, then=READINGS, otherwise=[]),
        prompts=own_prompts,
    output:
        report(
            PARITY,
            caption="report/parity.rst",
            category="Conversion gates",
            labels={"run": "{run}"},
        ),
    log:
        f"{RUN_LOGS}/check_parity.log",
    benchmark:
        f"{BENCHMARKS}/check_parity/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
    params:
        options=parity_flags,
    message:
        "Check that the conversions of run {wildcards.run} match the checkpoint"
    shell:
        'python "$SCRIPTS"/check_parity.py {input.config:q} {input.checkpoint:q} {input.hf:q} --output {output:q}'
        " {params.options} 2>&1 | keep_log {log:q}"
