"""What decides the bytes of tokenised files besides the conversations; in every record and manifest."""

from __future__ import annotations

import dataclasses
from typing import Any

from snaketune.chat_format.template_file import load_template, shipped_templates
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.tokenized.block_tokenizer import TokenizeOptions
from snaketune.tokenized.job_parts import TOKENIZED_FORMAT

# What becomes of bad lines is no reason to do again what has none.
_NO_BYTES = ("on_bad_sample", "max_bad_share")


def tokenize_identity(tokenizer: ExtendedTokenizer, options: TokenizeOptions) -> dict[str, Any]:
    """Returns the digests of tokenizer and template and the options that decide bytes, as JSON.

    A template file counts by its content, wherever it lies and whatever its name.
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
