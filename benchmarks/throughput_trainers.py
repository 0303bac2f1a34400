"""The other trainers of train_throughput.py: a bare PyTorch loop, transformers' Trainer and TRL's SFTTrainer.

Each trains all parameters in fp32 with fused AdamW, clips gradients at 1.0 and writes nothing to disk.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from throughput_gate import Gate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow_scripts"))

LR, BETAS, WEIGHT_DECAY = 1e-5, (0.9, 0.95), 0.01


def train_bare(a: argparse.Namespace) -> None:
    """Trains with a hand-written loop: our attention and packed sequences, transformers' own loss."""
    from snaketune.models.base_model import load_base_model
    from snaketune.models.packed_attention import packing_kwargs
    from snaketune.training.packed_data import PackedDataset, packed_collate

    model = load_base_model(a.model, "float32").train()
    rows = PackedDataset(folder=a.folder, packed_length=a.length)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    gate, row = Gate(), 0
    gate.ready()
    while True:
        tokens, total = 0, 0.0
        for _ in range(a.accumulation):
            batch = packed_collate([rows[row % len(rows)]])["data"]
            row += 1
            boundaries = packing_kwargs(batch["cumulative_len"], batch["max_seqlen"])
            loss = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                labels=batch["labels"],
                use_cache=False,
                **boundaries,
            ).loss
            (loss / a.accumulation).backward()
            total += loss.item() / a.accumulation
            tokens += batch["input_ids"].numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.passed(tokens, total)


def _arguments(a: argparse.Namespace) -> dict:
    return {
        "output_dir": str(a.work_dir),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": a.accumulation,
        "max_steps": 100_000,
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _gated(trainer_class):
    """Returns a trainer class that reports each optimizer step. Tokens are counted as they are trained on."""
    from transformers import TrainerCallback

    class Gated(trainer_class):
        seen = 0

        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            self.seen += (
                int(mask.sum()) if mask is not None and mask.dim() == 2 else inputs["input_ids"].numel()
            )
            return super().training_step(model, inputs, *args, **kwargs)

    class Report(TrainerCallback):
        def __init__(self):
            self.gate, self.trainer = Gate(), None

        def on_train_begin(self, args, state, control, **kwargs):
            self.gate.ready()

        def on_step_end(self, args, state, control, **kwargs):
            tokens, self.trainer.seen = self.trainer.seen, 0
            self.gate.passed(tokens)

    return Gated, Report()


def train_transformers(a: argparse.Namespace) -> None:
    """Trains with transformers' Trainer on the same packed sequences; sdpa splits documents by position."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from snaketune.training.packed_data import PackedDataset

    packed = PackedDataset(folder=a.folder, packed_length=a.length)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(packed)

        def __getitem__(self, index):
            row = packed[index]
            return {name: torch.from_numpy(row[name]) for name in ("input_ids", "labels", "position_ids")}

    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    model.config.use_cache = False
    trainer_class, report = _gated(Trainer)
    trainer = trainer_class(
        model=model, args=TrainingArguments(**_arguments(a)), train_dataset=Rows(), callbacks=[report]
    )
    report.trainer = trainer
    trainer.train()


def train_trl(a: argparse.Namespace) -> None:
    """Trains with TRL's SFTTrainer and its own packing of the same documents."""
    import json

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    lines = Path(a.folder, "cn/documents/documents.bin").read_text().splitlines()
    documents = Dataset.from_dict({"input_ids": [json.loads(line)["tokens"] for line in lines]})
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    model.config.use_cache = False
    trainer_class, report = _gated(SFTTrainer)
    trainer = trainer_class(
        model=model,
        args=SFTConfig(**_arguments(a), packing=True, max_length=a.length),
        train_dataset=documents,
        processing_class=AutoTokenizer.from_pretrained(a.model),
        callbacks=[report],
    )
    report.trainer = trainer
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("trainer", choices=["bare", "transformers", "trl"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", required=True, help="train folder with the tokenised documents")
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    a = parser.parse_args()
    torch.manual_seed(0)
    {"bare": train_bare, "transformers": train_transformers, "trl": train_trl}[a.trainer](a)


if __name__ == "__main__":
    main()
