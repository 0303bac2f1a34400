"""Training checkpoint -> Hugging Face folder that transformers 4, transformers 5 and lmdeploy read alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.files import atomic_dir, read_json, sha256_file, sha256_json, write_json

from .hf_folder import copy_tokenizer, describe_files, require_in_range, save_model, write_generation_config

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter"
# Of tokenizers whose manifest names no chat template.
_END_OF_TURN = "<|im_end|>"


def convert(
    config_path: Path,
    pth: Path,
    dst: Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "2GB",
    trust_remote_code: bool = False,
    lora: str = "merge",
) -> dict[str, Any]:
    """Writes weights, config, generation config and tokenizer of a trained model.

    Args:
        config_path: The training config; names the base model and the tokenizer.
        pth: An `iter_N.pth`, a run folder (its newest whole checkpoint), or the `train.json` of a finished run.
        dst: Folder to make; replaced as a whole if it exists.
        dtype: Type of the saved weights; auto is what the model was trained in.
        max_shard_size: Size at which a new safetensors file is begun.
        trust_remote_code: Runs Python code that comes with the base model.
        lora: What a LoRA run gives: `merge`, a model like any other; `adapter`, that and the adapter, as `peft`
            reads it, in the folder `adapter`.

    Returns:
        The manifest, which is also written to `manifest.json` in the folder.

    Raises:
        UserError: When a path is wrong, the weights do not belong to the base model's architecture, are not the
            ones `train.json` describes, are not finite, or do not fit the dtype.
    """
    from sft import config as training
    from sft.checkpoints import read_state_dict

    config = training.load_config(config_path)
    base = training.model_path(config)
    tokenizer = Path(training.tokenizer_path(config) or base)
    checkpoint, record = find_checkpoint(pth)
    state = read_state_dict(checkpoint)
    _require_recorded_weights(state, record, checkpoint)
    trained_in = training_dtype(config, record, checkpoint, state)
    dtype = trained_in if dtype == "auto" else dtype
    with atomic_dir(dst) as folder:
        if training.lora_settings(config) is not None:
            adapter = folder / ADAPTER if lora == "adapter" else None
            state = _merge(config, state, trained_in, trust_remote_code, adapter)
        model = build_model(base, state, dtype, trust_remote_code)
        del state
        save_model(model, folder, dtype, max_shard_size)
        copy_tokenizer(tokenizer, folder)
        if trust_remote_code:
            for path in sorted(Path(base).glob("*.py")):
                shutil.copyfile(path, folder / path.name)
        _write_generation_config(base, tokenizer, model, folder)
        manifest = _manifest(folder, checkpoint, record, model, dtype)
        write_json(folder / "manifest.json", manifest)
    return manifest


def _merge(config, state: dict, dtype: str, trust_remote_code: bool, adapter: Path | None) -> dict:
    """Returns all weights of a LoRA run, from its checkpoint and its base model in the type that it trained in."""
    from sft import config as training
    from sft.lora import merge_lora

    model, new_ids = grown_base(config, dtype, trust_remote_code)
    if adapter is not None:
        adapter.mkdir()
    return merge_lora(model, training.lora_settings(config), new_ids, state, adapter)


def grown_base(config, dtype: str, trust_remote_code: bool = False) -> tuple[Any, list[int]]:
    """Returns the base model as its training starts from it, and the ids of the tokens that are new to it."""
    from sft import config as training
    from sft.model import load_base_model, resize_for_tokenizer
    from sft.tokenizer_rows import find_new_tokens

    base, tokenizer = training.model_path(config), training.tokenizer_path(config)
    model = load_base_model(base, dtype, "sdpa", trust_remote_code)
    new_ids: list[int] = []
    if tokenizer is not None:
        vocab_size, new_ids = find_new_tokens(tokenizer, base)
        resize_for_tokenizer(model, vocab_size, new_ids)
    return model, new_ids


def find_checkpoint(pth: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint that `pth` means, and the record of the run if `pth` is its `train.json`."""
    from sft.checkpoints import MARKER, newest_whole_checkpoint

    if pth.is_file() and pth.suffix == ".json":
        record = read_json(pth)
        if "checkpoint" not in record:
            raise UserError(f"{pth} names no checkpoint", expected="the train.json that train_model.py wrote")
        return pth.parent / record["checkpoint"], record
    if pth.is_dir() and not (pth / MARKER).is_file() and not list(pth.glob("*.pt")):
        newest = newest_whole_checkpoint(pth)
        if newest is None:
            raise UserError(
                f"{pth} holds no whole checkpoint",
                found=", ".join(sorted(path.name for path in pth.iterdir())[:8]) or "an empty folder",
                expected="an iter_N.pth folder, or a run folder that holds some",
                fix="give the iter_N.pth folder, or train.json",
            )
        return newest, {}
    return pth, {}


