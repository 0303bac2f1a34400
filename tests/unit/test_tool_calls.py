"""Tool calls: an oracle that replays the reference is always right, and each kind of error is recognised."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tool_call_talks import CALL, CLOCK, DATASETS, WEATHER, assistant, call, code_talk, system, user

from export_models import extend_tokenizer
from snaketune.encoding.batch_encoder import BatchEncoder
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.evaluation.call_format import CallReader
from snaketune.evaluation.call_verdicts import STAGES, offered_tools, verdicts
from snaketune.evaluation.conversations import answer_turns, read_conversations
from snaketune.evaluation.languages import language_of
from snaketune.evaluation.tool_calls import answer_points, choose_points
from snaketune.reporting.tool_call_tables import METRICS, comparison_rows, summarize


@pytest.fixture(scope="module", params=["internlm2_chat", "chatml", "llama3", "mistral_instruct"])
def setting(request, tmp_path_factory, tiny_tokenizer_dir, write_processed):
    """(tokenizer, encoder, held-out folder), in each of the shipped templates."""
    root = tmp_path_factory.mktemp("calls")
    tokenizer = extend_tokenizer(tiny_tokenizer_dir, root / "tokenizer", request.param)
    return (
        tokenizer,
        BatchEncoder(tokenizer, ChatEncoding(mask="exact")),
        write_processed(root / "heldout", DATASETS),
    )


class Oracle:
    """A model that has memorised some texts: it continues the text that starts with its input.

    It stores its input in the cache, as keys of width one, so it forgets what the cache drops.
    """

    def __init__(self, texts, vocab_size):
        from transformers import LlamaConfig

        self.texts, self.size = texts, vocab_size
        self.config = LlamaConfig(num_hidden_layers=1)  # gives the number of cache layers
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        told, _ = past_key_values.update(*[input_ids[:, None, :, None].double()] * 2, 0)
        logits = torch.zeros((len(input_ids), 1, self.size))
        ids = told[:, 0, :, 0].long()
        seen = torch.ones_like(ids) if attention_mask is None else attention_mask
        for row in range(len(ids)):
            real = ids[row][seen[row].bool()].tolist()
            assert position_ids[row, -1] == len(real) - 1
            # A finished row stays in the batch until it is replaced; its text is unknown.
            text = next((text for text in self.texts if text[: len(real)] == real), real)
            logits[row, 0, [*text, 0][len(real)]] = 1.0
        return SimpleNamespace(logits=logits)

    __call__ = forward


def reference_ids(tokenizer, encoder, turns):
    """Returns the ids that training sees of a conversation's turns, up to the end of the last one."""
    pieces = encoder.encode_turns([turns])[0]
    ids = [token for piece in pieces for token in piece.ids]
    return ids[: len(ids) - ids[::-1].index(tokenizer.end_of_turn_id)]


def as_result(points, selection, **more):
    return {
        "points": points,
        "selection": selection,
        "losses": [],
        "plain_text": [],
        "heldout_sha256": "h",
        "tokenizer_sha256": "t",
        "max_new_tokens": 200,
        "max_length": 4096,
        "plain_text_sha256": None,
    } | more


def test_an_oracle_that_replays_the_reference_is_right_everywhere(setting):
    tokenizer, encoder, folder = setting
    conversations = read_conversations(folder, encoder)
    points, selection = choose_points(conversations, encoder, 1000, 4096)
    # Two turns with calls in each weather conversation, one in each with code.
    assert selection["call"] == {"available": 14, "tried": 14, "too_long": 0, "points": 14}
    assert selection["text"]["points"] == 5 * 2 + 4 + 6
    texts = [
        reference_ids(tokenizer, encoder, encoder.turns(point.conversation.messages[: point.answer.stop]))
        for point in points
    ]
    for place, (point, text) in enumerate(zip(points, texts, strict=True)):
        if text[: len(point.prompt)] != point.prompt:
            # This tokenizer splits the two line breaks of llama3's prefix differently before text than at the
            # end. No model can continue the prompt as trained, so the oracle returns the answer encoded by
            # itself.
            assert tokenizer.template.name == "llama3"
            turn = point.conversation.turns[point.answer.turn]
            bos, *answer = reference_ids(tokenizer, encoder, [turn._replace(prefix="")])
            assert bos == tokenizer.bos_token_id
            texts[place] = point.prompt + answer
    answers = answer_points(Oracle(texts, tokenizer.vocab_size), points, tokenizer, 400)
    rows = summarize(as_result(answers, selection))
    assert {row["metric"] for row in rows} == set(METRICS)
    assert {(row["scope"], row["name"]) for row in rows} == {
        ("all", ""),
        *(("dataset", name) for name in DATASETS),
        *(("language", name) for name in ("en", "zh", "latin")),
    }
    for row in rows:
        if row["name"] in ("plain", "latin"):
            # No calls made or expected: the denominator is 0.
            assert row["value"] == (1.0 if row["metric"] == "stopped" else None)
        elif row["metric"] == "argument_f1" and row["name"] in ("code", "zh"):
            assert row["value"] is None
        else:
            assert row["value"] == row["low"] == row["high"] == 1.0, row
    texts_of = {answer["point"]: answer["prediction"] for answer in answers}
    assert any("clock" in text and "get_weather" in text for text in texts_of.values())


