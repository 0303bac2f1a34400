"""Each script refuses tokenised data that do not match each other, their manifest or the tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest

CONVERSATIONS = [
    [{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": "hello " * n}]
    for n in range(1, 6)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer_dir, write_processed, run_script):
    """Returns a folder with the tokenizers `chat` and `llama3`, and two datasets tokenised with `chat`."""
    folder = tmp_path_factory.mktemp("made")
    for name, template in (("chat", "internlm2_chat"), ("llama3", "llama3")):
        run_script(
            *("extend_tokenizer.py", "--tokenizer-path", tiny_tokenizer_dir, "--template", template),
            *("--tokenizer-w-special-tokens-save-dir", folder / name),
        )
    write_processed(folder / "in", {"one": CONVERSATIONS, "two": CONVERSATIONS[:3]})
    tokenize(run_script, folder, folder / "data", "chat")
    return folder


def tokenize(run_script, folder, out, tokenizer, *flags):
    data = ("--processed-dir", folder / "in", "--tokenized-dir", out, "--threads", 1)
    run_script("tokenize_dataset.py", *data, "--tokenizer-path", folder / tokenizer, *flags)


@pytest.fixture
def data(made, tmp_path):
    """Returns a copy of the tokenised folder that a test may damage."""
    return shutil.copytree(made / "data", tmp_path / "data")


def error_of(run_script, *arguments):
    done = run_script(*arguments, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    message = done.stderr.rpartition("error: ")[2]
    assert all(f"\n  {word}" in message for word in ("found: ", "expected: ", "to fix: "))
    return message


def test_training_with_another_tokenizer(made, tiny_model_dir, run_script, tmp_path):
    train = made / "data" / "chatml_llamav13_32k" / "train"
    run_script("plan_packing.py", "--train-folder", train, "--max-length", 64, "--output", tmp_path / "plan")
    assert (
        json.loads((tmp_path / "plan" / "plan.json").read_text())["made_with"]["options"]["mask"] == "compat"
    )
    # The same tokenizer.json, but extended for a different template, which would then serve the model.
    other = shutil.copytree(made / "chat", tmp_path / "other template")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["chat_template"] |= {"name": "chatml", "sha256": "0" * 64}
    (other / "manifest.json").write_text(json.dumps(manifest))
    cases = [
        (made / "llama3", ("--train-folder", train, "--max-length", 64), "made with a different tokenizer"),
        (other, ("--plan", tmp_path / "plan"), "made with a different chat template"),
    ]
    for number, (tokenizer, source, expected) in enumerate(cases):
        config = tmp_path / f"config{number}.py"
        run_script(
            *("render_train_config.py", "--output", config, "--model-path", tiny_model_dir, *source),
            *("--tokenizer-path", tokenizer),
        )
        message = error_of(run_script, "train_model.py", config, "--work-dir", tmp_path / "run")
        assert message.startswith(f"{source[1]} was {expected}") and str(tokenizer) in message
        assert "tokenize_dataset.py" in message
    assert not list((tmp_path / "run").glob("*.pth"))


def test_data_that_were_made_in_different_ways(made, data, run_script, tmp_path):
    shutil.rmtree(data / "chunks" / "two")
    tokenize(run_script, made, data, "chat", "--dataset", "two", "--mask", "exact")
    order = ("write_data_order.py", "--data-folder", data, "--save-folder", tmp_path)
    message = error_of(run_script, *order)
    assert "cn/two/two.bin was not tokenised like" in message and "cn/one/one.bin" in message
    assert "option mask: exact" in message and not (tmp_path / "data_order.txt").exists()
    tokenize(run_script, made, data, "llama3", "--dataset", "two", "--template", "llama3", "--mask", "exact")
    plan = ("plan_packing.py", "--train-folder", data, "--max-length", 64, "--output", tmp_path / "plan")
    assert "tokenizer_sha256: " in error_of(run_script, *plan)
    # Accepted once both datasets are made with the same options.
    tokenize(run_script, made, data, "chat")
    run_script(*order)
    run_script(*plan)


def test_data_that_are_not_finished_or_not_ours(made, data, run_script, tmp_path):
    order = ("write_data_order.py", "--data-folder", data, "--save-folder", tmp_path)
    file = data / "chatml_llamav13_32k" / "train" / "cn" / "two" / "two.bin"
    shutil.copy(file, file.with_name("stranger.bin"))
    assert "stranger.bin is not in any manifest" in error_of(run_script, *order)
    file.with_name("stranger.bin").unlink()
    with open(file, "ab") as changed:
        changed.write(file.read_bytes())
    assert "two.bin is not the file that was tokenised" in error_of(run_script, *order)
    tokenize(run_script, made, data, "chat")
    run_script(*order)
    for path in (data / "manifests").glob("*.json"):  # the state after a kill
        path.unlink()
    assert "not completely tokenised" in error_of(run_script, *order)
    # XTuner writes only the template folder. It is accepted, with a notice.
    for name in ("manifests", "chunks"):
        shutil.rmtree(data / name)
    assert "notice: " in run_script(*order).stdout
    plan = ("plan_packing.py", "--train-folder", data, "--max-length", 64, "--output", tmp_path / "plan")
    assert "notice: " in run_script(*plan).stdout
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["made_with"] is None
