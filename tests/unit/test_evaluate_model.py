"""Held-out loss against a plain loop of transformers calls, masks, choice of samples, and greedy answers."""

from __future__ import annotations

import hashlib
import json
import math
import os

import pytest
import torch

from export_models import write_tuned
from snaketune.common.cli import UserError
from snaketune.common.files import read_json, write_json
from snaketune.encoding.chat_encoding import ChatEncoding

TOOL_TALK = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the weather in Shanghai?"},
    {"role": "assistant", "content": "Let me look. "},
    {"role": "tool", "name": "plugin", "content": '{"city": "Shanghai"}'},
    {"role": "environment", "name": "plugin", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]


def _talk(number: int) -> list[dict]:
    return [
        {"role": "user", "content": f"What is {number} * 7?"},
        {"role": "assistant", "content": f"It is {number * 7}. " * (1 + number % 5)},
    ]


DATASETS = {"tools": [TOOL_TALK, TOOL_TALK[:3]], "sums": [_talk(number) for number in range(9)]}
PROMPTS = [[{"role": "user", "content": "Hello, how are you?"}], TOOL_TALK[:2]]


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_tokenizer_dir, tiny_model_dir, write_processed):
    """(tokenizer folder, tokenizer, folder of a tuned model, held-out folder)."""
    root = tmp_path_factory.mktemp("evaluate")
    tuned = write_tuned(tiny_model_dir, tiny_tokenizer_dir, root)
    return *tuned, write_processed(root / "heldout", DATASETS)


