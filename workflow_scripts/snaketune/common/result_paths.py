"""The names of result files and folders, each defined once.

`rules/common.smk` builds Snakemake's patterns from them and explains each one; `RunFiles` finds and reads a
run's files by them. Words in braces are Snakemake wildcards: fill them in with `str.format`.
"""

# Below the results folder.
SHARED = "shared"
MODELS = f"{SHARED}/models"
ARCHITECTURE = f"{MODELS}/{{model}}/architecture.json"
TOKENIZER = f"{SHARED}/tokenizer/{{tokenizer}}"
DATA = f"{SHARED}/data/{{data}}"
TOKENIZED = f"{DATA}/tokenized.json"
PACK_PLAN = f"{DATA}/packs/{{pack}}/plan.json"
COMPARE_PAGE = "compare/report.html"
COMPARE_FIGURES = "compare/comparison.json"

# Below a run's folder, <results>/<run>.
CONFIG = "config.json"
TRAIN_CONFIG = "train_config.py"  # also in a run folder
CHECKPOINTS = "checkpoints"
RUN_FOLDER = f"{CHECKPOINTS}/{{identity}}"
PINNED = "held"
PINNED_RECORD = f"{RUN_FOLDER}/{PINNED}/iter_{{step}}.json"
TRAINING = "training.json"
TRAIN = "train.json"
RUN_PLAN = "run_plan.json"
HF = "hf"
TURBOMIND = "turbomind"
MANIFEST = "manifest.json"  # in the folder of a model or a tokenizer
READINGS = "prompt_readings.json"
PARITY = "parity.json"
EVALUATIONS = "evaluation"
EVALUATION = f"{EVALUATIONS}/{{label}}.json"
TOOL_CALLS = f"{EVALUATIONS}/tool_calls.{{label}}.json"
OPENCOMPASS = f"{EVALUATIONS}/opencompass.json"
SAVED_CHECKPOINTS = "saved_checkpoints.json"
CHECKPOINT_MODELS = "checkpoint_hf"
CHECKPOINT_HF = f"{CHECKPOINT_MODELS}/{{identity}}/iter_{{step}}"
CHECKPOINT_EVALUATION = f"{EVALUATIONS}/checkpoints/{{identity}}/iter_{{step}}.json"
CHECKPOINT_TOOL_CALLS = f"{EVALUATIONS}/checkpoints/{{identity}}/tool_calls.iter_{{step}}.json"
CHECKPOINT_CURVE = f"{EVALUATIONS}/checkpoints.json"
BEST = "best"
EVAL_CONFIG = "opencompass_config.py"
OPENCOMPASS_WORK = "opencompass"
MODEL_CARD = "model_card.md"
SERVE = "serve.txt"
REPORT = "report.html"
LOGS = "logs"
REFUSED = f"{LOGS}/train_model.refused"  # while it exists, another attempt at training would be refused too

# In a run folder, which training writes and resumes.
IDENTITY = "identity.json"
METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
GENERATIONS = "generations.jsonl"
ATTEMPTS = "attempts.json"
FINISHED = "finished.json"
MARKER = "COMPLETE.json"  # in a checkpoint, written last