def build_model(base: str, state: dict[str, torch.Tensor], dtype: str, trust_remote_code: bool = False):
    """Returns a transformers model with the given weights in `dtype`; the base's own weights are not read.

    Args:
        base: Folder or hub name of the base model, for its config.
        state: All weights by their names in the model; a tied head may be left out.
        dtype: float32, float16 or bfloat16.
        trust_remote_code: Runs Python code that comes with the base model.

    Raises:
        UserError: When names or shapes differ from the architecture's, or a value does not fit `dtype`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        embedding = next(name for name, value in model.named_parameters() if value is _input_weight(model))
        if embedding not in state:
            raise _mismatch(base, f"no {embedding}", "weights of this architecture")
        rows = state[embedding].shape[0]
        if rows != _input_weight(model).shape[0]:
            # Training grew the vocabulary.
            model.resize_token_embeddings(rows, mean_resizing=False)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    for name, tensor in state.items():
        if wanted.get(name) != tensor.shape:
            raise _mismatch(base, f"{name} {tuple(tensor.shape)}", f"{tuple(wanted.get(name, ()))}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    target = getattr(torch, dtype)
    for name in parameters & state.keys():
        require_in_range(name, state[name], dtype)
        state[name] = state[name].to(target)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, value in model.named_parameters() if value.is_meta]
    if absent:
        raise _mismatch(base, f"no weights for {', '.join(absent[:5])}", "weights of all parameters")
    return model


def _input_weight(model):
    return model.get_input_embeddings().weight


def _mismatch(base: str, found: str, expected: str) -> UserError:
    return UserError(
        f"the checkpoint does not belong to the base model {base}",
        found=found,
        expected=expected,
        fix="give the config that the checkpoint was trained with",
    )


def _require_recorded_weights(state: dict, record: dict[str, Any], checkpoint: Path) -> None:
    if not record:
        return
    from sft.session import weights_digest

    digest = weights_digest(state)
    if digest != record["weights_sha256"]:
        raise UserError(
            f"{checkpoint} holds other weights than train.json describes",
            found=digest,
            expected=record["weights_sha256"],
            fix="run train_model.py again, which writes train.json from the checkpoint",
        )


def training_dtype(config, record: dict[str, Any], checkpoint: Path, state: dict) -> str:
    """Returns what the model computed in while it was trained; ZeRO's checkpoints hold fp32 copies whatever that was."""
    from sft import config as training

    identity = checkpoint.parent / "identity.json"
    recorded = record.get("dtype") or (
        read_json(identity).get("fields", {}).get("dtype") if identity.is_file() else None
    )
    if recorded:
        return recorded
    named = training.training_dtype(config).removeprefix("torch.")
    return named if named != "auto" else str(next(iter(state.values())).dtype).removeprefix("torch.")


def _write_generation_config(base: str, tokenizer: Path, model, folder: Path) -> None:
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    path = cached_file(base, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    settings = read_json(path) if path else {}
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    names = read_json(tokenizer / "tokenizer_config.json")
    manifest = tokenizer / "manifest.json"
    saved = read_json(manifest).get("chat_template") if manifest.is_file() else None
    ends = [vocabulary.token_to_id(saved["end_of_turn"] if saved else _END_OF_TURN)]
    for source in (settings.get("eos_token_id"), model.config.eos_token_id):
        ends += source if isinstance(source, list) else [source]
    pad = names.get("pad_token")
    write_generation_config(
        folder,
        settings,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=vocabulary.token_to_id(pad) if isinstance(pad, str) else None,
    )


def _manifest(folder: Path, checkpoint: Path, record: dict[str, Any], model, dtype: str) -> dict[str, Any]:
    import torch
    import transformers

    files = describe_files(folder)
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return {
        "format": 1,
        "checkpoint": checkpoint.name,
        "checkpoint_weights_sha256": record.get("weights_sha256"),
        "architecture": model.config.architectures[0],
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": _input_weight(model).shape[0],
        "tokenizer_sha256": sha256_file(folder / "tokenizer.json"),
        "weights_sha256": sha256_json(weights),
        "files": files,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