def broken(reader_tokenizer, text):
    """Encodes an answer written with control tokens."""
    return reader_tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


BEGIN, END = "<|action_start|><|plugin|>\n", "<|action_end|>\n"
GOOD = json.dumps(CALL)


def changed(**arguments):
    return json.dumps({"name": "get_weather", "arguments": CALL["arguments"] | arguments})


@pytest.mark.parametrize(
    ("answer", "failed", "exact", "name", "f1"),
    [
        (f"Let me look.{BEGIN}{GOOD}{END}", None, True, True, 1.0),
        (f"{BEGIN}{json.dumps(CALL, indent=4, sort_keys=True)}{END}", None, True, True, 1.0),
        (BEGIN + changed(days=[1.0, 2]) + END, None, True, True, 1.0),
        # A different value, one extra value (of 4 leaves and 5), one missing.
        (BEGIN + changed(city="Beijing") + END, None, False, True, 3 / 4),
        (BEGIN + changed(days=[1, 2, 3]) + END, None, False, True, 8 / 9),
        (BEGIN + json.dumps({"name": "get_weather", "arguments": {"city": "Shanghai"}}) + END, None, False, True, 2 / 5),
        # A key that the reference does not use: a different call with the same arguments.
        (BEGIN + GOOD.replace("arguments", "parameters") + END, None, False, True, 1.0),
        (BEGIN + json.dumps({"name": "clock", "arguments": {}}) + END, None, False, False, 0.0),
        # Control tokens.
        (f"{BEGIN}{GOOD}", "control_tokens", False, True, 1.0),
        (f"<|action_start|>{GOOD}{END}", "control_tokens", False, False, 1.0),
        (f"<|action_start|><|interpreter|>\n{GOOD}{END}", "tool", False, False, 0.0),
        (f"<|action_end|>{BEGIN}{GOOD}{END}", "control_tokens", False, True, 1.0),
        (f"{BEGIN}{GOOD}{END}Done.", "control_tokens", False, True, 1.0),
        (f"{BEGIN}{GOOD}<|im_start|>{END}", "control_tokens", False, False, 0.0),
        # JSON.
        (BEGIN + GOOD[:-1] + END, "json", False, False, 0.0),
        (BEGIN + GOOD.replace('"', "'") + END, "json", False, False, 0.0),
        (BEGIN + GOOD.replace("1,", "NaN,") + END, "json", False, False, 0.0),
        (f"{BEGIN}[{GOOD}]{END}", "json", False, False, 0.0),
        (BEGIN + json.dumps({"name": "get_weather", "arguments": ["Shanghai"]}) + END, "json", False, False, 0.0),
        (BEGIN + json.dumps({"arguments": {"city": "Shanghai"}}) + END, "json", False, False, 0.0),
        (BEGIN + "[" * 5000 + END, "json", False, False, 0.0),
        # A tool that is not offered; arguments that violate the schema.
        (BEGIN + GOOD.replace("get_weather", "get_whether") + END, "tool", False, False, 0.0),
        (BEGIN + changed(unit="kelvin") + END, "arguments", False, True, 3 / 4),
        (BEGIN + changed(days=["1", 2]) + END, "arguments", False, True, 3 / 4),
        (BEGIN + json.dumps({"name": "get_weather"}) + END, "arguments", False, True, 0.0),
        # Two calls instead of one; the first is correct.
        (f"{BEGIN}{GOOD}{END}{BEGIN}{GOOD}{END}", None, False, False, 2 / 3),
        # No call: text that spells out control tokens contains no control tokens.
        ("It is sunny.", "no call", False, False, 0.0),
        ("It is sunny.<|action_end|>", "no call", False, False, 0.0),
    ],
)  # fmt: skip
def test_broken_calls_are_told_apart(internlm2, answer, failed, exact, name, f1):
    tokenizer, reader = internlm2
    messages = [system(WEATHER, CLOCK), user("weather?"), call(CALL)]
    _, references = reader.read(broken(tokenizer, f"{BEGIN}{GOOD}{END}"))
    _, calls = reader.read(broken(tokenizer, answer))
    verdict = verdicts(calls, references, offered_tools(messages, 2), True)
    assert verdict["called"] == (failed != "no call")
    assert verdict.get("failed", "no call") == failed, verdict.get("problem")
    assert (verdict["exact"], verdict["name"]) == (exact, name)
    assert verdict["argument_f1"] == pytest.approx(f1)
    assert verdict["reference_failed"] is None
    assert failed in (None, "no call", *STAGES)


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory, tiny_tokenizer_dir):
    tokenizer = extend_tokenizer(tiny_tokenizer_dir, tmp_path_factory.mktemp("t") / "tokenizer")
    return tokenizer, CallReader(tokenizer)


