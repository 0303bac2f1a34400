"""Defines the identity of a run: hyperparameters, base weights, tokenizer, data and rows per optimizer step.

It includes the number of ranks only if the order of the data depends on it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.files import sha256_json
from snaketune.common.fingerprints import FingerprintCache
from snaketune.models.device import resolve_dtype, training_device
from snaketune.packing.data_check import refuse_other_data
from snaketune.packing.pack_plan import read_plan_manifest
from snaketune.tokenized.bin_digests import bin_digests
from snaketune.tokenized.compatibility import made_with, refuse_other_template, refuse_other_tokenizer
from snaketune.tokenized.data_order import list_train_files, read_data_order
from snaketune.training.train_config import TrainConfig

_PARTS = (
    "model",
    "train_dataloader",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "strategy",
    "randomness",
)
# Paths are replaced by digests of their contents. The others change how a run is executed, not its result.
_NOT_HYPERPARAMETERS = {
    "model.llm.model_path",
    "model.llm.trust_remote_code",
    "model.tokenizer",
    "train_dataloader.dataset.plan",
    "train_dataloader.dataset.folder",
    "train_dataloader.dataset.data_order_path",
    "train_dataloader.num_workers",
    "train_dataloader.prefetch_factor",
    "train_dataloader.persistent_workers",
    "train_dataloader.pin_memory",
    "strategy.zero3_init",
    "strategy.sequence_parallel",
    "optim_wrapper.accumulative_counts",
    "optim_wrapper.global_batch",
    "train_cfg.max_skipped_steps",
}


def run_identity(config: TrainConfig, world_size: int, cache: FingerprintCache) -> dict[str, Any]:
    """Returns the fields that make up the identity of a run.

    Raises:
        UserError: A model, tokenizer or data file is missing, or the data were made with a different
            tokenizer or template.
    """
    hyperparameters: dict[str, Any] = {}
    for part in _PARTS:
        hyperparameters.update(_flat(part, config.values.get(part)))
    for name in _NOT_HYPERPARAMETERS:
        hyperparameters.pop(name, None)
    hyperparameters.update(_flat("custom_hooks", config.values.get("custom_hooks") or None))
    tokenizer = config.tokenizer_path
    tokenizer_sha256 = cache.file(Path(tokenizer) / "tokenizer.json") if tokenizer else None
    if tokenizer:
        _refuse_data_of_another(tokenizer, tokenizer_sha256, config)
    return {
        "hyperparameters": hyperparameters,
        "dtype": str(resolve_dtype(config.dtype, training_device())).removeprefix("torch."),
        "base_model": base_model_digest(config.model_path, cache),
        "tokenizer": tokenizer_sha256,
        **_training_data(config, world_size, cache),
        "global_batch": config.global_batch(world_size),
    }


def _refuse_data_of_another(tokenizer: str, tokenizer_sha256: str, config: TrainConfig) -> None:
    """Checks that the data were made with this tokenizer and its chat template, if that is recorded."""
    plan, folder = config.plan, config.train_folder
    if plan is not None:
        made = read_plan_manifest(plan).get("made_with")
    else:
        made = made_with(folder, _train_files(folder, config.data_order))
    refuse_other_tokenizer(plan or folder, made, tokenizer, tokenizer_sha256)
    refuse_other_template(plan or folder, made, tokenizer)


def _training_data(config: TrainConfig, world_size: int, cache: FingerprintCache) -> dict[str, Any]:
    plan, folder = config.plan, config.train_folder
    if plan is None:
        fields: dict[str, Any] = {"data": data_digest(folder, config.data_order, cache)}
    else:
        fields = {"plan": refuse_other_data(plan, cache, folder)}
    if plan is None or read_plan_manifest(plan)["mode"] == "xtuner":
        # XTuner drops the rows that the ranks cannot share evenly.
        fields["world_size"] = config.data_ranks(world_size)
    return fields


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        children = enumerate(value)
    else:
        return {} if value is None else {prefix: value}
    return {name: leaf for key, child in children for name, leaf in _flat(f"{prefix}.{key}", child).items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns a line `field: old -> new` for each field that differs between two identities."""
    before, after = _flat("", old), _flat("", new)
    names = sorted(before.keys() | after.keys())
    lines = []
    for name in names:
        if before.get(name) != after.get(name):
            lines.append(f"{name.removeprefix('.')}: {_short(before.get(name))} -> {_short(after.get(name))}")
    return lines


def _short(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def base_model_digest(model_path: str, cache: FingerprintCache) -> str:
    """Returns the digest of a model folder's config and weights."""
    folder = Path(model_path)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not (folder / "config.json").is_file() or not weights:
        raise UserError(
            f"{folder} is not a model folder",
            found="folder does not exist" if not folder.is_dir() else "no config.json or no weights",
            expected="config.json and *.safetensors",
            fix="set model_path to a Hugging Face model folder or a hub name",
        )
    return sha256_json({file.name: cache.file(file) for file in [folder / "config.json", *weights]})


def data_digest(train_folder: str, data_order_path: str | None, cache: FingerprintCache) -> str:
    """Returns the digest of the `.bin` files in data order, for a config without a pack plan."""
    names = _train_files(train_folder, data_order_path)
    return sha256_json(list(zip(names, bin_digests(train_folder, names, cache), strict=True)))


def _train_files(train_folder: str, data_order_path: str | None) -> list[str]:
    return read_data_order(data_order_path) if data_order_path else list_train_files(train_folder)


def resolve_hub_model(config: TrainConfig) -> TrainConfig:
    """Returns the config with a hub name replaced by the folder of its snapshot; keeps local folders."""
    path = config.model_path
    if Path(path).exists() or Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1:
        return config
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.py", "*.txt"]
        return replace(config, model_path=snapshot_download(path, allow_patterns=wanted))
    except Exception as error:  # offline, unknown name, no access: the hub's message says which
        raise UserError(
            f"the base model {path} is not a local folder and cannot be downloaded from the hub",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="check model_path, or use a local folder, which needs no network",
        ) from None
