"""
REQUIRED INPUT  {run}/train.json and the checkpoint that it names
OUTPUT          {run}/hf/: safetensors, tokenizer, generation config, manifest.json
"""


rule convert_pth_to_hf:
    input:
        config=TRAIN_CONFIG,
        manifest=TRAIN_MANIFEST,
    output:
        directory(HF),
    log:
        f"{RUN_LOGS}/convert_pth_to_hf.log",
    benchmark:
        f"{BENCHMARKS}/convert_pth_to_hf/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
    params:
        options=hf_flags,
    message:
        "Convert the checkpoint of run {wildcards.run} to Hugging Face"
    shell:
        'python "$SCRIPTS"/convert_pth_to_hf.py {input.config:q} {input.manifest:q} {output:q} {params.options} 2>&1 | keep_log {log:q}'
