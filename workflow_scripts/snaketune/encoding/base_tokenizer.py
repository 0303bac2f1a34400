"""Opens the base tokenizer that a user names: a folder, a file or a hub model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from snaketune.chat_format.chat_template import ChatTemplate
from snaketune.chat_format.template_file import TEMPLATE_FILE, load_template
from snaketune.common.cli import UserError
from snaketune.encoding.extend_tokenizer import extend, save_tokenizer
from snaketune.encoding.sentencepiece_bpe import build_tokenizer_json
from snaketune.encoding.tokenizer import ExtendedTokenizer, parse_tokenizer, template_record
from snaketune.settings.schema import default_of

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_WANTED = "a folder with tokenizer.json, or with a SentencePiece BPE tokenizer.model"
# Files that would make transformers ignore the tokenizer.json beside them.
_FOREIGN = ("tokenizer.model", "added_tokens.json", "chat_template.jinja", "config.json")


def open_tokenizer(
    base: str | os.PathLike,
    save_dir: str | os.PathLike | None = None,
    trust_remote_code: bool = default_of("model.trust_remote_code"),
    template: ChatTemplate | str | None = None,
) -> ExtendedTokenizer:
    """Extends a base tokenizer with the chat tokens that it lacks.

    Args:
        base: A tokenizer folder, a `tokenizer.json` or `tokenizer.model` file, or a hub name.
        save_dir: Folder for the extended tokenizer. Optional if the base has all chat tokens.
        trust_remote_code: Run code from the base's folder if the tokenizer needs it.
        template: The chat template: a shipped template's name or a file. The default is InternLM2's.

    Raises:
        UserError: There is no usable tokenizer, tokens are missing but `save_dir` is None, `save_dir` cannot take the
            tokenizer, or the base was extended for another template.
    """
    text, folder = read_base(base, trust_remote_code)
    if not isinstance(template, ChatTemplate):
        template = load_template(template or default_of("tokenize.template"))
    new_text, extended = extend(text, folder, template)
    if save_dir is None:
        _refuse_saved_template(folder, template)
        if extended.added:
            raise UserError(
                f"{base}: the tokenizer lacks chat tokens, and there is no folder to save the extended tokenizer",
                found=f"no {' '.join(extended.added)}",
                fix="add --tokenizer-w-special-tokens-save-dir DIR, and train with the tokenizer in DIR",
            )
        return extended
    save_dir = Path(save_dir)
    if save_dir.exists() and save_dir.resolve() == folder.resolve():
        _refuse_saved_template(folder, template)
        if extended.added:
            raise UserError(
                f"{save_dir} is the base tokenizer's own folder",
                expected="another folder for the extended tokenizer",
                fix="choose another --tokenizer-w-special-tokens-save-dir",
            )
        return extended
    foreign = [name for name in _FOREIGN if (save_dir / name).exists()]
    if foreign:
        raise UserError(
            f"{save_dir} holds files of another tokenizer or model",
            found=", ".join(foreign),
            expected="an empty or new folder, or an extended tokenizer to replace",
            fix="choose another --tokenizer-w-special-tokens-save-dir",
        )
    save_dir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(save_dir, new_text, extended)
    return extended


def _refuse_saved_template(folder: Path, template: ChatTemplate) -> None:
    saved = template_record(folder)
    if saved and saved["sha256"] != template.sha256:
        raise UserError(
            f"{folder}: the tokenizer was extended for another chat template",
            found=f"--template {template.name} ({template.sha256[:12]})",
            expected=f"{saved['name']} ({saved['sha256'][:12]}), the template saved and served with the tokenizer",
            fix=f"pass --template {folder / TEMPLATE_FILE}, or extend the base tokenizer for {template.name} "
            "(extend_tokenizer.py)",
        )


def read_base(
    base: str | os.PathLike, trust_remote_code: bool = default_of("model.trust_remote_code")
) -> tuple[str, Path]:
    """Returns the text of the base's tokenizer.json (built if necessary) and the folder of its configuration.

    Raises:
        UserError: There is no usable tokenizer.
    """
    path = Path(base)
    if path.is_file():
        return _read_file(path), path.parent
    if not path.exists():
        path = _download(str(base))
    if (path / "tokenizer.json").is_file():
        return _read_file(path / "tokenizer.json"), path
    if trust_remote_code:
        return _build_by_remote_code(path), path
    if (path / "tokenizer.model").is_file():
        return _read_file(path / "tokenizer.model"), path
    raise UserError(f"{path} holds no tokenizer", expected=_WANTED, fix="correct --tokenizer-path")


def _read_file(path: Path) -> str:
    try:
        if path.suffix == ".json":
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read", found=error, expected="a tokenizer.json") from None
    tokenizer = build_tokenizer_json(path)
    _add_declared_tokens(tokenizer, path.parent)
    return tokenizer.to_str(pretty=True) + "\n"


def _add_declared_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds the tokens of tokenizer_config.json and added_tokens.json to a SentencePiece model, in order of ids."""
    declared: dict[int, AddedToken] = {}
    added_tokens = folder / "added_tokens.json"
    config_path = folder / "tokenizer_config.json"
    if added_tokens.is_file():
        for content, token_id in json.loads(added_tokens.read_text(encoding="utf-8")).items():
            declared[int(token_id)] = AddedToken(content, normalized=False, special=True)
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
        flags = {
            key: bool(entry.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized", "special")
        }
        declared[int(token_id)] = AddedToken(entry["content"], **flags)
    for token_id, token in sorted(declared.items()):
        tokenizer.add_tokens([token])
        got = tokenizer.token_to_id(token.content)
        if got != token_id:
            raise UserError(
                f"{folder}: the added token {token.content!r} cannot have the id from the files",
                found=f"id {token_id} in the files, {got} in the SentencePiece model's tokenizer",
                fix="pass a folder with a tokenizer.json",
            )


def _download(name: str) -> Path:
    """Fetches the tokenizer files of a hub model, or reads them from the hub's cache."""
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name} does not exist", expected=f"{_WANTED}, or a hub name", fix="correct --tokenizer-path"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, "*.py"]))
    except Exception as error:  # offline, unknown name or gated; the hub's message says which
        raise UserError(
            f"{name} is neither a local folder nor a hub model that can be fetched",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected=f"{_WANTED}, or a hub name",
            fix="correct --tokenizer-path, or copy the tokenizer into a folder and pass that folder",
        ) from None


def _build_by_remote_code(folder: Path) -> str:
    """Builds the tokenizer with the code in the base's folder, which the user has trusted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{folder}: its code builds a slow tokenizer, which has no tokenizer.json", expected=_WANTED
        )
    text = backend.to_str(pretty=True) + "\n"
    parse_tokenizer(text, folder)
    return text
