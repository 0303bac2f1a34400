"""The report's words in English and Chinese. The page holds both, and shows one: a switch without any script."""

from __future__ import annotations

from markupsafe import Markup, escape

Words = tuple[str, str]

METRICS: dict[str, Words] = {
    "recall": ("calls where the reference calls (recall)", "参考调用处也调用（召回率）"),
    "precision": ("reference calls where the model does (precision)", "模型调用处参考也调用（精确率）"),
    "f1": ("F1 of calling or not", "是否调用的 F1"),
    "control_tokens": ("calls with control tokens in order", "控制 token 顺序正确的调用"),
    "json": ("calls whose JSON parses too", "且 JSON 可解析"),
    "tool_offered": ("calls of a tool that is offered", "且所调用的工具在列"),
    "well_formed": ("well-formed calls: arguments fit the schema", "格式正确的调用：参数符合 schema"),
    "name": ("right tool where the reference calls", "参考调用处工具正确"),
    "exact": ("exactly the reference's call", "与参考调用完全一致"),
    "argument_f1": ("F1 of the arguments", "参数的 F1"),
    "stopped": ("answers that end by themselves", "自行结束的回答"),
    "reference_well_formed": ("reference calls that are well formed", "参考调用中格式正确的"),
}
ROLES: dict[str, Words] = {
    "all": ("all trained tokens", "全部参与训练的 token"),
    "assistant": ("text", "文本"),
    "thought": ("thought", "思考"),
    "call": ("tool calls", "工具调用"),
    "code": ("code for the interpreter", "解释器代码"),
    "unclear": ("tokens across the boundary of two messages", "跨两条消息边界的 token"),
    "plain_text": ("plain text", "纯文本"),
}
STAGES: dict[str, Words] = {
    "control_tokens": ("control tokens", "控制 token"),
    "json": ("JSON", "JSON"),
    "tool": ("the tool is not offered", "工具不在列"),
    "arguments": ("arguments do not fit the schema", "参数不符合 schema"),
}
EVALUATIONS: dict[str, Words] = {
    "heldout": ("the held-out loss", "留出 loss"),
    "tool_calls": ("the evaluation of tool calls", "工具调用评测"),
}
# Figures of checkpoints, with what stands beside the axis; the others are shares.
CHECKPOINT_FIGURES: dict[str, str] = {
    "loss": "held-out loss (nats per token)",
    "loss.call": "loss of tool calls (nats per token)",
    "recall": "recall",
    "precision": "precision",
    "f1": "F1 of calling",
    "well_formed": "well-formed calls",
    "exact": "exact calls",
    "name": "right tool",
    "argument_f1": "F1 of the arguments",
    "stopped": "answers that end",
}
# What stands in the plots.
LABELS: dict[str, str] = {
    "loss (nats per token)": "loss（nats/token）",
    "learning rate": "学习率",
    "optimizer step": "优化器步",
    "gradient norm": "梯度范数",
    "tokens per second": "token/秒",
    "tokens": "token",
    "held-out": "留出",
    "held-out loss (nats per token)": "留出 loss（nats/token）",
    "loss of tool calls (nats per token)": "工具调用 loss（nats/token）",
    "best": "最佳",
    "recall": "召回率",
    "precision": "精确率",
    "F1 of calling": "是否调用的 F1",
    "well-formed calls": "格式正确的调用",
    "exact calls": "完全一致的调用",
    "right tool": "工具正确",
    "F1 of the arguments": "参数的 F1",
    "answers that end": "自行结束的回答",
    "conversations": "对话数",
}


def translated(english: str, chinese: str, *values: object) -> Markup:
    """Returns both wordings as HTML, `{}` or `{0}` filled with the values; values are escaped."""
    both = (Markup(escape(words)).format(*values) for words in (english, chinese))  # noqa: S704 - escaped
    return Markup('<span lang="en">{}</span><span lang="zh">{}</span>').format(*both)


def translated_labels(svg: str) -> str:
    """Returns a plot whose labels are there in both languages."""
    for english, chinese in LABELS.items():
        both = f'<tspan lang="en">{english}</tspan><tspan lang="zh">{chinese}</tspan>'
        svg = svg.replace(f">{english}</text>", f">{both}</text>")
    return svg
