"""Guesses the language of a dataset or conversation, well enough to report results by language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# Parts of a dataset's name that denote a language, and its code in the results.
_CODES = {
    **{code: code for code in ("ar", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt")},
    **{code: code for code in ("ru", "th", "tr", "uk", "vi", "zh")},
    "cn": "zh",
    "jp": "ja",
    "kr": "ko",
}
_SCRIPTS = {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko"}
# A Chinese text about "USD" and "Python" is still Chinese: a Han character carries as much as several
# letters.
_HAN_SHARE = 0.15
_KANA_SHARE = 0.05


def language_of(dataset: str, text: str) -> str:
    """Returns a language code, or a script's name if the script does not identify the language.

    Uses the last part of the dataset's name that is a language code (`glaive_toolcall_zh`, `chat-cn`), else
    the script of the text: Han is `zh`, kana `ja`, Hangul `ko`. Any other script is shared by many languages,
    so its name is returned in lower case (`latin`, `cyrillic`). A text without letters is `other`.

    Args:
        dataset: Name of the dataset folder.
        text: The user's messages.
    """
    for part in reversed(re.split(r"[^A-Za-z]+", dataset)):
        if part.lower() in _CODES:
            return _CODES[part.lower()]
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    letters = scripts.total()
    if not letters:
        return "other"
    if scripts["HIRAGANA"] + scripts["KATAKANA"] >= _KANA_SHARE * letters:
        return "ja"
    if scripts["CJK"] >= _HAN_SHARE * letters:
        return "zh"
    most = scripts.most_common(1)[0][0]
    return _SCRIPTS.get(most, most.lower())
