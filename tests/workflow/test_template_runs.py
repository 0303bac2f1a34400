"""Runs with different chat templates share no tokenizer, and every stage gets the run's template."""

from __future__ import annotations

import re
import shutil

import yaml

EXACT = {"mask": "exact", "control_tokens": "control"}


def value_of(flag, command):
    return re.search(rf" {flag} (\S+)", command)[1]


def test_each_template_has_its_own_tokenizer(make_project):
    project = make_project("templates")
    own = project.folder / "own.yaml"
    shutil.copy(
        project.code / "workflow_scripts" / "snaketune" / "chat_format" / "templates" / "chatml.yaml", own
    )
    runs = {
        "compat": {"tokenize": {"mask": "compat"}},
        "internlm2": {"tokenize": EXACT},
        "chatml": {"tokenize": EXACT | {"template": "chatml"}},
        "llama3": {"tokenize": EXACT | {"template": "llama3"}},
        "own": {"tokenize": EXACT | {"template": str(own)}},
    }
    project.config_file.write_text(yaml.safe_dump(project.config | {"runs": runs}))

    def plan():
        done = project.run("--dry-run", "--printshellcmds", "evaluate")
        return (done.stdout + done.stderr).splitlines()

    def commands(script, lines):
        return [line for line in lines if f"/{script}.py" in line]

    save_dir = "--tokenizer-w-special-tokens-save-dir"
    lines = plan()
    extended = commands("extend_tokenizer", lines)
    made = {value_of(save_dir, line): value_of("--template", line) for line in extended}
    assert sorted(made.values()) == sorted(["internlm2_chat", "chatml", "llama3", str(own)])

    evaluated = commands("evaluate_model", lines)
    assert len(evaluated) == 2 * len(runs)
    for line in evaluated:
        name = value_of("--output", line).split("/")[1]
        wanted = {"template": "internlm2_chat", "mask": "exact", "control_tokens": "literal"}
        wanted |= runs[name].get("tokenize", {})
        for key, value in wanted.items():
            assert value_of(f"--{key.replace('_', '-')}", line) == value
        assert made[value_of("--tokenizer-path", line)] == wanted["template"]
    for line in commands("tokenize_dataset", lines):
        assert made[value_of("--tokenizer-path", line)] == value_of("--template", line)

    own.write_text(own.read_text().replace("<|im_start|>user", "<|im_start|>human"))
    again = {value_of(save_dir, line) for line in commands("extend_tokenizer", plan())}
    assert len(again - set(made)) == 1, "the content of a template file counts"
