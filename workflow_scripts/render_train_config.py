"""Writes a training config: an mmengine Python config to read, copy, edit and pass to train_model.py."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from common.cli import UserError, run
from common.files import write_bytes, write_text
from ftdp.encode import CONTROL_TOKENS, MASKS


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="config to write")
    add(
        "--from-config",
        type=Path,
        help="check this config and copy it as it is; all other settings are ignored",
    )
    paths = parser.add_argument_group("what to train on")
    add = paths.add_argument
    add("--model-path", help="base model: a folder or a hub name")
    add("--tokenizer-path", help="folder that extend_tokenizer.py wrote")
    add("--plan", help="plan folder that plan_packing.py wrote")
    add(
        "--train-folder",
        help="without --plan: <tokenized-dir>/chatml_llamav13_32k/train, packed as XTuner does",
    )
    add("--data-order", help="without --plan: data_order.txt; without it the folder is walked")
    add("--max-length", type=int, default=32768, help="without --plan: tokens of a packed row")
    add("--num-workers", type=int, default=0, help="processes that load data")
    schedule = parser.add_argument_group("optimizer and schedule")
    add = schedule.add_argument
    add("--lr", type=float, default=4e-5, help="highest learning rate")
    add("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW's betas")
    add("--weight-decay", type=float, default=0.01, help="AdamW's weight decay")
    add("--max-norm", type=float, default=1.0, help="clip the gradient to this L2 norm; 0 does not")
    add("--warmup-ratio", type=float, default=0.025, help="share of the run with rising learning rate")
    add("--min-lr-ratio", type=float, default=0.15, help="the learning rate ends at this share of --lr")
    add("--max-epochs", type=float, default=1, help="passes over the data")
    add("--max-steps", type=int, help="optimizer steps; overrides --max-epochs")
    add("--accumulative-counts", type=int, default=1, help="micro-batches of a rank per optimizer step")
    add(
        "--loss-normalisation",
        choices=["token", "micro_batch"],
        default="token",
        help="mean over the step's trained tokens, or mean of micro-batches' means (XTuner's)",
    )
    add(
        "--global-batch",
        type=int,
        help="rows of an optimizer step over all ranks, however many; in place of --accumulative-counts",
    )
    add(
        "--max-skipped-steps",
        type=int,
        default=3,
        help="steps in a row that may be skipped because their loss or gradient is not finite",
    )
    add("--seed", type=int, default=42, help="seed of everything that is not data order")
    adapting = parser.add_argument_group("LoRA")
    add = adapting.add_argument
    add("--lora-rank", type=int, help="train adapters of this rank; without it all parameters")
    add("--lora-alpha", type=float, help="scale adapters by alpha / rank; without it twice the rank")
    add("--lora-dropout", type=float, default=0.0, help="of the adapters' input")
    add(
        "--lora-target-modules",
        nargs="+",
        default=["auto"],
        help="ends of the names of the layers; auto is all linear layers but the head",
    )
    running = parser.add_argument_group("memory, precision, saving")
    add = running.add_argument
    add("--zero-stage", type=int, choices=[0, 1, 2, 3], default=2, help="DeepSpeed ZeRO stage")
    add(
        "--offload",
        choices=["none", "optimizer", "all"],
        default="none",
        help="what lies in the host's memory: the optimizer, or the weights too (stage 3)",
    )
    add(
        "--zero3-init",
        type=_truth,
        default=False,
        help="with stage 3, load the model in shards (true|false)",
    )
    add("--sequence-parallel", type=int, default=1, help="ranks that share the tokens of each row")
    add("--gradient-checkpointing", type=_truth, default=True, help="recompute activations (true|false)")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of weights and activations",
    )
    add(
        "--cross-entropy",
        choices=["chunked", "liger"],
        default="chunked",
        help="liger: its fused kernel, on GPUs with liger-kernel",
    )
    add("--attention", default="auto", help="auto, sdpa, flash_attention_2, or another name transformers has")
    add(
        "--save-steps",
        type=int,
        default=500,
        help="optimizer steps between checkpoints; 0 saves at the end only",
    )
    add("--save-total-limit", type=int, default=2, help="newest checkpoints to keep; -1 keeps all")
    add(
        "--save-optimizer",
        type=_truth,
        default=True,
        help="false saves weights only, not resumable (true|false)",
    )
    add("--log-interval", type=int, default=1, help="optimizer steps between progress lines")
    add("--loggers", nargs="*", default=[], choices=["wandb", "mlflow"], help="trackers beside TensorBoard")
    add("--peak-tflops", type=float, help="of a device, 16-bit dense; without it by the device's name")
    add(
        "--trust-remote-code",
        type=_truth,
        nargs="?",
        const=True,
        default=False,
        help="run code of the base model",
    )
    looking = parser.add_argument_group("evaluation while training")
    add = looking.add_argument
    add("--eval-steps", type=int, default=0, help="optimizer steps between held-out losses; 0 for none")
    add("--heldout-dir", help="conversations as <dataset>/processed/<any>/<file>.jsonl")
    add("--eval-max-tokens", type=int, default=4096, help="tokens after which a conversation is cut")
    add("--eval-max-samples", type=int, help="conversations per dataset; without it all")
    add("--generate-steps", type=int, default=0, help="optimizer steps between generations; 0 for none")
    add("--prompts", help="JSON list of conversations to answer")
    add("--max-new-tokens", type=int, default=128, help="longest answer, in tokens")
    add("--template", help="chat template, a name or a file; without it the one saved with the tokenizer")
    add("--mask", choices=MASKS, default="compat", help="which tokens the loss is over, as in the data")
    add("--control-tokens", choices=CONTROL_TOKENS, default="literal", help="as the data was tokenised")
    return parser.parse_args()


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _check(arguments: argparse.Namespace) -> None:
    if arguments.plan and (arguments.train_folder or arguments.data_order):
        raise UserError("--plan names the data already", fix="leave --train-folder and --data-order out")
    for name in ("model_path", "tokenizer_path", "plan" if not arguments.train_folder else "train_folder"):
        if not getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} is missing", fix="give it, or --from-config")
    limits = {
        "max_length": 2,
        "lr": 0.0,
        "max_epochs": 0.0,
        "accumulative_counts": 1,
        "sequence_parallel": 1,
        "max_skipped_steps": 0,
        "save_steps": 0,
        "log_interval": 1,
        "num_workers": 0,
        "eval_steps": 0,
        "generate_steps": 0,
        "eval_max_tokens": 8,
        "max_new_tokens": 1,
    }
    optional = dict.fromkeys(("max_steps", "global_batch", "lora_rank", "eval_max_samples"), 1)
    optional |= {"lora_alpha": 0.0, "peak_tflops": 0.0}
    limits |= {name: least for name, least in optional.items() if getattr(arguments, name) is not None}
    for name, least in limits.items():
        value = getattr(arguments, name)
        if value < least or (isinstance(least, float) and value == least):
            expected = f"more than {least}" if isinstance(least, float) else f"{least} or more"
            raise UserError(f"--{name.replace('_', '-')} cannot be used", found=value, expected=expected)
    for name in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(
                f"--{name.replace('_', '-')} cannot be used",
                found=getattr(arguments, name),
                expected="0 to 1",
            )
    for steps, what in (("eval_steps", "heldout_dir"), ("generate_steps", "prompts")):
        if getattr(arguments, steps) and not getattr(arguments, what):
            raise UserError(f"--{steps.replace('_', '-')} needs --{what.replace('_', '-')}", fix="give both")


def _lora(arguments: argparse.Namespace) -> dict | None:
    rank, targets = arguments.lora_rank, arguments.lora_target_modules
    if rank is None:
        return None
    return {
        "rank": rank,
        "alpha": 2 * rank if arguments.lora_alpha is None else arguments.lora_alpha,
        "dropout": arguments.lora_dropout,
        "target_modules": "auto" if targets == ["auto"] else targets,
    }


def main() -> None:
    """Writes the config and reads it back."""
    arguments = parse_arguments()
    from sft.config import load_config
    from sft.render import TrainSettings, render_config

    if arguments.from_config is not None:
        load_config(arguments.from_config)
        write_bytes(arguments.output, arguments.from_config.read_bytes())
        return
    _check(arguments)
    arguments.lora = _lora(arguments)
    settings = TrainSettings(
        **{field.name: getattr(arguments, field.name) for field in fields(TrainSettings)}
    )
    settings.betas, settings.loggers = tuple(settings.betas), tuple(settings.loggers)
    write_text(arguments.output, render_config(settings))
    load_config(arguments.output)


if __name__ == "__main__":
    run(main)
