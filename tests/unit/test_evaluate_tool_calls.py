"""Runs a tiny real model end to end through the script, and compares losses by role with a plain loop."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tool_call_talks import DATASETS

from export_models import write_tuned
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json

pytestmark = pytest.mark.slow

TEXT = "The quick brown fox jumps over the lazy dog. <|im_end|> It was a sunny day in Shanghai.\n" * 40


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_tokenizer_dir, tiny_model_dir, write_processed):
    """(tokenizer folder, tokenizer, folder of a tuned model, held-out folder)."""
    root = tmp_path_factory.mktemp("evaluate")
    tuned = write_tuned(tiny_model_dir, tiny_tokenizer_dir, root)
    return *tuned, write_processed(root / "heldout", DATASETS)


@pytest.fixture(scope="module")
def model(setting):
    from snaketune.evaluation.models import load_for_evaluation

    tokenizer_dir, tokenizer, hf, _ = setting
    return load_for_evaluation(str(hf), str(tokenizer_dir), tokenizer, dtype="float32")


@torch.no_grad()
def losses_of(model, ids):
    """Returns the nats of each id except the first, from one plain call."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(dim=-1)
    return [-logits[place, token].item() for place, token in enumerate(ids[1:])]


def by_hand(tokenizer, messages):
    """Returns (ids, role of each id or None), encoded piece by piece and split at control tokens."""
    ids, roles = [tokenizer.bos_token_id], [None]

    def add(text, role):
        new = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(new)
        roles.extend([role] * len(new))

    mine = ("assistant", "thought", "tool")
    role = None
    for index, message in enumerate(messages):
        name = f"<|{message['name']}|>" if "name" in message else None
        before = messages[index - 1]["role"] if index else None
        if message["role"] in mine:
            if before not in mine:
                add("<|im_start|>assistant\n", None)
            role = message["role"]
            if role == "tool":
                role = "code" if message["name"] == "interpreter" else "call"
                add(f"<|action_start|>{name}\n{message['content']}<|action_end|>\n", role)
            else:
                add(message["content"], role)
            after = messages[index + 1]["role"] if index + 1 < len(messages) else None
            if after not in mine:
                add("<|im_end|>\n", role)
        else:
            named = f" name={name}" if name else ""
            add(f"<|im_start|>{message['role']}{named}\n", None)
            add(message["content"], None)
            add("<|im_end|>\n", None)
    return ids, roles


@pytest.mark.parametrize("mask", ["compat", "exact"])
def test_losses_by_role_equal_a_plain_loop(setting, model, mask):
    from snaketune.encoding.batch_encoder import BatchEncoder
    from snaketune.encoding.chat_encoding import ChatEncoding
    from snaketune.evaluation.conversations import read_conversations
    from snaketune.evaluation.role_losses import conversation_losses

    _, tokenizer, _, folder = setting
    encoder, exact = (BatchEncoder(tokenizer, ChatEncoding(mask=each)) for each in (mask, "exact"))
    conversations = read_conversations(folder, encoder)
    found = conversation_losses(model, conversations, encoder, exact, 4096, tokenizer.vocab_size, 300)
    assert [each["conversation"] for each in found] == [each.place for each in conversations]
    seen = set()
    for conversation, each in zip(conversations, found, strict=True):
        ids, roles = by_hand(tokenizer, conversation.messages)
        losses = losses_of(model, ids)
        for role in set(roles) - {None}:
            mine = [loss for loss, other in zip(losses, roles[1:], strict=True) if other == role]
            assert each["roles"][role][1] == len(mine), (conversation.place, role)
            assert each["roles"][role][0] == pytest.approx(sum(mine), rel=1e-5)
        assert each["roles"].keys() == set(roles) - {None} | {"all"}
        parts = [sums for role, sums in each["roles"].items() if role != "all"]
        assert each["roles"]["all"] == [
            pytest.approx(sum(total for total, _ in parts)),
            sum(tokens for _, tokens in parts),
        ]
        seen |= each["roles"].keys()
    assert seen == {"all", "assistant", "thought", "call", "code"}


def test_a_border_that_the_tokenizer_merges_across_makes_the_roles_unclear(
    setting, model, write_processed, tmp_path
):
    """`compat` cuts by id counts. If that cuts different ids than the text, roles are unclear."""
    from snaketune.encoding.batch_encoder import BatchEncoder
    from snaketune.encoding.chat_encoding import ChatEncoding
    from snaketune.evaluation.conversations import read_conversations
    from snaketune.evaluation.role_losses import conversation_losses

    _, tokenizer, _, _ = setting
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "\n"}]
    folder = write_processed(tmp_path, {"d": [talk]})
    compat, exact = (BatchEncoder(tokenizer, ChatEncoding(mask=mask)) for mask in ("compat", "exact"))
    conversations = read_conversations(folder, compat)
    compat.encode_turns([conversations[0].turns])
    assert compat.take_counts()["straddling_messages"] == 1, "the tokenizer must merge two line breaks"
    (found,) = conversation_losses(model, conversations, compat, exact, 4096, tokenizer.vocab_size)
    assert found["roles"].keys() == {"all", "unclear"}