def test_text_that_spells_control_tokens_is_no_call(internlm2):
    from snaketune.encoding.control_tokens import literal_tokenizer

    tokenizer, reader = internlm2
    literal = literal_tokenizer(tokenizer, tokenizer.template.special_tokens).tokenizer
    ids = literal.encode(f"{BEGIN}{GOOD}{END}", add_special_tokens=False).ids
    text, calls = reader.read(ids)
    assert calls == [] and text == f"{BEGIN}{GOOD}{END}"


@pytest.mark.parametrize(
    ("body", "failed"),
    [
        ("```python\nprint(1)\n```", None),
        ("print(1)", None),
        ("```python\nprint(1\n```", "json"),
        ("```python\n\n```", "json"),
        ("```bash\nls -l | wc\n```", None),
    ],
)
def test_code_is_parsed_and_compared_as_text(internlm2, body, failed):
    tokenizer, reader = internlm2
    messages = code_talk(1)
    prefix = "<|action_start|><|interpreter|>\n"
    _, references = reader.read(broken(tokenizer, f"{prefix}print(1){END}"))
    _, calls = reader.read(broken(tokenizer, f"{prefix}{body}{END}"))
    verdict = verdicts(calls, references, offered_tools(messages, 2), True)
    assert verdict["failed"] == failed
    assert verdict["exact"] == (body == "print(1)")
    assert verdict["name"] is True and verdict["argument_f1"] is None


@pytest.mark.parametrize(
    ("tools", "called", "failed"),
    [
        # The conversation calls tools but does not list any: every name is accepted.
        (None, True, None),
        (None, False, "tool"),
        ("search(query): finds pages", True, None),
        ([{"name": "get_weather"}], True, None),
        # A schema in an unknown dialect, or with an external reference: the arguments are not checked.
        ([{"name": "get_weather", "parameters": {"type": "dict"}}], True, None),
        ([{"name": "get_weather", "parameters": {"$ref": "http://localhost:9/x.json"}}], True, None),
        ([{"name": "get_weather", "parameters": {"required": ["country"]}}], True, "arguments"),
    ],
)
def test_what_is_not_known_is_not_held_against_a_call(internlm2, tools, called, failed):
    tokenizer, reader = internlm2
    content = tools if isinstance(tools, str) else json.dumps(tools)
    before = [{"role": "system", "name": "plugin", "content": content}] if tools else []
    messages = [*before, user("weather?"), call(CALL) if called else assistant("Sunny.")]
    _, calls = reader.read(broken(tokenizer, f"{BEGIN}{GOOD}{END}"))
    verdict = verdicts(calls, [], offered_tools(messages, len(before) + 1), True)
    assert verdict["failed"] == failed


def test_answers_are_the_turns_that_the_template_makes(setting):
    tokenizer, encoder, folder = setting
    for conversation in read_conversations(folder, encoder):
        prefixes = [
            conversation.turns[answer.turn].prefix
            for answer in answer_turns(conversation.messages, encoder.template)
        ]
        assert set(prefixes) == {encoder.template.roles["assistant"].prefix}
        wanted = sum(
            message["role"] == "assistant"
            or before["role"] == "user"
            and message["role"] in ("tool", "thought")
            for before, message in zip(conversation.messages, conversation.messages[1:], strict=False)
        )
        assert len(prefixes) == wanted


