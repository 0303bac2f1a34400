# SnakeTune: turns folders of chat data into a fine-tuned, converted and evaluated model.
#
#   snakemake                          run everything in config.yaml
#   snakemake --configfile my.yaml     run your own config instead of config.yaml
#   snakemake preflight                check the machine or the partition first; takes a minute
#   snakemake train | hf | evaluate    stop after a stage, for every run (all stage targets are below)
#   snakemake compare                  compare all runs side by side
#   snakemake results/demo/hf          make one file or folder and everything it needs
#
# Stages and their order: docs/workflow.md. All paths: rules/common.smk.

from snakemake.utils import min_version

min_version("9.27")

if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/functions/shared.smk"
include: "rules/functions/data.smk"
include: "rules/functions/train.smk"
include: "rules/functions/convert.smk"
include: "rules/functions/evaluate.smk"
include: "rules/preflight.smk"
include: "rules/prove_architecture.smk"
include: "rules/extend_tokenizer.smk"
include: "rules/tokenize_dataset.smk"
include: "rules/write_data_order.smk"
include: "rules/plan_packing.smk"
include: "rules/plan_run.smk"
include: "rules/render_train_config.smk"
include: "rules/train_model.smk"
include: "rules/convert_pth_to_hf.smk"
include: "rules/convert_hf_to_turbomind.smk"
include: "rules/link_serving_folder.smk"
include: "rules/check_parity.smk"
include: "rules/evaluate_model.smk"
include: "rules/evaluate_tool_calls.smk"
include: "rules/follow_checkpoints.smk"
include: "rules/keep_back_jobs.smk"
include: "rules/evaluate_opencompass.smk"
include: "rules/write_model_card.smk"
include: "rules/render_report.smk"
include: "rules/compare_runs.smk"
include: "rules/adapt_snakemake.smk"


# Stage targets, and rules that take seconds. On a cluster they run on Snakemake's host.
localrules:
    all,
    begin_preflight,
    preflight,
    pass_preflight,
    tokenize,
    plan,
    train,
    hf,
    turbomind,
    parity,
    evaluate,
    serve,
    report,
    compare,
    prove_architecture,
    extend_tokenizer,
    write_data_order,
    render_train_config,
    render_eval_config,
    list_checkpoints,
    choose_checkpoint,
    write_run_config,
    render_report,
    compare_runs,


rule all:
    default_target: True
    input:
        expand(REPORT, run=RUNS),
        [TURBOMIND.format(run=run) for run in RUNS if RUNS[run]["turbomind"]["enabled"]],


rule tokenize:
    input:
        expand(TOKENIZED, data=DATA_SPECS),


rule plan:
    input:
        expand(RUN_PLAN, run=RUNS),


rule train:
    input:
        expand(TRAIN_MANIFEST, run=RUNS),


rule hf:
    input:
        expand(HF, run=RUNS),


rule turbomind:
    input:
        expand(TURBOMIND, run=RUNS),


rule parity:
    input:
        expand(PARITY, run=RUNS),


rule evaluate:
    input:
        expand(EVALUATION, run=RUNS, label=["base", "tuned"]),
        expand(
            TOOL_CALLS,
            run=[run for run in RUNS if RUNS[run]["tool_calls"]["enabled"]],
            label=["base", "tuned"],
        ),
        expand(OPENCOMPASS, run=[run for run in RUNS if RUNS[run]["opencompass"]["enabled"]]),
        expand(
            CHECKPOINT_CURVE,
            run=[run for run in RUNS if RUNS[run]["evaluate"]["checkpoints"] != "none"],
        ),


rule serve:
    input:
        expand(SERVE, run=RUNS),


rule report:
    input:
        expand(REPORT, run=RUNS),


rule compare:
    input:
        compared_page,


atexit.register(print_plan)
