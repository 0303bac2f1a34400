"""The extended tokenizer: a base tokenizer plus the control tokens of a chat template.

transformers 4 and 5 build different tokenizers from the same SentencePiece model, but give the same ids for the same
`tokenizer.json`. So that file is the source of truth: the `tokenizers` library reads it, missing chat tokens are added
as transformers would add them, and nothing else in it changes. The template is saved beside it, as Jinja for
`apply_chat_template` and as a template file for all later stages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from snaketune.chat_format.chat_template import ChatTemplate
from snaketune.chat_format.template_file import TEMPLATE_FILE, load_template, parse_template
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, sha256_file

_EXTEND = "run extend_tokenizer.py and pass its output folder"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
# Defaults of transformers' classes for tokens that are missing from tokenizer_config.json.
_CLASS_TOKENS = {"LlamaTokenizer": _LLAMA, "CodeLlamaTokenizer": _LLAMA, "GPT2Tokenizer": _GPT2}


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer that knows the control tokens of a chat template.

    Attributes:
        tokenizer: The `tokenizers.Tokenizer`, without truncation and padding.
        sha256: SHA-256 of the tokenizer.json.
        tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token` -> text, for those that exist.
        ids: The template's control tokens -> id.
        added: Chat tokens that the base lacked -> id.
        base_sha256: SHA-256 of the base's tokenizer.json.
        base_vocab_size: Embedding rows that the base tokenizer needs.
        template: The chat template saved with the tokenizer.
        text: The text of the tokenizer.json.
    """

    tokenizer: Tokenizer
    sha256: str
    tokens: dict[str, str]
    ids: dict[str, int]
    added: dict[str, int] = field(default_factory=dict)
    base_sha256: str = ""
    base_vocab_size: int = 0
    template: ChatTemplate = field(default_factory=load_template)
    text: str = field(default="", repr=False)

    @property
    def bos_token_id(self) -> int | None:
        """The id of BOS. None only if the template has no BOS."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    @property
    def end_of_turn_id(self) -> int:
        """The id that ends an answer."""
        return self.tokenizer.token_to_id(self.template.end_of_turn)

    @property
    def vocab_size(self) -> int:
        """Embedding rows that the ids need (the largest id plus one)."""
        return rows_needed(self.tokenizer)

    def require(self, template: ChatTemplate) -> None:
        """Raises a UserError if the tokenizer lacks tokens that a template needs."""
        missing = [token for token in tokens_of(template) if self.tokenizer.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"the tokenizer lacks tokens of the chat template {template.name}",
                found=f"no {' '.join(missing)}; it was made for {self.template.name}",
                fix=f"run extend_tokenizer.py --template {template.name}",
            )
        if template.bos and "bos_token" not in self.tokens:
            raise UserError(
                f"the tokenizer has no BOS token, but {template.name} begins with one",
                fix="set bos_token in tokenizer_config.json, or set bos: false in the template",
            )

    def with_template(self, template: str | None) -> ExtendedTokenizer:
        """Returns the tokenizer with another chat template (a shipped template's name or a file). None keeps it."""
        return replace(self, template=load_template(template)) if template else self

    def _id_of(self, name: str) -> int | None:
        return self.tokenizer.token_to_id(self.tokens[name]) if name in self.tokens else None


def rows_needed(tokenizer: Tokenizer) -> int:
    """Returns the largest id plus one. Equals the number of entries unless the ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def load_tokenizer(folder: str | os.PathLike) -> ExtendedTokenizer:
    """Loads an extended tokenizer.

    Args:
        folder: A folder with tokenizer.json and tokenizer_config.json.

    Raises:
        UserError: A file is missing or broken, a chat token is missing, or a BOS token is needed and missing.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = "a folder without it" if folder.is_dir() else "no such folder"
        raise UserError(f"{path} is missing", found=found, expected="an extended tokenizer", fix=_EXTEND)
    text = path.read_text(encoding="utf-8")
    tokenizer = parse_tokenizer(text, path)
    manifest = folder / "manifest.json"
    known: dict[str, Any] = read_json(manifest) if manifest.is_file() else {}
    template = _saved_template(folder, known)
    ids = {token: tokenizer.token_to_id(token) for token in template.special_tokens}
    missing = [token for token, token_id in ids.items() if token_id is None]
    if missing:
        raise UserError(f"{path} lacks chat tokens", found=f"no {' '.join(missing)}", fix=_EXTEND)
    tokens = special_tokens(folder, lambda token: tokenizer.token_to_id(token) is not None, template.bos)
    sha = sha256_file(path)
    if known.get("tokenizer_sha256") != sha:
        known = {}  # not written by us, or tokenizer.json changed since
    return ExtendedTokenizer(
        tokenizer,
        sha,
        tokens,
        ids,
        known.get("added", {}),
        known.get("base_sha256", sha),
        known.get("base_vocab_size") or rows_needed(tokenizer),
        template,
        text,
    )


def template_record(folder: Path) -> dict[str, Any] | None:
    """Returns `name`, `end_of_turn` and `sha256` of the template saved with a tokenizer, or None."""
    manifest = folder / "manifest.json"
    return read_json(manifest).get("chat_template") if manifest.is_file() else None


def _saved_template(folder: Path, manifest: dict[str, Any]) -> ChatTemplate:
    """Returns the template saved with a tokenizer, or InternLM2's if there is none."""
    saved, path = manifest.get("chat_template"), folder / TEMPLATE_FILE
    if not path.is_file() and not saved:
        return load_template("internlm2_chat")
    if saved and not (path.is_file() and sha256_file(path) == saved["sha256"]):
        raise UserError(
            f"{path} is not the chat template named in the manifest beside it",
            found="the file was changed" if path.is_file() else "no such file",
            fix=_EXTEND,
        )
    name = saved["name"] if saved else path.stem
    return parse_template(path.read_text(encoding="utf-8"), name, path)


def tokens_of(template: ChatTemplate) -> list[str]:
    """Returns the tokens that a template needs, in the order for adding missing ones."""
    return list(dict.fromkeys((*template.special_tokens, template.end_of_turn)))


def parse_tokenizer(text: str, path: str | os.PathLike) -> Tokenizer:
    """Parses the text of a tokenizer.json. The tokenizer has no truncation and no padding.

    Raises:
        UserError: The text is not a tokenizer.json.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"{path} is not a tokenizer.json",
            found=error,
            expected="a file that the tokenizers library reads",
            fix="copy the file again from the model's folder",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_tokens(
    folder: str | os.PathLike, exists: Callable[[str], bool], needs_bos: bool = True
) -> dict[str, str]:
    """Returns the bos, eos, unk and pad tokens of a tokenizer folder, if they exist.

    Args:
        folder: The folder.
        exists: Returns True if the tokenizer has a token with the given text.
        needs_bos: True if conversations start with BOS.

    Raises:
        UserError: BOS is needed and missing, or the configured BOS token is not in the tokenizer.
    """
    folder = Path(folder)
    config = _read_config(folder / "tokenizer_config.json")
    if not config and not (folder / "tokenizer.json").is_file():
        config = {"tokenizer_class": "LlamaTokenizer"}  # a bare SentencePiece model
    mapped = _read_config(folder / "special_tokens_map.json")
    defaults = _CLASS_TOKENS.get(str(config.get("tokenizer_class")).removesuffix("Fast"), {})
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name, mapped.get(name, defaults.get(name)))
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and exists(text):
            tokens[name] = text
        elif text and name == "bos_token":
            raise UserError(
                f"{folder}: the BOS token is not in tokenizer.json",
                found=f"bos_token {text!r}",
                expected="a token with an id",
                fix="correct bos_token in tokenizer_config.json",
            )
    if needs_bos and "bos_token" not in tokens:
        raise UserError(
            f"{folder}: the tokenizer has no BOS token, but every conversation starts with one",
            found="no bos_token in tokenizer_config.json or special_tokens_map.json",
            expected='an entry such as "bos_token": "<s>"',
            fix="set bos_token in tokenizer_config.json (for a base without BOS usually its end-of-text token)",
        )
    return tokens


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON", found=error, fix="copy it again from the model's folder"
        ) from None
    return value if isinstance(value, dict) else {}
