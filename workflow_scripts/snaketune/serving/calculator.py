"""An example plugin for a model to call: computes arithmetic, without evaluating code."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any

NAME = "calculator"
# Training data describe plugins like this, in a system message named `plugin` with a JSON list.
DESCRIPTION = {
    "name": NAME,
    "description": "Computes an arithmetic expression",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "such as (17 + 4) * 2 ** 3"}},
        "required": ["expression"],
    },
}
_LONGEST = 200  # characters
_LARGEST = 1e100  # operands and results
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def call(parameters: Any) -> str:
    """Runs the plugin and returns the result as text, or `error: ...` for the model to read.

    Args:
        parameters: The parameters that the model wrote: {"expression": "..."}.
    """
    expression = parameters.get("expression") if isinstance(parameters, dict) else None
    if not isinstance(expression, str):
        return 'error: expected {"expression": "..."}'
    try:
        return f"{compute(expression):.12g}"
    except (ValueError, ArithmeticError) as error:
        return f"error: {error}"


def compute(expression: str) -> float:
    """Computes an expression of numbers, + - * / // % ** and parentheses.

    Raises:
        ValueError: The expression has other parts, is too long, or a number is too large.
        ArithmeticError: A division by zero, for example.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an arithmetic expression") from None
    return _value(tree.body)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _checked(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and left and abs(right) * abs(math.log10(abs(left))) > 100:
            raise ValueError("too large")
        return _checked(_BINARY[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")


def _checked(value: float) -> float:
    if isinstance(value, complex):
        raise ValueError("not a real number")
    if not abs(value) <= _LARGEST:
        raise ValueError("too large")
    return value
