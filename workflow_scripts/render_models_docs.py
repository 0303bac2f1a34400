"""Writes docs/models.md and docs/zh_cn/models.md: what the proof says of every model family that transformers has."""

from __future__ import annotations

import argparse
import datetime
import re
from pathlib import Path

from snaketune.common.cli import run
from snaketune.common.files import read_json, write_text

REPO = Path(__file__).resolve().parent.parent
PAGES = {"en": REPO / "docs" / "models.md", "zh": REPO / "docs" / "zh_cn" / "models.md"}
VLLM = REPO / "workflow_scripts" / "snaketune" / "serving" / "vllm_architectures.json"
_MARK = "<!-- table: make docs-models -->"


def main() -> None:
    """Runs the proof over all families, and replaces the tables of both pages."""
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
    parser.add_argument("--families", nargs="+", help="print these model types instead of writing the pages")
    args = parser.parse_args()

    import transformers

    from snaketune.preflight.model_families import describe_families

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    families = describe_families(args.families, args.processes, args.python_4)
    if args.families:
        print(table(families, "en"))
        return
    for language, path in PAGES.items():
        head = path.read_text(encoding="utf-8").partition(_MARK)[0]
        made = datetime.datetime.now(datetime.UTC).date().isoformat()
        note = {
            "en": f"{made}, transformers {transformers.__version__}, CPU: {summary(families, language)}",
            "zh": f"{made}，transformers {transformers.__version__}，CPU：{summary(families, language)}",
        }[language]
        write_text(path, f"{head}{_MARK}\n\n{note}\n\n{table(families, language)}")
        print(f"wrote {path.relative_to(REPO)}")


def summary(families: list, language: str) -> str:
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


def table(families: list, language: str) -> str:
    """Returns the Markdown table, and a line that lists the families that are not causal."""
    words = {
        "en": {
            "head": "| Family | Packed training | LoRA | `hf/` in transformers 4.57 | TurboMind | lmdeploy >= 0.10 | vLLM 0.33 |",
            "packed": "yes, `{}`",
            "single": "`single`, `{}`: {}",
            "refused": "refused: {}",
            "yes": "yes",
            "no": "no",
            "equal": "equal logits",
            "unknown": "unknown to it",
            "different": "**differs**",
            None: "",
            "aside": "Not causal language models, so refused: {}.",
        },
        "zh": {
            "head": "| 家族 | 打包训练 | LoRA | transformers 4.57 读取 `hf/` | TurboMind | lmdeploy >= 0.10 | vLLM 0.33 |",
            "packed": "是，`{}`",
            "single": "`single`，`{}`：{}",
            "refused": "拒绝：{}",
            "yes": "是",
            "no": "否",
            "equal": "logits 相同",
            "unknown": "不认识",
            "different": "**不同**",
            None: "",
            "aside": "不是因果语言模型，因此被拒绝：{}。",
        },
    }[language]
    known = set(read_json(VLLM)["architectures"])
    lines = [words["head"], "| --- | --- | --- | --- | --- | --- | --- |"]
    aside = []
    for each in families:
        if each.reason == "tokens see later tokens":
            aside.append(each.name)
            continue
        reason = re.sub(r"[|\n]", " ", each.reason or "")[:160]
        if each.packing == "best_fit":
            packed = words["packed"].format(each.attention)
        elif each.packing == "single":
            packed = words["single"].format(each.attention, reason)
        else:
            packed = words["refused"].format(reason)
        vllm = f"`{each.architecture}`" if each.architecture in known else words["no"]
        flags = [words["yes"] if flag else words["no"] for flag in (each.lora, each.turbomind)]
        lines.append(
            f"| {each.name} | {packed} | {flags[0]} | {words.get(each.transformers_4, each.transformers_4)} | {flags[1]} | {each.direct or words['no']} | {vllm} |"
        )
    text = "\n".join(lines) + "\n"
    return text + (f"\n{words['aside'].format(', '.join(aside))}\n" if aside else "")


if __name__ == "__main__":
    run(main)