def test_loss_on_plain_text_equals_a_plain_loop(setting, model, tmp_path):
    from snaketune.evaluation.role_losses import plain_text_blocks, plain_text_losses

    _, tokenizer, _, _ = setting
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    blocks = plain_text_blocks(path, tokenizer, 100)
    assert all(block[0] == tokenizer.bos_token_id and len(block) <= 100 for block in blocks)
    whole = [token for block in blocks for token in block[1:]]
    assert tokenizer.end_of_turn_id not in whole, "a control token in the text is text"
    assert tokenizer.tokenizer.decode(whole, skip_special_tokens=False) == TEXT
    for block, (total, tokens) in zip(
        blocks, plain_text_losses(model, blocks, tokenizer.vocab_size), strict=True
    ):
        assert tokens == len(block) - 1
        assert total == pytest.approx(sum(losses_of(model, block)), rel=1e-5)
    with pytest.raises(UserError, match="empty"):
        path.write_text("")
        plain_text_blocks(path, tokenizer, 100)


@torch.no_grad()
def greedy(model, tokenizer, prompt, limit):
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[tokenizer.bos_token_id] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] in (tokenizer.end_of_turn_id, tokenizer.eos_token_id):
            break
    return ids[len(prompt) :]


def command(setting, heldout):
    """Returns the script and its arguments."""
    tokenizer_dir, _, hf, _ = setting
    words = ("--model", hf, "--tokenizer-path", tokenizer_dir, "--heldout-dir", heldout)
    return "evaluate_tool_calls.py", *words


def test_the_command_asks_a_real_model_at_each_point(setting, model, tmp_path, run_script):
    from snaketune.reporting.tool_call_tables import METRICS, comparison_rows

    _, tokenizer, _, heldout = setting
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = run_script(
        *command(setting, heldout),
        *("--output", tmp_path / "tuned.json", "--max-points", 12, "--max-new-tokens", 8),
        *("--dtype", "float32"),
        *("--plain-text", tmp_path / "text.txt"),
    )
    result = read_json(tmp_path / "tuned.json")
    assert result["format"] == 1 and result["label"] == "tuned"
    assert [result["selection"][kind]["points"] for kind in ("call", "text")] == [6, 6]
    assert len(result["points"]) == 12
    assert "tuned: recall" in done.stdout
    for point in result["points"]:
        place, start = point["point"].rsplit("#", 1)
        name, line = place.rsplit(":", 1)
        messages = json.loads((heldout / name).read_text(encoding="utf-8").splitlines()[int(line) - 1])
        before, start = messages[: int(start)], int(start)
        ids, _ = by_hand(tokenizer, [*before, {"role": "assistant", "content": ""}])
        suffix = tokenizer.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
        prompt = ids[: -len(suffix)]
        answer = greedy(model, tokenizer, prompt, 8)
        assert point["prompt_tokens"] == len(prompt) and point["tokens"] == len(answer)
        assert point["prediction"] == tokenizer.tokenizer.decode(answer, skip_special_tokens=False)
        assert point["verdicts"]["stopped"] == (answer[-1] == tokenizer.end_of_turn_id)
        assert point["reference"][0]["content"] == messages[start]["content"]
        assert point["question"] == messages[start - 1]["content"][-500:]
    whole = {row["metric"]: row for row in result["summary"] if row["scope"] == "all"}
    assert whole.keys() >= {
        *METRICS,
        "loss.all",
        "loss.call",
        "loss.code",
        "loss.assistant",
        "loss.plain_text",
    }
    total = sum(each["roles"]["all"][0] for each in result["losses"])
    tokens = sum(each["roles"]["all"][1] for each in result["losses"])
    assert whole["loss.all"]["value"] == pytest.approx(total / tokens)
    assert whole["loss.all"]["count"] == tokens
    assert whole["loss.all"]["low"] < whole["loss.all"]["value"] < whole["loss.all"]["high"]

    run_script(
        *command(setting, heldout),
        *("--output", tmp_path / "base.json", "--max-points", 12, "--max-new-tokens", 8),
        *("--dtype", "float32"),
        *("--plain-text", tmp_path / "text.txt", "--label", "base"),
    )
    rows = comparison_rows(read_json(tmp_path / "base.json"), result)
    assert all(row["difference"].value in (0.0, None) for row in rows), "the same model twice"
    shown = run_script("compare_tool_calls.py", tmp_path / "base.json", tmp_path / "tuned.json")
    assert "loss.plain_text" in shown.stdout and f"{math.exp(whole['loss.all']['value']):.2f}" in shown.stdout
    write_json(tmp_path / "other.json", result | {"max_length": 3})
    failed = run_script(
        "compare_tool_calls.py", tmp_path / "other.json", tmp_path / "tuned.json", check=False
    )
    assert failed.returncode == 2 and "max_length differs" in failed.stderr


def test_conversations_without_any_call_are_evaluated_too(setting, tmp_path, run_script, write_processed):
    folder = write_processed(tmp_path / "plain", {"plain": DATASETS["plain"]})
    run_script(
        *command(setting, folder),
        *("--output", tmp_path / "out.json", "--max-points", 4, "--max-new-tokens", 2),
    )
    whole = {
        row["metric"]: row for row in read_json(tmp_path / "out.json")["summary"] if row["scope"] == "all"
    }
    assert whole["recall"]["value"] is None and whole["stopped"]["count"] == 4
