"""The report's text in English and Chinese. The page contains both; switching needs no script."""

from __future__ import annotations

from markupsafe import Markup, escape

Words = tuple[str, str]

METRICS: dict[str, Words] = {
    "recall": ("calls where the reference calls (recall)", "参考调用处也调用（召回率）"),
    "precision": ("calls that the reference makes too (precision)", "模型调用处参考也调用（精确率）"),
    "f1": ("F1 of calling", "是否调用的 F1"),
    "control_tokens": ("calls with correct control tokens", "控制 token 正确的调用"),
    "json": ("calls whose JSON also parses", "且 JSON 可解析"),
    "tool_offered": ("calls that also name an offered tool", "且所调用的工具已提供"),
    "well_formed": ("well-formed calls: arguments match the schema", "格式正确的调用：参数符合 schema"),
    "name": ("correct tool where the reference calls", "参考调用处工具正确"),
    "exact": ("calls identical to the reference", "与参考完全一致的调用"),
    "argument_f1": ("F1 of the arguments", "参数的 F1"),
    "stopped": ("answers that end on their own", "自行结束的回答"),
    "reference_well_formed": ("well-formed calls in the reference", "参考中格式正确的调用"),
}
ROLES: dict[str, Words] = {
    "all": ("all trained tokens", "全部参与训练的 token"),
    "assistant": ("text", "文本"),
    "thought": ("thought", "思考"),
    "call": ("tool calls", "工具调用"),
    "code": ("interpreter code", "解释器代码"),
    "unclear": ("tokens that span two messages", "跨两条消息的 token"),
    "plain_text": ("plain text", "纯文本"),
}
STAGES: dict[str, Words] = {
    "control_tokens": ("control tokens", "控制 token"),
    "json": ("JSON", "JSON"),
    "tool": ("tool not offered", "未提供该工具"),
    "arguments": ("arguments do not match the schema", "参数不符合 schema"),
}
EVALUATIONS: dict[str, Words] = {
    "heldout": ("held-out loss", "留出 loss"),
    "tool_calls": ("tool calls", "工具调用评测"),
}
# Figures of checkpoints and their axis labels. Figures without a unit are shares.
CHECKPOINT_FIGURES: dict[str, str] = {
    "loss": "held-out loss (nats per token)",
    "loss.call": "loss of tool calls (nats per token)",
    "recall": "recall",
    "precision": "precision",
    "f1": "F1 of calling",
    "well_formed": "well-formed calls",
    "exact": "exact calls",
    "name": "correct tool",
    "argument_f1": "F1 of the arguments",
    "stopped": "answers that end",
}
# Labels in the plots.
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
    "correct tool": "工具正确",
    "F1 of the arguments": "参数的 F1",
    "answers that end": "自行结束的回答",
    "conversations": "对话数",
}


def translated(english: str, chinese: str, *values: object) -> Markup:
    """Returns both texts as HTML, with `{}` or `{0}` replaced by the escaped values."""
    both = (Markup(escape(words)).format(*values) for words in (english, chinese))  # noqa: S704 - escaped
    return Markup('<span lang="en">{}</span><span lang="zh">{}</span>').format(*both)


def translated_labels(svg: str) -> str:
    """Returns a plot with its labels in both languages."""
    for english, chinese in LABELS.items():
        both = f'<tspan lang="en">{english}</tspan><tspan lang="zh">{chinese}</tspan>'
        svg = svg.replace(f">{english}</text>", f">{both}</text>")
    return svg
