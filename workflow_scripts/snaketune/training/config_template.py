"""Renders a training config as text: complete, commented, and meant to be copied and edited.

The five parts and the names follow XTuner's `mistral_7b_w_tokenized_dataset`, to be familiar to its users.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from string import Template
from typing import Any

from snaketune.settings.command_line import Flag, help_text, script_flags

_WIDTH = 120


def render_config(
    settings: Mapping[str, Any],
    *,
    model_path: str,
    tokenizer_path: str,
    num_workers: int,
    log_interval: int,
    plan: str | None = None,
    train_folder: str | None = None,
    data_order: str | None = None,
    heldout_dir: str | None = None,
) -> str:
    """Returns the text of a training config.

    Args:
        settings: The settings of render_train_config.py, by flag name: `lr`, `lora_rank`, ...
        model_path: Base model: a folder or a hub name.
        tokenizer_path: Folder of the extended tokenizer.
        num_workers: Processes that load data; 0 uses a thread.
        log_interval: Optimizer steps between progress lines.
        plan: Pack plan folder, written by plan_packing.py.
        train_folder: Without a plan: `.../chatml_llamav13_32k/train`, packed the way XTuner does.
        data_order: Without a plan: `data_order.txt`; None walks the folder.
        heldout_dir: Conversations to evaluate on during training.
    """
    lines, values = [], {"lora": _lora(settings)}
    for flag in script_flags("render_train_config"):
        if flag.key.startswith("train.lora."):
            continue
        values[flag.dest] = settings[flag.dest]
        if flag.key not in ("train.config", "train.max_length"):
            lines.append(_setting(flag, values[flag.dest]))
    values |= {"model_path": model_path, "tokenizer_path": tokenizer_path, "plan": plan}
    values |= {"train_folder": train_folder, "data_order": data_order, "heldout_dir": heldout_dir}
    values |= {"num_workers": num_workers, "log_interval": log_interval}
    text = {name: repr(value) for name, value in values.items()}
    blocks = _FROM_FOLDER if plan is None else _FROM_PLAN
    blocks = {name: Template(block).substitute(text) for name, block in blocks.items()}
    return _TEMPLATE.substitute(text, **blocks, settings="\n".join(lines))


def _setting(flag: Flag, value: Any) -> str:
    """Returns an assignment with a comment that describes the setting: after it, or above it if too long."""
    line = f"{flag.dest} = {value!r}"
    meaning = help_text(flag.rule["description"])
    if len(line) + len(meaning) + 4 <= _WIDTH:
        return f"{line}  # {meaning}"
    comment = textwrap.wrap(
        meaning, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    return "\n".join([*comment, line])


def _lora(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    rank, alpha = settings["lora_rank"], settings["lora_alpha"]
    targets = settings["lora_target_modules"]
    if rank is None:
        return None
    lora = {
        "rank": rank,
        "alpha": 2 * rank if alpha is None else alpha,
        "dropout": settings["lora_dropout"],
        "target_modules": "auto" if targets in (None, ["auto"]) else targets,
    }
    experts = settings["lora_experts"]
    return lora if experts is None else {**lora, "experts": experts}


_FROM_PLAN = {
    "data_settings": """\
# Data: the pack plan from plan_packing.py: which slices make each packed sequence, and their order.
plan = $plan""",
    "dataset": "dict(type=PackedDataset, plan=plan)",
}
_FROM_FOLDER = {
    "data_settings": """\
# Data: the train folder from tokenize_dataset.py, and the order of its files. Packing follows XTuner.
dataset_folder = $train_folder
data_order_path = $data_order  # None: walk the folder
max_length = $max_length  # tokens per packed sequence; a micro-batch is one packed sequence""",
    "dataset": """\
dict(
    type=PackedDataset,
    folder=dataset_folder,
    data_order_path=data_order_path,
    packed_length=max_length,
    min_length=0,
    seed=1024,  # shuffles the documents of a file, and the packed sequences; XTuner's seed
)""",
}


_TEMPLATE = Template('''\
"""Training config, written by render_train_config.py.

Copy it, edit it, and train with your copy:
    python workflow_scripts/train_model.py my_config.py --work-dir work_dirs/my_run
or set `train.config` of the workflow to its path.
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

$data_settings
dataloader_num_workers = $num_workers  # 0: a thread reads ahead
batch_size = 1  # packed sequences; must be 1: raise max_length or accumulative_counts instead

# Conversations to evaluate on during training, as <dataset>/processed/<any>/<file>.jsonl, and progress lines.
heldout_dir = $heldout_dir
log_interval = $log_interval  # optimizer steps between progress lines

# LoRA: None trains all parameters; otherwise dict(rank, alpha, dropout, target_modules, experts).
lora = $lora

# The settings in docs/config.md. Settings that are empty there are None here.
$settings

# How conversations become tokens, same as in the training data. template None: use the tokenizer's.
encoding = dict(template=template, mask=mask, control_tokens=control_tokens)

#######################################################################
#                      PART 2  Model & Tokenizer                      #
#######################################################################
model = dict(
    type=SupervisedFinetune,
    # The embedding grows to fit this tokenizer. Rows for new tokens start at the mean of the existing rows.
    tokenizer=tokenizer_path,
    gradient_checkpointing=gradient_checkpointing,
    lora=lora,
    cross_entropy=cross_entropy,
    router_aux_loss=router_aux_loss,
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

# Linear warm-up, then cosine decay; both count optimizer steps.
if max_steps is None:
    warm_up_end, schedule_end = warmup_ratio * max_epochs, max_epochs
    schedule_unit = dict(by_epoch=True, convert_to_iter_based=True)
else:
    warm_up_end, schedule_end = int(warmup_ratio * max_steps), max_steps
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
# DeepSpeed. --deepspeed deepspeed_zeroN on the command line wins. `config=dict(...)` accepts any DeepSpeed setting.
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
