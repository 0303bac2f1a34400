"""
REQUIRED INPUT  the run's config, train.json, hf/, its evaluations and parity.json
OUTPUT          {run}/model_card.md: hf/README.md with the results of the evaluation and the parity gate
                {run}/serve.txt: the commands that serve the model
"""


rule write_model_card:
    input:
        config=TRAIN_CONFIG,
        train=TRAIN_MANIFEST,
        hf=HF,
        evaluations=lambda wildcards: expand(EVALUATION, run=wildcards.run, label=["base", "tuned"]),
        parity=branch(has_parity, then=PARITY, otherwise=[]),
        turbomind=branch(has_turbomind, then=TURBOMIND, otherwise=[]),
    output:
        card=MODEL_CARD,
        commands=SERVE,
    log:
        f"{RUN_LOGS}/write_model_card.log",
    benchmark:
        f"{BENCHMARKS}/write_model_card/{{run}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        options=model_card_flags,
    message:
        "Write the model card of run {wildcards.run}"
    shell:
        'python "$SCRIPTS"/write_model_card.py {input.config:q} {input.train:q} {input.hf:q} --output {output.card:q}'
        " --commands {output.commands:q} {params.options} 2>&1 | keep_log {log:q}"
