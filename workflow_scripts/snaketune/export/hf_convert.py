"""Converts a training checkpoint to a Hugging Face folder that transformers 4 and 5 and lmdeploy read alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketune.common.cli import UserError
from snaketune.common.files import read_json, resumable_dir, sha256_file, sha256_json, write_json, write_text
from snaketune.common.result_paths import IDENTITY
from snaketune.common.slurm import job_record
from snaketune.encoding.tokenizer import template_record
from snaketune.export.checkpoint_source import open_checkpoint
from snaketune.export.hf_config import tuned_config
from snaketune.export.hf_folder import copy_tokenizer, describe_files, write_generation_config
from snaketune.settings.schema import default_of

if TYPE_CHECKING:
    from snaketune.checkpoints.stored_tensors import StoredTensors
    from snaketune.training.train_config import TrainConfig

ADAPTER = "adapter"
# The keys of a config.json whose values are token ids.
_NAMES_TOKEN = ("_token_id", "_token_index")
# For tokenizers whose manifest does not name a chat template.
_END_OF_TURN = "<|im_end|>"


def convert(
    config_path: Path,
    pth: Path,
    dst: Path,
    *,
    dtype: str = default_of("hf.dtype"),
    max_shard_size: str = default_of("hf.max_shard_size"),
    trust_remote_code: bool = default_of("model.trust_remote_code"),
    lora: str = default_of("hf.lora"),
    padded_vocab: str = default_of("hf.padded_vocab"),
) -> dict[str, Any]:
    """Writes the weights, config, generation config and tokenizer of a trained model.

    Args:
        config_path: The training config; names the base model and the tokenizer.
        pth: An `iter_N.pth`, a run folder (for its newest complete checkpoint), or the `train.json` of a finished run.
        dst: Folder to create; an existing one is replaced.
        dtype: Type of the saved weights; `auto` is the training dtype.
        max_shard_size: Size at which a new safetensors file starts.
        trust_remote_code: Runs Python code that comes with the base model.
        lora: Output of a LoRA run. `merge` writes a plain model. `adapter` also writes the adapter, in `peft`'s
            format, to the folder `adapter`.
        padded_vocab: `trim` writes only the vocabulary rows that have a token, so that none of the others can be
            sampled; `keep` writes all.

    Returns:
        The manifest, which is also written to `manifest.json` in the folder.

    Raises:
        UserError: A path is wrong, or the weights do not match the base model's architecture or `train.json`,
            are not finite, or do not fit the dtype.
    """
    from snaketune.checkpoints.weights_digest import weights_digest
    from snaketune.export.hf_tensors import as_published, empty_model, plan_outputs
    from snaketune.export.lora_weights import merged_weights, open_base
    from snaketune.export.model_card import model_card, tokenized_folder
    from snaketune.export.weight_shards import remove_unfinished, write_shards
    from snaketune.models.vocabulary_rows import find_new_tokens
    from snaketune.training.train_config import load_config

    config = load_config(config_path)
    base = config.model_path
    tokenizer = Path(config.tokenizer_path or base)
    checkpoint, record, state = open_checkpoint(pth)
    dtype = training_dtype(config, record, checkpoint, state) if dtype == "auto" else dtype
    with resumable_dir(dst) as folder:
        remove_unfinished(folder)
        adapter = folder / ADAPTER if lora == "adapter" else None
        weights = state.stored
        if config.lora is not None:
            trained_in = training_dtype(config, record, checkpoint, state)
            weights = merged_weights(config, state, trained_in, trust_remote_code, adapter)
        model = empty_model(base, trust_remote_code)
        settings = _base_settings(base, "config.json")
        rows = None
        if padded_vocab == "trim":
            tokens, _ = find_new_tokens(str(tokenizer), None)
            rows = max(tokens, 1 + _last_named_id(settings, model.get_input_embeddings().num_embeddings))
        is_part = settings.get("model_type") != model.config.model_type
        planned = plan_outputs(model, weights, dtype, base, rows)
        outputs = as_published(model, planned, () if is_part else set(open_base(base)))
        lazy = all(each.stored.extents for each in outputs.values())
        if weights is state.stored and lazy and outputs.keys() <= weights.keys():
            files, digest = write_shards(outputs, folder, max_shard_size, state if record else None)
        else:
            digest = weights_digest(state) if record else None
            files, _ = write_shards(outputs, folder, max_shard_size)
        _require_recorded_weights(digest, record, checkpoint)
        write_json(folder / "config.json", tuned_config(settings, model, dtype))
        copy_tokenizer(tokenizer, folder)
        if trust_remote_code:
            for path in sorted(Path(base).glob("*.py")):
                shutil.copyfile(path, folder / path.name)
        _write_generation_config(base, tokenizer, model, folder)
        identity = run_identity_fields(checkpoint)
        data = tokenized_folder(config.plan, config.train_folder)
        manifest = _manifest(folder, checkpoint, record, model, dtype, files, template_record(tokenizer))
        card = model_card(base, manifest, record, identity, data)
        write_text(folder / "README.md", card)
        manifest["files"]["README.md"] = {
            "bytes": len(card.encode()),
            "sha256": sha256_file(folder / "README.md"),
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def _require_recorded_weights(digest: str | None, record: dict[str, Any], checkpoint: Path) -> None:
    if record and digest != record["weights_sha256"]:
        raise UserError(
            f"the weights in {checkpoint} do not match train.json",
            found=digest,
            expected=record["weights_sha256"],
            fix="run train_model.py again: it writes train.json from the checkpoint",
        )


def run_identity_fields(checkpoint: Path) -> dict[str, Any]:
    """Returns the fields of the run identity of a checkpoint, {} if its folder has none."""
    identity = checkpoint.parent / IDENTITY
    return read_json(identity).get("fields", {}) if identity.is_file() else {}


def training_dtype(
    config: TrainConfig, record: dict[str, Any], checkpoint: Path, state: StoredTensors
) -> str:
    """Returns the dtype of the training's arithmetic. ZeRO checkpoints always hold fp32 copies."""
    recorded = record.get("dtype") or run_identity_fields(checkpoint).get("dtype")
    if recorded:
        return recorded
    named = config.dtype.removeprefix("torch.")
    return named if named != "auto" else str(next(iter(state.stored.values())).dtype).removeprefix("torch.")


