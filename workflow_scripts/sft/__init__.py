"""Supervised fine-tuning: an mmengine runner over DeepSpeed, on packed sequences of conversations.

A training config imports its types from here. They are loaded on first use, so reading a config does not
import DeepSpeed (about ten seconds).
"""

from __future__ import annotations

import gc
import os
from importlib import import_module
from pathlib import Path

HOMES = {
    "CheckpointHook": "snaketune.training.checkpoint_hook",
    "DeepSpeedStrategy": "snaketune.training.deepspeed_strategy",
    "GenerateHook": "snaketune.evaluation.training_hooks",
    "HeldoutLossHook": "snaketune.evaluation.training_hooks",
    "MetricsHook": "snaketune.training.metrics_hook",
    "PackedDataset": "snaketune.training.packed_data",
    "PackedSampler": "snaketune.training.packed_data",
    "SupervisedFinetune": "snaketune.training.supervised_finetune",
    "TrainLoop": "snaketune.training.train_loop",
    "load_base_model": "snaketune.models.base_model",
    "packed_collate": "snaketune.training.packed_data",
}

# Imported by the first training step. DeepSpeed checks every optimizer for Muon, whose module compiles code.
_LATE_IMPORTS = ("deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard")

__all__ = sorted(HOMES)


def __getattr__(name: str):
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'sft' has no attribute {name!r}")


def import_for_training(model_path: str | os.PathLike | None = None) -> None:
    """Imports the modules that every rank needs, before the ranks are forked. Keeps forking safe.

    Args:
        model_path: Folder of the base model, whose modeling code is imported too.
    """
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from snaketune.common.files import read_json

    torch.set_num_threads(1)  # a pool of OpenMP threads would not survive the fork
    for name in ("snaketune.training.train_rank", *HOMES.values(), *_LATE_IMPORTS):
        import_module(name)
    config = Path(model_path or "", "config.json")
    model_type = read_json(config).get("model_type") if config.is_file() else None
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])  # transformers imports lazily
    gc.freeze()  # garbage collection in a rank would copy all shared pages
