"""Chat with a tuned model: calls are run and sent back in training's format; the calculator does not run code."""

from __future__ import annotations

import io

import pytest
import torch

from export_models import write_tuned
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.prompt_ids import encode_prompt
from snaketune.serving import calculator
from snaketune.serving.conversation import Conversation

pytestmark = pytest.mark.slow

CALL = 'I compute it.\n<|action_start|><|plugin|>\n{"name": "calculator", "parameters": {"expression": "12 * (3 + 4)"}}'
CALL += "<|action_end|>\n"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_tokenizer_dir, tiny_model_dir):
    """(tokenizer, Hugging Face folder) of a tuned model."""
    _, tokenizer, hf = write_tuned(tiny_model_dir, tiny_tokenizer_dir, tmp_path_factory.mktemp("chat"))
    return tokenizer, hf


def conversation(tokenizer, replies):
    """A conversation with fixed answers, or answers made from the messages."""
    replies, shown = iter(replies), []

    def answer(messages):
        reply = next(replies)
        text = reply(messages) if callable(reply) else reply
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

    plugins = {calculator.NAME: calculator.call}
    return Conversation(tokenizer, answer, plugins, [calculator.DESCRIPTION], show=shown.append), shown


def test_a_call_is_computed_and_its_result_comes_back_as_in_training(tuned):
    tokenizer, _ = tuned
    talk, shown = conversation(tokenizer, [CALL, lambda messages: f"It is {messages[-1]['content']}."])
    assert talk.say("What is 12 * (3 + 4)?") == "It is 84."
    assert shown == ["[plugin: 84]"]
    roles = [(message["role"], message.get("name")) for message in talk.messages]
    assert roles == [
        ("system", "plugin"),
        ("user", None),
        ("assistant", None),
        ("tool", "plugin"),
        ("environment", "plugin"),
        ("assistant", None),
    ]
    # The model's next prompt starts with its previous prompt and answer, id for id.
    prompt = encode_prompt(talk.messages[:2], tokenizer, ChatEncoding(), max_length=None)
    written = tokenizer.tokenizer.encode(CALL, add_special_tokens=False).ids
    assert (
        encode_prompt(talk.messages[:5], tokenizer, ChatEncoding(), max_length=None)[: len(prompt + written)]
        == prompt + written
    )


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("<|action_start|><|interpreter|>\nprint(1)<|action_end|>", "code is not run here"),
        ('<|action_start|><|plugin|>\n{"name": "shell"}<|action_end|>', "unknown plugin 'shell'"),
        ("<|action_start|><|plugin|>\n{not json<|action_end|>", "the call is not JSON"),
        ('<|action_start|><|plugin|>\n{"name": "calculator"}', "the call is not closed"),
    ],
)
def test_the_model_is_told_what_was_wrong_with_a_call(tuned, call, result):
    talk, _ = conversation(tuned[0], [call, "I see."])
    assert talk.say("Go on") == "I see."
    assert result in talk.messages[-2]["content"]


def test_calls_without_end_are_ended(tuned):
    talk, shown = conversation(tuned[0], [CALL] * 20)
    assert talk.say("Go on") == "" and len(shown) == 8


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2 + 3 * 4", "14"),
        ("-(7 - 2) ** 2 / 4", "-6.25"),
        ("17 // 5 + 17 % 5", "5"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 0", "error: division by zero"),
        ("__import__('os').getcwd()", "error: only numbers"),
        ("9 ** 9 ** 9", "error: too large"),
        ("(-8) ** 0.5", "error: not a real number"),
        ("True + 1", "error: only numbers"),
        ("1 +", "error: not an arithmetic expression"),
        ("(" * 150 + "1" + ")" * 150, "error: longer than"),
    ],
)
def test_the_calculator_computes_and_runs_no_code(expression, result):
    assert calculator.call({"expression": expression}).startswith(result)


def test_tokens_are_printed_as_they_come_and_characters_whole(tuned):
    from snaketune.serving.streaming import TokenPrinter

    tokenizer, _ = tuned
    ids = tokenizer.tokenizer.encode("é 🙂 ok", add_special_tokens=False).ids
    stream = io.StringIO()
    printer = TokenPrinter(tokenizer, stream)
    printer.put(torch.tensor([[1, 2, 3]]))
    seen = []
    for token in [*ids, tokenizer.end_of_turn_id]:
        printer.put(torch.tensor([token]))
        seen.append(stream.getvalue())
    printer.end()
    assert stream.getvalue() == "é 🙂 ok\n" and "\ufffd" not in "".join(seen)
    assert len(set(seen)) > 3 and all(
        later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False)
    )


def test_chat_in_the_terminal(tuned, run_script):
    done = run_script("chat.py", tuned[1], "--max-new-tokens", 5, "--system", "Be brief.", input="Hello\n\n")
    assert done.stdout.strip() and not done.stderr.count("Traceback")
