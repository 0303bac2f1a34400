"""Supervised fine-tuning: an mmengine runner over DeepSpeed, on packed rows of whole conversations.

A training config imports its types from here. They are looked up on first use, so reading a config does not import
DeepSpeed (about ten seconds).
"""

from __future__ import annotations

from importlib import import_module

HOMES = {
    "CheckpointHook": "sft.checkpoint_hook",
    "DeepSpeedStrategy": "sft.strategy",
    "GenerateHook": "sft.evaluation_hook",
    "HeldoutLossHook": "sft.evaluation_hook",
    "MetricsHook": "sft.metrics_hook",
    "PackedDataset": "sft.data",
    "PackedSampler": "sft.data",
    "SupervisedFinetune": "sft.finetune",
    "TrainLoop": "sft.runner",
    "load_base_model": "sft.model",
    "packed_collate": "sft.data",
}

__all__ = sorted(HOMES)


def __getattr__(name: str):
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'sft' has no attribute {name!r}")
