"""Alpaca's format: `{"instruction", "input", "output", "system", "history"}`."""

from __future__ import annotations

from snaketune.ingest.fields import ConvertOptions, bad, list_of, text_of


def convert(row: dict, options: ConvertOptions) -> list[dict]:
    """Returns the row's conversation in ftdp. The input follows the instruction on a new line.

    Raises:
        MessageError: The row is not in the format.
    """
    result = []
    if row.get("system"):
        result.append({"role": "system", "content": text_of(row["system"], "system")})
    for index, pair in enumerate(list_of(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad(
                f"history[{index}]",
                pair,
                "a list of a question and its answer",
                "write it as [question, answer]",
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            result.append({"role": role, "content": text_of(text, f"history[{index}]")})
    question = text_of(row.get("instruction"), "instruction")
    if row.get("input"):
        given = text_of(row["input"], "input")
        question = f"{question}\n{given}" if question else given
    answer = text_of(row.get("output"), "output")
    return [*result, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
