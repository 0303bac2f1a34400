"""The tables of docs/models.md, made from what the proof found."""

from __future__ import annotations

import dataclasses

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from render_models_docs import FAMILIES, PAGES, page
from snaketune.common.files import read_json
from snaketune.preflight.model_families import Family

LLAMA = Family(
    "llama", "LlamaForCausalLM", "packed", "best_fit", None, True, "yes", "equal", True, "TurboMind"
)
FOUND = [
    LLAMA,
    dataclasses.replace(LLAMA, name="hangs", zero_3="hangs: the ranks wait | for each other"),
    Family("odd", "Odd", None, None, "KeyError: 'x'", False, None, None, False, None),
    Family("bert", "Bert", None, None, "tokens see later tokens", False, None, None, False, None),
]


@pytest.mark.parametrize(
    ("language", "cells"),
    [
        ("en", {"llama": "yes", "hangs": "no: hangs: the ranks wait   for each other", "odd": "no"}),
        ("zh", {"llama": "是", "hangs": "否：hangs: the ranks wait   for each other", "odd": "否"}),
    ],
)
def test_the_table_says_what_zero_3_does(language, cells):
    dates = ("2026-11-29", "2026-11-27", "2026-11-28", "2026-11-28")
    found = {
        each.name: {"made": made, "transformers": "5.23.0", **dataclasses.asdict(each)}
        for each, made in zip(FOUND, dates, strict=True)
    }
    text = page("# Title\n\n<!-- table: make docs-models -->\n\nold", found, language)
    assert text.startswith("# Title\n\n<!-- table: make docs-models -->\n\n2026-11-27") and "old" not in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    column = rows[0].index("ZeRO-3")
    assert {row[0]: row[column] for row in rows[2:]} == cells
    assert len({len(row) for row in rows}) == 1 and rows[1] == ["---"] * len(rows[0])
    assert text.endswith(("bert.\n", "bert。\n"))


@pytest.mark.parametrize("language", PAGES)
def test_the_pages_have_the_findings_of_every_family(language):
    found = read_json(FAMILIES)
    assert list(found) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "run make docs-models"
    text = PAGES[language].read_text(encoding="utf-8")
    assert page(text, found, language) == text, "run make docs-models"
