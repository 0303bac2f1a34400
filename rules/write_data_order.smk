"""
REQUIRED INPUT  tokenized.json: all datasets are tokenised
OUTPUT          data_order.txt: the train .bin files, relative to the train folder, in loading order
"""


rule write_data_order:
    input:
        TOKENIZED,
    output:
        DATA_ORDER,
    log:
        f"{LOGS}/write_data_order/{{data}}.log",
    benchmark:
        f"{BENCHMARKS}/write_data_order/{{data}}.tsv"
    conda:
        "../envs/snaketune.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        train_folder=lambda wildcards: TRAIN_FOLDER.format(data=wildcards.data),
        save_folder=lambda wildcards, output: str(Path(output[0]).parent),
    message:
        "Write the order of the training files"
    shell:
        'python "$SCRIPTS"/write_data_order.py --data-folder {params.train_folder:q} --save-folder {params.save_folder:q}'
        " --file-type .bin 2>&1 | keep_log {log:q}"
