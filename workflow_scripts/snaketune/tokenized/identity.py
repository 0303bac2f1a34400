"""The identity of a tokenisation: everything besides the data that decides the bytes of tokenised files.

Every record and manifest contains it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from snaketune.chat_format.template_file import load_template, shipped_templates
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.job_parts import TOKENIZED_FORMAT

# Handling of bad lines: changing it must not redo files without bad lines.
_NO_BYTES = ("on_bad_sample", "max_bad_share")


def tokenize_identity(tokenizer: ExtendedTokenizer, options: TokenizeOptions) -> dict[str, Any]:
    """Returns the digests of tokenizer and template and the options that decide bytes, as JSON.

    A template file is identified by its content, not by its path.
    """
    values = {key: value for key, value in dataclasses.asdict(options).items() if key not in _NO_BYTES}
    template = load_template(options.template)
    if options.template not in shipped_templates():
        values["template"] = f"file {template.sha256[:12]}"
    return {
        "format": TOKENIZED_FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "template_sha256": template.sha256,
        "options": values,
    }
