"""Computes a model's logits at chosen tokens, in fp32, whatever its architecture and its size.

A Hugging Face folder is loaded as its users load it; a training checkpoint goes into an empty model of the base's
architecture, without the code that converts it. Imports only packages that the training environment (transformers 5) and
the converter's (transformers 4) both have.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snaketune.checkpoints.safetensors_files import open_safetensors
from snaketune.parity.layerwise import Weights, empty_with_buffers, load_as_it_runs
from snaketune.settings.schema import default_of

_SPARE = 2 << 30  # bytes for activations and logits


@dataclass(frozen=True)
class Batch:
    """Ids (sequences, tokens), int64, and the tokens whose logits are wanted: a bool tensor of that shape."""

    ids: torch.Tensor
    wanted: torch.Tensor


def prompts_batch(prompts: Sequence[Sequence[int]]) -> Batch:
    """Returns prompts as one batch with all their tokens wanted, padded on the right, which no prompt sees."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    wanted = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        wanted[row, : len(prompt)] = True
    return Batch(ids, wanted)


def folder_logits(
    folder: Path,
    batches: Sequence[Batch],
    *,
    attention: str | None = None,
    rounded_to: torch.dtype | None = None,
    trust_remote_code: bool = default_of("model.trust_remote_code"),
    memory: int | None = None,
) -> list[torch.Tensor]:
    """Returns the logits of a Hugging Face folder as `from_pretrained` loads it: (wanted tokens, vocabulary) a batch.

    Args:
        folder: The folder; its weights stay on disk if they do not fit into memory.
        batches: Ids and wanted tokens.
        attention: An attention implementation of transformers; None uses the model's default.
        rounded_to: Rounds every parameter to this dtype first; None keeps them unchanged.
        trust_remote_code: Runs Python code that comes with the model.
        memory: Bytes to use; None finds out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = open_safetensors(folder).stored.values()
    needed = 4 * sum(each.shape.numel() for each in stored) + _SPARE
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    if needed <= (free_memory() if memory is None else memory):
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        if rounded_to is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(rounded_to).float()
        return [logits_at(model, batch) for batch in batches]
    # For weights that transformers stores in another form than it computes with (experts).
    with tempfile.TemporaryDirectory(prefix=".offload-", dir=folder.parent) as scratch:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        parts = empty_with_buffers(config, trust_remote_code=trust_remote_code).named_children()
        options |= {"device_map": {name: "disk" for name, _ in parts}, "offload_folder": scratch}
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        load_as_it_runs(model, _take_offloaded(model), rounded_to)
        return [logits_at(model, batch) for batch in batches]


def _take_offloaded(model: Any) -> Weights:
    """Returns the weights that transformers left on disk, by name, and removes accelerate's hooks that load them.

    Those load the parameters of the module that is called, and no other's. Many layers read a child's parameters
    without calling it.
    """
    from accelerate.hooks import remove_hook_from_submodules

    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    weights = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None))
    for hook in hooks:
        hook.offload = False  # else it loads everything when it is removed
    remove_hook_from_submodules(model)
    return weights


def checkpoint_logits(
    base: str,
    weights: Weights,
    batches: Sequence[Batch],
    *,
    attention: str | None = None,
    rounded_to: torch.dtype | None = None,
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> list[torch.Tensor]:
    """Returns the logits of trained weights in their base model's architecture: (wanted tokens, vocabulary) a batch.

    Args:
        base: The base model, a folder or a hub name, for its config alone.
        weights: All weights by their names in training.
        batches: Ids and wanted tokens.
        attention: An attention implementation of transformers; None uses the model's default.
        rounded_to: Rounds every parameter to this dtype first; None keeps them unchanged.
        trust_remote_code: Runs Python code that comes with the model.
    """
    from transformers import AutoConfig

    trust = {"trust_remote_code": trust_remote_code}
    options = trust if attention is None else {**trust, "attn_implementation": attention}
    config = AutoConfig.from_pretrained(base, **trust)
    model = empty_with_buffers(config, **options)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    rows = weights[f"{name}.weight"].shape[0]
    if rows != embedding.weight.shape[0]:
        with torch.device("meta"):
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = empty_with_buffers(model.config, **options)
    load_as_it_runs(model, weights, rounded_to)
    return [logits_at(model, batch) for batch in batches]


@torch.no_grad()
def logits_at(model: Any, batch: Batch) -> torch.Tensor:
    """Returns the logits at a batch's wanted tokens: (tokens, vocabulary). The head computes no others."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][batch.wanted][None], *inputs[1:]))
    try:
        return model(input_ids=batch.ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()


def free_memory() -> int:
    """Returns the bytes that this process may still use, by the host, its control group and Slurm."""
    import psutil

    own = psutil.Process().memory_info().rss
    limits = [psutil.virtual_memory().available + own]
    if os.environ.get("SLURM_MEM_PER_NODE", "0") != "0":
        limits.append(int(os.environ["SLURM_MEM_PER_NODE"]) << 20)
    limits += _group_limits()
    return min(limits) - own


def _group_limits() -> list[int]:
    """Returns the memory limits of this process's control groups (version 2) in bytes."""
    try:
        path = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    folder = root / path.lstrip("/")
    files = [each / "memory.max" for each in (folder, *folder.parents) if each.is_relative_to(root)]
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def top_values(logits: torch.Tensor, count: int = 64) -> Mapping[str, list]:
    """Returns the largest logits of each token with their ids, as JSON values: {"ids", "values"}."""
    values, ids = logits.topk(min(count, logits.shape[-1]))
    return {
        "ids": ids.tolist(),
        "values": [[float(f"{each:.8g}") for each in row] for row in values.tolist()],
    }
