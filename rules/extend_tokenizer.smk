"""
REQUIRED INPUT  the base tokenizer: a folder with tokenizer.json or tokenizer.model, or a hub name
OUTPUT          shared/tokenizer/{tokenizer}/: tokenizer.json with the chat template's tokens, manifest.json
"""


rule extend_tokenizer:
    output:
        directory(TOKENIZER),
    log:
        f"{LOGS}/extend_tokenizer/{{tokenizer}}.log",
    benchmark:
        f"{BENCHMARKS}/extend_tokenizer/{{tokenizer}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=30,
    params:
        base=lambda wildcards: TOKENIZERS[wildcards.tokenizer]["source"],
        options=lambda wildcards: flags(
            trust_remote_code=TOKENIZERS[wildcards.tokenizer]["trust_remote_code"],
            template=TOKENIZERS[wildcards.tokenizer]["template"],
        ),
        digest=base_tokenizer_digest,
    message:
        "Add the chat template's tokens to the tokenizer {params.base}"
    shell:
        'python "$SCRIPTS"/extend_tokenizer.py --tokenizer-path {params.base:q} {params.options}'
        " --tokenizer-w-special-tokens-save-dir {output:q} 2>&1 | keep_log {log:q}"
