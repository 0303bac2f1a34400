"""Writes docs/models.md and docs/zh_cn/models.md: what the proof says of every model family that transformers has."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
from pathlib import Path

from snaketune.common.cli import UserError, run
from snaketune.common.files import read_json, write_json, write_text
from snaketune.preflight.model_families import Family

REPO = Path(__file__).resolve().parent.parent
PAGES = {"en": REPO / "docs" / "models.md", "zh": REPO / "docs" / "zh_cn" / "models.md"}
FAMILIES = REPO / "docs" / "models.json"
VLLM = REPO / "workflow_scripts" / "snaketune" / "serving" / "vllm_architectures.json"
_MARK = "<!-- table: make docs-models -->"
_AT_ONCE = 16  # families between two writings of the findings


def main() -> None:
    """Runs the proof over families, writes what it found to docs/models.json, and the tables of both pages from that."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--processes", type=int, default=2, help="families that run side by side (default: 2)"
    )
    parser.add_argument(
        "--python-4",
        type=Path,
        default=REPO / ".venv-turbomind" / "bin" / "python",
        help="a Python with transformers 4.57",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--families", nargs="+", help="run these model types alone; the rows of others stay")
    which.add_argument("--missing", action="store_true", help="run those that docs/models.json lacks")
    args = parser.parse_args()

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks of ZeRO-3 train on the CPU
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from sft import import_for_training
    from snaketune.preflight.model_families import describe_families

    import_for_training()  # once for all processes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = read_json(FAMILIES) if FAMILIES.is_file() else {}
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    names = args.families or [name for name in every if not (args.missing and name in found)]
    for first in range(0, len(names), _AT_ONCE):
        made = {
            "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "transformers": transformers.__version__,
        }
        for each in describe_families(names[first : first + _AT_ONCE], args.processes, args.python_4):
            found[each.name] = {**made, **dataclasses.asdict(each)}
        found = {name: found[name] for name in every if name in found}
        write_json(FAMILIES, found)
    if missing := [name for name in every if name not in found]:
        raise UserError(
            "the tables are not written: docs/models.json lacks families",
            found=", ".join(missing),
            fix="run this again with --missing",
        )
    for language, path in PAGES.items():
        write_text(path, page(path.read_text(encoding="utf-8"), found, language))
        print(f"wrote {path.relative_to(REPO)}")


def page(text: str, found: dict[str, dict], language: str) -> str:
    """Returns a page with its table made from the findings. The date is that of the oldest row."""
    families = [
        Family(**{key: value for key, value in each.items() if key not in ("made", "transformers")})
        for each in found.values()
    ]
    made = min(each["made"] for each in found.values())
    versions = ", ".join(sorted({each["transformers"] for each in found.values()}))
    note = {
        "en": f"{made}, transformers {versions}, CPU: {summary(families, language)}",
        "zh": f"{made}，transformers {versions}，CPU：{summary(families, language)}",
    }[language]
    return f"{text.partition(_MARK)[0]}{_MARK}\n\n{note}\n\n{table(families, language)}"


def summary(families: list[Family], language: str) -> str:
    """Returns the counts as a sentence."""
    causal = [each for each in families if each.reason != "tokens see later tokens"]
    packed = sum(each.packing == "best_fit" for each in causal)
    single = sum(each.packing == "single" for each in causal)
    rest = len(causal) - packed - single
    if language == "zh":
        return f"{len(causal)} 个因果语言模型家族中，{packed} 个可打包训练，{single} 个须逐文档训练（`packing.mode: single`），{rest} 个被拒绝。"
    return (
        f"of {len(causal)} families of causal language models, {packed} train in packed sequences, {single} with one document "
        f"a sequence (`packing.mode: single`), and {rest} are refused."
    )


def table(families: list[Family], language: str) -> str:
    """Returns the Markdown table, and a line that lists the families that are not causal."""
    words = {
        "en": {
            "head": "| Family | Packed training | LoRA | ZeRO-3 | `hf/` in transformers 4.57 | TurboMind | lmdeploy >= 0.10 | vLLM 0.33 |",
            "packed": "yes, `{}`",
            "single": "`single`, `{}`: {}",
            "refused": "refused: {}",
            "yes": "yes",
            "no": "no",
            "fails": "no: {}",
            "equal": "equal logits",
            "unknown": "unknown to it",
            "different": "**differs**",
            None: "",
            "aside": "Not causal language models, so refused: {}.",
        },
        "zh": {
            "head": "| 家族 | 打包训练 | LoRA | ZeRO-3 | transformers 4.57 读取 `hf/` | TurboMind | lmdeploy >= 0.10 | vLLM 0.33 |",
            "packed": "是，`{}`",
            "single": "`single`，`{}`：{}",
            "refused": "拒绝：{}",
            "yes": "是",
            "no": "否",
            "fails": "否：{}",
            "equal": "logits 相同",
            "unknown": "不认识",
            "different": "**不同**",
            None: "",
            "aside": "不是因果语言模型，因此被拒绝：{}。",
        },
    }[language]
    known = set(read_json(VLLM)["architectures"])
    lines = [words["head"], "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    aside = []
    for each in families:
        if each.reason == "tokens see later tokens":
            aside.append(each.name)
            continue
        reason = _cell(each.reason or "")
        if each.packing == "best_fit":
            packed = words["packed"].format(each.attention)
        elif each.packing == "single":
            packed = words["single"].format(each.attention, reason)
        else:
            packed = words["refused"].format(reason)
        zero_3 = words["no"] if each.zero_3 is None else words["fails"].format(_cell(each.zero_3))
        if each.zero_3 == "yes":
            zero_3 = words["yes"]
        vllm = f"`{each.architecture}`" if each.architecture in known else words["no"]
        flags = [words["yes"] if flag else words["no"] for flag in (each.lora, each.turbomind)]
        lines.append(
            f"| {each.name} | {packed} | {flags[0]} | {zero_3} | {words.get(each.transformers_4, each.transformers_4)} | {flags[1]} | {each.direct or words['no']} | {vllm} |"
        )
    text = "\n".join(lines) + "\n"
    return text + (f"\n{words['aside'].format(', '.join(aside))}\n" if aside else "")


def _cell(text: str) -> str:
    return re.sub(r"[|\n]", " ", text)[:160]


if __name__ == "__main__":
    run(main)