def test_the_choice_of_points_depends_on_content_alone(tmp_path, setting, write_processed):
    tokenizer, encoder, folder = setting
    chosen = {}
    for name, datasets in (
        ("same", DATASETS),
        ("turned", {name: talks[::-1] for name, talks in reversed(DATASETS.items())}),
    ):
        made = write_processed(tmp_path / name, datasets)
        points, selection = choose_points(read_conversations(made, encoder), encoder, 10, 4096)
        assert [selection[kind]["points"] for kind in ("call", "text")] == [5, 5]
        chosen[name] = {(point.conversation.sha256, point.answer.start) for point in points}
    assert chosen["same"] == chosen["turned"]
    more, _ = choose_points(read_conversations(folder, encoder), encoder, 20, 4096)
    assert chosen["same"] < {(point.conversation.sha256, point.answer.start) for point in more}
    # If one kind has too few, the other fills in.
    many, selection = choose_points(read_conversations(folder, encoder), encoder, 33, 4096)
    assert len(many) == 33 and selection["call"]["points"] == 14
    # Points that are too long are skipped and counted.
    limit = sorted(len(point.prompt) for point in more)[8]
    short, selection = choose_points(read_conversations(folder, encoder), encoder, 1000, limit)
    assert all(len(point.prompt) <= limit for point in short)
    assert sum(each["too_long"] for each in selection.values()) == 34 - len(short) > 0


def test_an_answer_that_is_not_trained_on_is_no_point(tmp_path, setting, write_processed):
    tokenizer, encoder, _ = setting
    talk = [user("Hello"), assistant("Hello!") | {"loss": False}, user("Hello?"), assistant("Hello!")]
    conversations = read_conversations(write_processed(tmp_path, {"d": [talk]}), encoder)
    points, _ = choose_points(conversations, encoder, 10, 4096)
    assert [point.answer.start for point in points] == [3]


def test_precision_is_that_of_all_points_when_one_kind_is_chosen_more_often():
    def point(number, kind, called):
        verdict = {"called": called, "stopped": True, "failed": None}
        verdict |= {"exact": called, "name": called, "argument_f1": float(called), "reference_failed": None}
        return {
            "point": f"f:{number}#1",
            "dataset": "d",
            "language": "en",
            "kind": kind,
            "verdicts": verdict,
        }

    # 10 points call, 90 do not. All 10 and 10 of the 90 are evaluated; the model calls at 8 and 1 of them.
    points = [point(number, "call", number < 8) for number in range(10)]
    points += [point(number, "text", number == 10) for number in range(10, 20)]
    selection = {
        "call": {"available": 10, "tried": 10, "too_long": 0, "points": 10},
        "text": {"available": 90, "tried": 10, "too_long": 0, "points": 10},
    }
    rows = {row["metric"]: row for row in summarize(as_result(points, selection)) if row["scope"] == "all"}
    assert rows["recall"]["value"] == pytest.approx(0.8)
    assert rows["precision"]["value"] == pytest.approx(8 / (8 + 9))
    assert rows["f1"]["value"] == pytest.approx(2 * 8 / (10 + 17))
    assert rows["exact"]["value"] == pytest.approx(0.8) and rows["exact"]["count"] == 10
    assert rows["recall"]["low"] < 0.8 < rows["recall"]["high"]
    silent = [each | {"verdicts": each["verdicts"] | {"called": False, "exact": False}} for each in points]
    by_metric = {
        row["metric"]: row
        for row in comparison_rows(as_result(silent, selection), as_result(points, selection))
        if row["scope"] == "all"
    }
    assert by_metric["recall"]["difference"] == by_metric["recall"]["tuned"]
    assert by_metric["recall"]["base"] == (0.0, 0.0, 0.0)
    assert by_metric["precision"]["base"] == (None, None, None)
    assert by_metric["precision"]["difference"] == (None, None, None)


def test_a_comparison_of_different_points_is_refused():
    from snaketune.common.cli import UserError

    selection = {kind: {"available": 0, "tried": 0, "too_long": 0, "points": 0} for kind in ("call", "text")}
    one = as_result([], selection)
    assert comparison_rows(one, one) == []
    with pytest.raises(UserError, match="max_new_tokens differs"):
        comparison_rows(one, one | {"max_new_tokens": 3})


@pytest.mark.parametrize(
    ("dataset", "text", "language"),
    [
        ("glaive_toolcall_zh", "Hello", "zh"),
        ("chat-CN-v2", "Hello", "zh"),
        ("tools.en", "你好", "en"),
        ("endless", "你好，请问 Python 的 print 函数怎么用？", "zh"),
        ("mixed", "What does 你好 mean, and how do Chinese people say it?", "latin"),
        ("mixed", "東京の天気を教えてください", "ja"),
        ("mixed", "서울 날씨", "ko"),
        ("mixed", "Какая погода?", "cyrillic"),
        ("mixed", "12 * 7?", "other"),
    ],
)
def test_language_comes_from_the_name_or_the_script(dataset, text, language):
    assert language_of(dataset, text) == language
