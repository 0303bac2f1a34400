"""Writes a training config as text: complete, commented, for people to copy and edit.

The five parts and the names follow XTuner's `mistral_7b_w_tokenized_dataset`, so that a config of old reads the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template


@dataclass
class TrainSettings:
    """The settings of PART 1 of a training config; defaults are XTuner's for Mistral-7B.

    Attributes:
        model_path: Base model, a folder or a hub name.
        tokenizer_path: Folder of the extended tokenizer.
        train_folder: `.../chatml_llamav13_32k/train`, to train without a plan, on rows as XTuner makes them.
        data_order: Without a plan: `data_order.txt`; None walks the folder.
        max_length: Without a plan: tokens of a packed row.
        plan: A plan folder of plan_packing.py.
        max_steps: Optimizer steps; None trains `max_epochs`.
        save_steps: Optimizer steps between checkpoints; 0 saves at the end only.
        max_norm: Greatest gradient norm; 0 does not clip.
        global_batch: Rows of an optimizer step over all ranks, in place of `accumulative_counts` a rank.
        max_skipped_steps: Steps in a row that may be skipped because their loss or gradient is not finite.
        lora: `rank`, `alpha`, `dropout`, `target_modules`; None trains all parameters.
        eval_steps: Optimizer steps between held-out losses; 0 for none.
        generate_steps: Optimizer steps between answers to the prompts; 0 for none.
        template: Chat template of what is evaluated; None for the one saved with the tokenizer.
        mask: As the data was tokenised; `control_tokens` likewise.
        peak_tflops: Of a device, for the utilisation; None looks it up by the device's name.
    """

    model_path: str
    tokenizer_path: str
    train_folder: str | None = None
    data_order: str | None = None
    max_length: int = 32768
    plan: str | None = None
    lr: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    max_norm: float = 1.0
    warmup_ratio: float = 0.025
    min_lr_ratio: float = 0.15
    max_epochs: float = 1
    max_steps: int | None = None
    accumulative_counts: int = 1
    global_batch: int | None = None
    max_skipped_steps: int = 3
    loss_normalisation: str = "token"
    zero_stage: int = 2
    offload: str = "none"
    zero3_init: bool = False
    sequence_parallel: int = 1
    save_steps: int = 500
    save_total_limit: int = 2
    save_optimizer: bool = True
    gradient_checkpointing: bool = True
    cross_entropy: str = "chunked"
    dtype: str = "auto"
    attention: str = "auto"
    seed: int = 42
    log_interval: int = 1
    num_workers: int = 0
    trust_remote_code: bool = False
    lora: dict | None = None
    eval_steps: int = 0
    heldout_dir: str | None = None
    eval_max_tokens: int = 4096
    eval_max_samples: int | None = None
    generate_steps: int = 0
    prompts: str | None = None
    max_new_tokens: int = 128
    template: str | None = None
    mask: str = "compat"
    control_tokens: str = "literal"
    loggers: tuple[str, ...] = ()
    peak_tflops: float | None = None


def render_config(settings: TrainSettings) -> str:
    """Returns the text of a training config."""
    values = {name: repr(value) for name, value in vars(settings).items()}
    blocks = _FROM_FOLDER if settings.plan is None else _FROM_PLAN
    return _TEMPLATE.substitute(
        values, **{name: Template(text).substitute(values) for name, text in blocks.items()}
    )


_FROM_PLAN = {
    "data_settings": """\
# Data: the plan that plan_packing.py made: which documents make which row, and the order of the rows.
plan = $plan""",
    "dataset": "dict(type=PackedDataset, plan=plan)",
}
_FROM_FOLDER = {
    "data_settings": """\
# Data: the train folder that tokenize_dataset.py filled, and the order of its files. Rows are packed as XTuner does.
dataset_folder = $train_folder
data_order_path = $data_order  # None: walk the folder
max_length = $max_length  # tokens of a packed row; a micro-batch is one row""",
    "dataset": """\
dict(
    type=PackedDataset,
    folder=dataset_folder,
    data_order_path=data_order_path,
    packed_length=max_length,
    min_length=0,
    seed=1024,  # of the order within a file, and of the order of rows; XTuner's
)""",
}


