"""Conversations with tool calls, with code and with text only, for the tests of evaluate_tool_calls."""

from __future__ import annotations

import json

WEATHER = {
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"name": "get_weather", "arguments": {"city": "Shanghai", "unit": "celsius", "days": [1, 2]}}


def system(*tools):
    return {"role": "system", "name": "plugin", "content": json.dumps(list(tools))}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def call(value):
    return {"role": "tool", "name": "plugin", "content": json.dumps(value)}


def result(text, name="plugin"):
    return {"role": "environment", "name": name, "content": text}


def weather_talk(number):
    city = f"city {number}"
    return [
        system(WEATHER, CLOCK),
        user(f"What is the weather in {city}?"),
        assistant("Let me look. ") if number % 2 else {"role": "thought", "content": "A tool. "},
        call({"name": "get_weather", "arguments": {"city": city, "days": [number]}}),
        result("sunny"),
        assistant(f"It is sunny in {city}."),
        user("And what time is it? Then the weather again."),
        call({"name": "clock", "arguments": {}}),
        call({"name": "get_weather", "arguments": {"city": city}}),
        result("12 and rainy"),
        assistant("It is 12, and it rains."),
    ]


def code_talk(number):
    return [
        {"role": "system", "name": "interpreter", "content": "You may run Python."},
        user(f"{number} * 7 等于多少？"),
        assistant(""),
        {"role": "tool", "name": "interpreter", "content": f"```python\nprint({number} * 7)\n```"},
        result(str(number * 7), "interpreter"),
        assistant(f"等于 {number * 7}。"),
    ]


def plain_talk(number):
    return [user(f"Hello, {number}!"), assistant("Hello! " * (1 + number % 3))]


DATASETS = {
    "weather_en": [weather_talk(number) for number in range(5)],
    "code": [code_talk(number) for number in range(4)],
    "plain": [plain_talk(number) for number in range(6)],
}
