"""The language of a dataset or a conversation, well enough to keep results of two languages apart."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# Endings (or parts) of a dataset's name that say a language, and the code that results call it.
_CODES = {
    **{code: code for code in ("ar", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt")},
    **{code: code for code in ("ru", "th", "tr", "uk", "vi", "zh")},
    "cn": "zh",
    "jp": "ja",
    "kr": "ko",
}
_SCRIPTS = {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko"}
# A Chinese text about "USD" and "Python" is Chinese: one Han character says as much as several letters.
_HAN_SHARE = 0.15
_KANA_SHARE = 0.05


def language_of(dataset: str, text: str) -> str:
    """Returns a language code, or the name of a script where the script does not tell the language.

    The last part of the dataset's name that is a language code decides (`glaive_toolcall_zh`, `chat-cn`). Without one
    the script of the text does: Han is `zh`, kana `ja`, Hangul `ko`; every other script gives its own name in lower
    case (`latin`, `cyrillic`), since many languages are written in it. A text without letters is `other`.

    Args:
        dataset: Name of the dataset folder.
        text: What the user says in the conversation.
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