def _base_settings(base: str, name: str) -> dict[str, Any]:
    """Returns a JSON file of the base model, a folder or a hub name; {} if it has none."""
    from transformers.utils import cached_file

    path = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
    return read_json(path) if path else {}


def _last_named_id(settings: Any, rows: int) -> int:
    """Returns the largest token id below `rows` that a config.json names, such as `pad_token_id`; -1 if none.

    transformers cannot load a model whose padding token has no row.
    """
    if isinstance(settings, list):
        return max((_last_named_id(each, rows) for each in settings), default=-1)
    if not isinstance(settings, dict):
        return -1
    found = [-1]
    for key, value in settings.items():
        if key.endswith(_NAMES_TOKEN):
            ids = value if isinstance(value, list) else [value]
            found += [each for each in ids if isinstance(each, int) and each < rows]
        else:
            found.append(_last_named_id(value, rows))
    return max(found)


def _token_of(config: Any, name: str) -> int | list[int] | None:
    """Returns a config's token, or that of its text part: a composite config may name it in either."""
    own = getattr(config, name, None)
    return getattr(config.get_text_config(), name, None) if own is None else own


def _write_generation_config(base: str, tokenizer: Path, model, folder: Path) -> None:
    from tokenizers import Tokenizer

    settings = _base_settings(base, "generation_config.json")
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    names = read_json(tokenizer / "tokenizer_config.json")
    saved = template_record(tokenizer)
    ends = [vocabulary.token_to_id(saved["end_of_turn"] if saved else _END_OF_TURN)]
    for source in (settings.get("eos_token_id"), _token_of(model.config, "eos_token_id")):
        ends += source if isinstance(source, list) else [source]
    pad = names.get("pad_token")
    write_generation_config(
        folder,
        settings,
        bos_token_id=_token_of(model.config, "bos_token_id"),
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=vocabulary.token_to_id(pad) if isinstance(pad, str) else None,
    )


def _manifest(
    folder: Path,
    checkpoint: Path,
    record: dict[str, Any],
    model,
    dtype: str,
    shards: dict[str, dict],
    template: dict[str, Any] | None,
) -> dict[str, Any]:
    import torch
    import transformers

    files = describe_files(folder, shards)
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return {
        "format": 1,
        "checkpoint": checkpoint.name,
        "checkpoint_weights_sha256": record.get("weights_sha256"),
        "architecture": type(model).__name__,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "tokenizer_sha256": sha256_file(folder / "tokenizer.json"),
        "chat_template": template,
        "weights_sha256": sha256_json(weights),
        "files": files,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **job_record(),
    }
