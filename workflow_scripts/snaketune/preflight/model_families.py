"""Runs the proof over every causal language model that transformers has, for docs/models.md."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.progress import Progress

_LONGEST = 32768
_LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
_SECONDS = 600  # for one family
# Settings of published models without which a family's default config cannot be run.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16},
    "lfm2_moe": {
        "layer_types": [*["conv"] * 2, "full_attention", *["conv"] * 3, "full_attention", *["conv"] * 17]
    },
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}


@dataclass(frozen=True)
class Family:
    """How a family trains.

    Attributes:
        name: `model_type` in config.json.
        architecture: Name of the model's class.
        attention: The attention that trains it correctly.
        packing: `best_fit`, or `single` if only a document alone is right; None if nothing is.
        reason: Why packed training is refused, or None.
        lora: True if LoRA trains and merges.
        turbomind: True if TurboMind's converter and our proof cover it, by its default config.
        direct: The lmdeploy engine that serves the folder directly, or None.
    """

    name: str
    architecture: str
    attention: str | None
    packing: str | None
    reason: str | None
    lora: bool
    turbomind: bool
    direct: str | None


def describe_families(names: Sequence[str] | None = None, processes: int = 2) -> list[Family]:
    """Returns a description of each family, in processes that each look at one.

    Args:
        names: Model types; None for all.
        processes: Processes side by side.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    progress = Progress("families", len(names))
    found = []
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        for family in pool.imap(describe_family, names):
            found.append(family)
            progress.add(family.name, families=1)
    return found


def describe_family(name: str) -> Family:
    """Returns the description of one family, by its default config or a published one."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from snaketune.preflight.architecture_proof import TrainingOptions, prove

    torch.set_num_threads(1)
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    architecture = classes if isinstance(classes, str) else classes[0]
    attention = packing = reason = None
    lora = False
    options = TrainingOptions("auto", "best_fit", _LONGEST, True, trust_remote_code=False)
    changes = [{}, {"attention": "eager"}, {"packing": "single"}, {"attention": "eager", "packing": "single"}]
    try:
        config = CONFIG_MAPPING[name](**_PUBLISHED.get(name, {}))
    except Exception as error:  # whatever the family's own code raises
        return Family(name, architecture, None, None, _first_line(error), False, False, None)
    for change in changes:
        tried = dataclasses.replace(options, **change)
        try:
            attention = prove(config, tried)["attention"]
        except UserError as error:
            reason = reason or _reason(error)
            continue
        packing = tried.packing
        try:
            prove(config, dataclasses.replace(tried, lora=_LORA))
            lora = True
        except UserError:
            pass
        break
    values = {**config.to_dict(), "architectures": [architecture]}
    return Family(
        name,
        architecture,
        attention,
        packing,
        reason,
        lora,
        _fits(values, "convert"),
        _engine(architecture) if _fits(values, "direct") else None,
    )


def _reason(error: UserError) -> str:
    """Returns what an error found, or what went wrong where that says more."""
    lines = str(error).splitlines()
    if "not a causal" in lines[0]:
        return "tokens see later tokens"
    found = lines[1].removeprefix("  found:    ")
    return found.split(": logits differ")[0] if ": logits differ" in found else found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _fits(config: dict[str, Any], mode: str) -> bool:
    from snaketune.export.turbomind_limits import check_limits

    try:
        check_limits(config, {"mode": mode, "tp": 1, "session_len": None}, "", proved=True)
    except (UserError, KeyError):
        return False
    return True


def _engine(architecture: str) -> str:
    from snaketune.serving.lmdeploy_engines import TURBOMIND_ARCHITECTURES

    return "TurboMind" if architecture in TURBOMIND_ARCHITECTURES else "PyTorch"