_TEMPLATE = Template('''\
"""Training config, written by render_train_config.py.

Copy it, edit it, and train with it:
    python workflow_scripts/train_model.py my_config.py --work-dir work_dirs/my_run
or give its path to the workflow as `train.config`.
"""

from mmengine.hooks import ParamSchedulerHook
from mmengine.optim import CosineAnnealingLR, LinearLR
from sft import (
    CheckpointHook,
    DeepSpeedStrategy,
    GenerateHook,
    HeldoutLossHook,
    MetricsHook,
    PackedDataset,
    PackedSampler,
    SupervisedFinetune,
    TrainLoop,
    load_base_model,
    packed_collate,
)
from torch.optim import AdamW
from torch.utils.data import BatchSampler

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model: a folder or a hub name, and the tokenizer that extend_tokenizer.py wrote for it.
pretrained_model_name_or_path = $model_path
tokenizer_path = $tokenizer_path
trust_remote_code = $trust_remote_code  # run Python code that comes with the model
dtype = $dtype  # auto: bfloat16 on a GPU, float32 on a CPU
attention = $attention  # auto: flash_attention_2 on a GPU that has it, else sdpa one document at a time
gradient_checkpointing = $gradient_checkpointing  # recompute activations: less memory, about a third more time
cross_entropy = $cross_entropy  # chunked: logits of a few hundred tokens at a time; liger: its kernel, GPU only
lora = $lora  # None: train all parameters; else dict(rank, alpha, dropout, target_modules)

$data_settings
dataloader_num_workers = $num_workers  # 0: a thread reads ahead

# Scheduler & optimizer
batch_size = 1  # rows; stays 1: plan longer rows, or raise accumulative_counts
accumulative_counts = $accumulative_counts  # micro-batches of a rank per optimizer step
global_batch = $global_batch  # rows of an optimizer step over all ranks, however many; None: accumulative_counts a rank
max_epochs = $max_epochs
max_steps = $max_steps  # optimizer steps; None: as many as max_epochs takes
lr = $lr
betas = $betas
weight_decay = $weight_decay
max_norm = $max_norm  # gradient clipping; 0: none
warm_up_ratio = $warmup_ratio  # share of the run in which lr rises from lr / 40
min_lr_ratio = $min_lr_ratio  # lr falls to this share of lr
max_skipped_steps = $max_skipped_steps  # in a row, for a loss or gradient that is not finite; one more ends the run
# token: mean over the trained tokens of the whole step. micro_batch: mean of micro-batches' means, as XTuner.
loss_normalisation = $loss_normalisation
seed = $seed

# Memory: 0 keeps everything on every rank, 1 shards the optimizer, 2 the gradients too, 3 the weights too.
zero_stage = $zero_stage
offload = $offload  # to the host's memory: none, optimizer, or all (the weights too; stage 3)
zero3_init = $zero3_init  # stage 3: load the model in shards, for one too large for a host once a rank
sequence_parallel = $sequence_parallel  # ranks that share the tokens of each row; divides the ranks and the heads

# Save
save_steps = $save_steps  # optimizer steps between checkpoints; 0: at the end only
save_total_limit = $save_total_limit  # newest checkpoints to keep; -1: all
save_optimizer = $save_optimizer  # False: weights only, and the run cannot be resumed
log_interval = $log_interval  # optimizer steps between progress lines
loggers = $loggers  # "wandb", "mlflow": installed by you; TensorBoard is always written
peak_tflops = $peak_tflops  # of a device, for the utilisation; None: by the device's name

# Evaluation while training: optimizer steps between two; 0: none
eval_steps = $eval_steps
heldout_dir = $heldout_dir  # <dataset>/processed/<any>/<file>.jsonl
eval_max_tokens = $eval_max_tokens  # a longer conversation is cut here
eval_max_samples = $eval_max_samples  # of each dataset; None: all
generate_steps = $generate_steps
prompts = $prompts  # JSON list of conversations to answer
max_new_tokens = $max_new_tokens
# How conversations become tokens, as in the training data; template None: the one saved with the tokenizer.
encoding = dict(template=$template, mask=$mask, control_tokens=$control_tokens)

#######################################################################
#                      PART 2  Model & Tokenizer                      #
#######################################################################
model = dict(
    type=SupervisedFinetune,
    # The embedding grows to this tokenizer; rows of its new tokens start at the mean of the old rows.
    tokenizer=tokenizer_path,
    gradient_checkpointing=gradient_checkpointing,
    lora=lora,
    cross_entropy=cross_entropy,
    llm=dict(
        type=load_base_model,
        model_path=pretrained_model_name_or_path,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
    ),
)

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
train_dataset = $dataset

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    dataset=train_dataset,
    sampler=dict(type=PackedSampler),
    batch_sampler=dict(type=BatchSampler, drop_last=True, batch_size=batch_size),
    collate_fn=dict(type=packed_collate),
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm),
    accumulative_counts=accumulative_counts,
    global_batch=global_batch,
)

# Linear warm-up, then cosine; both count optimizer steps.
if max_steps is None:
    warm_up_end, schedule_end = warm_up_ratio * max_epochs, max_epochs
    schedule_unit = dict(by_epoch=True, convert_to_iter_based=True)
else:
    warm_up_end, schedule_end = int(warm_up_ratio * max_steps), max_steps
    schedule_unit = dict(by_epoch=False)

param_scheduler = [
    dict(type=LinearLR, start_factor=1 / 40, begin=0, end=warm_up_end, **schedule_unit),
    dict(type=CosineAnnealingLR, eta_min=lr * min_lr_ratio, begin=warm_up_end, end=schedule_end, **schedule_unit),
]

train_cfg = dict(
    type=TrainLoop,
    max_epochs=max_epochs,
    max_steps=max_steps,
    loss_normalisation=loss_normalisation,
    max_skipped_steps=max_skipped_steps,
)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
# DeepSpeed; --deepspeed deepspeed_zeroN on the command line wins. `config=dict(...)` takes any DeepSpeed setting.
strategy = dict(
    type=DeepSpeedStrategy,
    zero_stage=zero_stage,
    offload=offload,
    zero3_init=zero3_init,
    sequence_parallel=sequence_parallel,
)

default_hooks = dict(
    # metrics.jsonl, TensorBoard and the progress line
    metrics=dict(type=MetricsHook, interval=log_interval, loggers=loggers, peak_tflops=peak_tflops),
    param_scheduler=dict(type=ParamSchedulerHook),
    # evals.jsonl and generations.jsonl
    heldout=dict(
        type=HeldoutLossHook,
        interval=eval_steps,
        folder=heldout_dir,
        tokenizer=tokenizer_path,
        max_length=eval_max_tokens,
        max_samples=eval_max_samples,
        **encoding,
    ),
    generate=dict(
        type=GenerateHook,
        interval=generate_steps,
        prompts=prompts,
        tokenizer=tokenizer_path,
        max_new_tokens=max_new_tokens,
        **encoding,
    ),
    checkpoint=dict(
        type=CheckpointHook,
        interval=save_steps,
        save_optimizer=save_optimizer,
        max_keep_ckpts=save_total_limit,
    ),
)

custom_hooks = []

randomness = dict(seed=seed, deterministic=False)
''')