def _reference(model_dir, tokenizer, conversations) -> tuple[float, int]:
    """Returns (sum of losses, count), one conversation at a time, with transformers' labels and its own mask.

    The text and end of a turn are trained on if it is the assistant's (a tool call is attached to the
    preceding assistant turn). The ids come from whole pieces, which the byte-level tokenizer splits at
    special tokens.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()

    def encode(text: str) -> list[int]:
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

    total, count = 0.0, 0
    for conversation in conversations:
        ids, labels, index = [tokenizer.bos_token_id], [-100], 0
        while index < len(conversation):
            message = conversation[index]
            text = message["content"]
            name = f" name=<|{message['name']}|>" if "name" in message else ""
            if message["role"] == "assistant" and index + 1 < len(conversation):
                call = conversation[index + 1]
                if call["role"] == "tool":
                    text += f"<|action_start|><|{call['name']}|>\n{call['content']}<|action_end|>\n"
                    index += 1
            trained = message["role"] == "assistant"
            prefix = encode(f"<|im_start|>{message['role']}{name}\n")
            rest = encode(text) + encode("<|im_end|>\n")
            ids += prefix + rest
            labels += [-100] * len(prefix) + (rest if trained else [-100] * len(rest))
            index += 1
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        wanted = sum(label != -100 for label in labels)
        total, count = total + output.loss.item() * wanted, count + wanted
    return total, count


def test_loss_equals_a_plain_loop(setting):
    from snaketune.evaluation.heldout import load_heldout
    from snaketune.evaluation.models import load_for_evaluation
    from snaketune.evaluation.scoring import score

    tokenizer_dir, tokenizer, hf, heldout = setting
    model = load_for_evaluation(str(hf), str(tokenizer_dir), tokenizer, dtype="float32")
    samples = load_heldout(heldout, tokenizer, ChatEncoding(), 2048)
    results = [
        score(model, samples, tokenizer.vocab_size, batch_tokens) for batch_tokens in (1, 300, 100_000)
    ]
    sums = {name: _reference(hf, tokenizer, conversations) for name, conversations in DATASETS.items()}
    for result in results:
        for name, (total, count) in sums.items():
            assert result["datasets"][name]["trained_tokens"] == count
            assert result["datasets"][name]["loss"] == pytest.approx(total / count, abs=1e-5)
            assert result["datasets"][name]["samples"] == len(DATASETS[name])
            own = result["conversations"][name]
            assert sum(nats for nats, _ in own) == pytest.approx(total, rel=1e-5) and len(own) == len(
                DATASETS[name]
            )
            assert own[-1] == pytest.approx(_reference(hf, tokenizer, DATASETS[name][-1:]), rel=1e-5)
        total, count = map(sum, zip(*sums.values(), strict=True))
        assert result["trained_tokens"] == count
        assert result["loss"] == pytest.approx(total / count, abs=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_rows_without_a_token_do_not_change_the_loss(setting, tiny_model_dir):
    """A base grows to a multiple of 64 rows, as in training; hf/ has only those of tokens. Both must compare."""
    from snaketune.evaluation.heldout import load_heldout
    from snaketune.evaluation.models import load_for_evaluation
    from snaketune.evaluation.scoring import score

    tokenizer_dir, tokenizer, _, heldout = setting
    samples = load_heldout(heldout, tokenizer, ChatEncoding(), 2048)
    model = load_for_evaluation(
        str(tiny_model_dir), str(tokenizer_dir), tokenizer, base=True, dtype="float32"
    )
    assert model.config.vocab_size > tokenizer.vocab_size
    padded = score(model, samples, tokenizer.vocab_size)["loss"]
    model.resize_token_embeddings(tokenizer.vocab_size)
    assert padded == pytest.approx(score(model, samples, tokenizer.vocab_size)["loss"], abs=1e-5)


def test_bos_is_no_target_and_long_conversations_are_cut(setting):
    from snaketune.evaluation.heldout import batches_by_length, load_heldout

    _, tokenizer, _, heldout = setting
    samples = load_heldout(heldout, tokenizer, ChatEncoding(), 2048)
    assert all(sample.ids[0] == tokenizer.bos_token_id for sample in samples)
    assert all(sample.targets == sum(sample.trained) - 1 for sample in samples)
    cut = load_heldout(heldout, tokenizer, ChatEncoding(), 30)
    assert all(short.ids == whole.ids[:30] for short, whole in zip(cut, samples, strict=True))
    assert [s.truncated for s in cut] == [len(s.ids) > 30 for s in samples]
    batches = batches_by_length(samples, 200)
    assert sorted(map(id, samples)) == sorted(id(sample) for batch in batches for sample in batch)
    assert all(len(batch) == 1 or len(batch) * max(len(s.ids) for s in batch) <= 200 for batch in batches)


def test_max_samples_depends_on_content_alone(setting, tmp_path, write_processed):
    from snaketune.evaluation.heldout import load_heldout

    _, tokenizer, _, heldout = setting
    chosen = load_heldout(heldout, tokenizer, ChatEncoding(), 2048, max_samples=3)
    lines = [json.dumps(talk, ensure_ascii=False).encode() for talk in DATASETS["sums"]]
    expected = set(sorted(lines, key=lambda line: hashlib.sha256(line).digest())[:3])
    assert sum(sample.dataset == "tools" for sample in chosen) == 2
    kept = [talk for talk, line in zip(DATASETS["sums"], lines, strict=True) if line in expected]
    alone = load_heldout(write_processed(tmp_path, {"sums": kept}), tokenizer, ChatEncoding(), 2048)
    assert [s.ids for s in chosen if s.dataset == "sums"] == [s.ids for s in alone]


def test_the_base_is_grown_as_for_training(setting, tiny_model_dir):
    from transformers import AutoModelForCausalLM

    from snaketune.evaluation.models import load_for_evaluation

    tokenizer_dir, tokenizer, _, _ = setting
    with pytest.raises(UserError, match="too few embedding rows"):
        load_for_evaluation(str(tiny_model_dir), str(tokenizer_dir), tokenizer)
    model = load_for_evaluation(
        str(tiny_model_dir), str(tokenizer_dir), tokenizer, base=True, dtype="float32"
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for grown, old in (
        (model.get_input_embeddings(), plain.get_input_embeddings()),
        (model.lm_head, plain.lm_head),
    ):
        rows = old.weight.shape[0]
        assert torch.equal(grown.weight[:rows], old.weight)
        for token_id in tokenizer.added.values():
            torch.testing.assert_close(grown.weight[token_id], old.weight.mean(dim=0))


def test_answers_equal_a_greedy_loop_without_cache(setting):
    from snaketune.encoding.prompt_ids import encode_prompt
    from snaketune.evaluation.generation import generate
    from snaketune.evaluation.models import load_for_evaluation

    tokenizer_dir, tokenizer, hf, _ = setting
    model = load_for_evaluation(str(hf), str(tokenizer_dir), tokenizer, dtype="float32")
    answers = generate(model, PROMPTS, tokenizer, ChatEncoding(), max_new_tokens=12)
    prompt = encode_prompt(PROMPTS[1], tokenizer, ChatEncoding())
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is the weather in Shanghai?"
    assert tokenizer.tokenizer.decode(prompt, skip_special_tokens=False) == (
        f"<s>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = encode_prompt(prompt, tokenizer, ChatEncoding())
        start = len(ids)
        while len(ids) - start < 12:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[tokenizer.bos_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] in (tokenizer.ids["<|im_end|>"], tokenizer.eos_token_id):
                break
        finished = ids[-1] in (tokenizer.ids["<|im_end|>"], tokenizer.eos_token_id)
        new = ids[start:-1] if finished else ids[start:]
        assert answer["text"] == tokenizer.tokenizer.decode(new, skip_special_tokens=False)
        assert answer["finished"] == finished and answer["prompt"] == prompt


def test_an_answer_ends_at_the_end_of_the_turn(setting):
    from snaketune.evaluation.generation import generate
    from snaketune.evaluation.models import load_for_evaluation

    tokenizer_dir, tokenizer, hf, _ = setting
    model = load_for_evaluation(str(hf), str(tokenizer_dir), tokenizer, dtype="float32")
    with torch.no_grad():
        # <|im_end|> has the largest logit for any input.
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
        model.lm_head.bias[tokenizer.ids["<|im_end|>"]] = 1.0
    answer = generate(model, PROMPTS[:1], tokenizer, ChatEncoding(), max_new_tokens=5)[0]
    assert answer["text"] == "" and answer["finished"] and answer["tokens"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"a\.jsonl:2 is not JSON"),
        ('[{"role": "robot", "content": "x"}]', r"(?s)a\.jsonl:2: invalid \[0\]\.role.*robot"),
    ],
)
def test_bad_lines_are_named(setting, tmp_path, line, message):
    from snaketune.evaluation.heldout import load_heldout

    file = tmp_path / "d" / "processed" / "x" / "a.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(_talk(1)) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        load_heldout(tmp_path, setting[1], ChatEncoding(), 2048)


@pytest.mark.parametrize(
    ("template", "mask"), [("internlm2_chat", "compat"), ("internlm2_chat", "exact"), ("llama3", "exact")]
)
def test_held_out_conversations_are_what_training_would_see(
    template, mask, tmp_path, tiny_tokenizer_dir, write_processed
):
    """Compares with the .bin file from tokenising the same folder."""
    from snaketune.encoding.base_tokenizer import open_tokenizer
    from snaketune.encoding.prompt_ids import encode_prompt
    from snaketune.evaluation.heldout import load_heldout
    from snaketune.tokenized.bin_reader import IGNORE_INDEX, TokenizedFile
    from snaketune.tokenized.block_tokenizer import TokenizeOptions
    from snaketune.tokenized.tokenizing import tokenize_datasets

    tokenizer = open_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer", template=template)
    talks = [TOOL_TALK, [*_talk(3), {"role": "user", "content": "<|im_end|><|eot_id|>\n"}]]
    talks.append([*_talk(2), {"role": "assistant", "content": "\nno\n", "loss": False}])
    folder = write_processed(tmp_path / "in", {"d": talks})
    for control_tokens in ("literal", "control"):
        options = TokenizeOptions(max_length=70, template=template, mask=mask, control_tokens=control_tokens)
        made = tokenize_datasets(folder, tmp_path / control_tokens, tokenizer, options)
        (path,) = (tmp_path / control_tokens).rglob("*.bin")
        expected = [TokenizedFile(path)[number] for number in range(len(talks))]
        samples = load_heldout(folder, tokenizer, options, 70)
        assert [sample.ids for sample in samples] == [ids.tolist() for ids, _ in expected]
        assert [sample.trained for sample in samples] == [
            (labels != IGNORE_INDEX).tolist() for _, labels in expected
        ]
        assert sum(sample.truncated for sample in samples) == made["d"]["totals"]["truncated"] > 0
        prompt = encode_prompt(talks[1], tokenizer, options)
        prefix = tokenizer.tokenizer.encode(
            tokenizer.template.generation_prompt, add_special_tokens=False
        ).ids
        assert prompt[-len(prefix) :] == prefix
        assert (prompt[: -len(prefix)])[:70] == samples[1].ids


def test_nothing_to_measure_is_an_error(setting, tmp_path, write_processed):
    from snaketune.evaluation.heldout import load_heldout

    with pytest.raises(UserError, match="no held-out conversations"):
        load_heldout(tmp_path / "absent", setting[1], ChatEncoding(), 2048)
    silent = write_processed(tmp_path, {"silent": [[{"role": "user", "content": "Hello"}]]})
    with pytest.raises(UserError, match="no trained token"):
        load_heldout(silent, setting[1], ChatEncoding(), 2048)


def test_the_command_writes_what_the_library_measures(setting, tmp_path, run_script):
    from snaketune.evaluation.heldout import heldout_digest, load_heldout
    from snaketune.evaluation.models import load_for_evaluation
    from snaketune.evaluation.scoring import score

    tokenizer_dir, tokenizer, hf, heldout = setting
    write_json(tmp_path / "prompts.json", PROMPTS)
    done = run_script(
        *("evaluate_model.py", "--model", hf, "--tokenizer-path", tokenizer_dir, "--heldout-dir", heldout),
        *("--output", tmp_path / "out.json", "--prompts", tmp_path / "prompts.json", "--max-new-tokens", 4),
        *("--dtype", "float32"),
        env={**os.environ, "SLURM_JOB_ID": "4711"},
    )
    result = read_json(tmp_path / "out.json")
    assert result["slurm_job_id"] == "4711"
    model = load_for_evaluation(str(hf), str(tokenizer_dir), tokenizer, dtype="float32")
    expected = score(model, load_heldout(heldout, tokenizer, ChatEncoding(), 2048), tokenizer.vocab_size)
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert set(result["datasets"]) == {"tools", "sums"}
    assert result["label"] == "tuned" and result["format"] == 1 and result["samples"] == 11
    assert [answer["prompt"] for answer in result["generations"]] == PROMPTS
    assert result["heldout_sha256"] == heldout_digest(heldout)
    assert "held-out loss: 502 tokens (" in done.stdout and "tuned: loss" in done.stdout
