"""Writes and reads Hugging Face model folders: weights, config, generation config, tokenizer files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from snaketune.chat_format.template_file import TEMPLATE_FILE
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file, write_json
from snaketune.export.hf_config import portable_config
from snaketune.settings.schema import default_of

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    TEMPLATE_FILE,  # for training and chat.py
)


def require_model_folder(path: str | Path) -> Path:
    """Returns `path` if it is a folder with a `config.json`, else raises a `UserError`."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is not a Hugging Face model folder",
            found="a folder without config.json" if path.is_dir() else "no such folder",
            expected="config.json, *.safetensors and tokenizer files",
            fix="pass the folder that contains config.json",
        )
    return path


def save_model(
    model, folder: Path, dtype: str, max_shard_size: str = default_of("hf.max_shard_size")
) -> None:
    """Writes a model's safetensors and a `config.json` that transformers 4 and 5 read alike.

    `save_pretrained` uses the tensor names of published checkpoints, regardless of transformers' internal names.

    Args:
        model: A transformers model whose parameters have the type `dtype`.
        folder: An existing folder.
        dtype: float32, float16 or bfloat16.
        max_shard_size: Size at which a new safetensors file starts, such as `2GB` or `500MB`.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # safetensors creates files that only their owner can read
    written = read_json(folder / "config.json")
    write_json(folder / "config.json", portable_config(written, dtype, model.config))


def write_generation_config(folder: Path, base: dict[str, Any], **tokens: int | list[int] | None) -> None:
    """Writes `generation_config.json`: the base model's settings, with the given token ids replacing its own.

    Args:
        folder: Folder of the file.
        base: The base model's generation config, or an empty dictionary.
        tokens: `bos_token_id`, `eos_token_id`, `pad_token_id`; None keeps the base model's.
    """
    config = {key: value for key, value in base.items() if value is not None}
    config.update({key: value for key, value in tokens.items() if value is not None})
    write_json(folder / "generation_config.json", config)


def copy_tokenizer(source: Path, folder: Path, with_code: bool = False) -> None:
    """Copies the tokenizer's files, and `*.py` if `with_code`. Raises a `UserError` if `tokenizer.json` is missing."""
    if not (source / "tokenizer.json").is_file():
        raise UserError(
            f"{source} has no tokenizer.json",
            expected="the folder that extend_tokenizer.py wrote",
            fix="run extend_tokenizer.py and set tokenizer_path to its folder",
        )
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    names += sorted(path.name for path in source.glob("*.py")) if with_code else []
    for name in names:
        shutil.copyfile(source / name, folder / name)


def describe_files(
    folder: Path, known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Returns `{relative path: {"bytes", "sha256"}}` of every file below `folder` except its `manifest.json`.

    Does not read the files in `known` again.
    """
    names = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / "manifest.json"
    }
    return {
        name: known.get(name) or {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in names.items()
    }


def require_in_range(name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Raises a `UserError` that names the tensor if its values are not finite or do not fit into `dtype`."""
    import torch

    if not tensor.is_floating_point():
        return
    # One pass and no copy. NaN propagates to both bounds.
    low, high = (bound.float().item() for bound in tensor.detach().aminmax()) if tensor.numel() else (0, 0)
    peak = max(-low, high)
    limit = torch.finfo(getattr(torch, dtype)).max
    if not peak <= limit:
        raise UserError(
            f"tensor {name} does not fit into {dtype}",
            found=f"largest magnitude {peak:g}",
            expected=f"at most {limit:g}",
            fix="choose --dtype bfloat16 (or float32)"
            if peak > limit
            else "lower the learning rate: the training diverged",
        )
