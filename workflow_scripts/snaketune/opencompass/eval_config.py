"""Writes an OpenCompass config, structured as in the guide's step 7, from plain settings. Does not need OpenCompass."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketune.chat_format.chat_template import ChatTemplate
from snaketune.common.cli import UserError
from snaketune.common.files import sha256_file
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.opencompass.groups import GROUPS

_CONFIGS = "opencompass.configs"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings of an evaluation.

    Attributes:
        model: Hugging Face folder, or the folder that lmdeploy loads.
        backend: "hf" or "turbomind".
        abbr: Name of the model.
        iteration: Name of its checkpoint, such as `iter_300`.
        groups: Names in `GROUPS`.
        custom: Name -> JSONL file of `{"question": ..., "answer": ...}` lines.
        runner: How tasks are started, "local" or "slurm".
        partition, quotatype: Options of srun; None omits them.
        srun_options: More options of srun, as on the command line.
        max_num_workers, eval_max_num_workers: Concurrent tasks that answer, and that score.
        datasets_per_task: Datasets per task, which loads the model once.
        max_samples: Questions per dataset; None uses all.
        max_seq_len, longtext_max_seq_len: Tokens of prompt and answer.
        max_out_len: Longest answer in tokens if the dataset does not set it.
        batch_size: Prompts at a time.
        gpus: GPUs per task; with turbomind, the tensor parallel size.
    """

    model: Path
    backend: str
    abbr: str
    iteration: str
    groups: Sequence[str]
    custom: Mapping[str, Path]
    runner: str
    partition: str | None
    quotatype: str | None
    srun_options: str | None
    max_num_workers: int
    eval_max_num_workers: int
    datasets_per_task: int
    max_samples: int | None
    max_seq_len: int
    longtext_max_seq_len: int
    max_out_len: int
    batch_size: int
    gpus: int


def meta_template(template: ChatTemplate) -> dict[str, Any]:
    """Returns OpenCompass's description of a chat template: the prefix and suffix of a turn in each of its three roles.

    SYSTEM is omitted if the template has no separate system turn. Mistral's system text is inside the user's turn,
    which OpenCompass cannot write. A dataset's system text then becomes a user turn (its `fallback_role`).
    """

    def role(name: str, ours: str, **more: Any) -> dict[str, Any]:
        return {
            "role": name,
            "begin": template.roles[ours].prefix,
            "end": template.roles[ours].suffix,
            **more,
        }

    if "user" not in template.roles:
        raise UserError(f"the chat template {template.name} has no role user, which all datasets need")
    meta: dict[str, Any] = {"round": [role("HUMAN", "user"), role("BOT", "assistant", generate=True)]}
    system = template.roles.get("system")
    if system is not None and system.opens is None:
        # Not in the round: OpenCompass writes every role of a round, even if the prompt does not have it.
        meta["reserved_roles"] = [role("SYSTEM", "system")]
    return meta


def stop_words(template: ChatTemplate) -> list[str]:
    """Returns the text that ends an answer in training."""
    return [template.end_of_turn]


def render_eval_config(settings: EvalSettings, tokenizer: ExtendedTokenizer) -> str:
    """Returns the config's Python text.

    Args:
        settings: What to evaluate and how.
        tokenizer: The extended tokenizer with the chat template that training used.

    Raises:
        UserError: No benchmarks were given, or a custom set is invalid.
    """
    if not settings.groups and not settings.custom:
        raise UserError("no benchmarks to run", fix="set groups or custom sets")
    groups = [name for name in GROUPS if name in settings.groups]  # the guide's order
    parts = [_HEAD, _imports(groups), _settings_block(settings)]
    parts += [_runner("infer", settings), _runner("eval", settings), _model_configs(settings, tokenizer)]
    for name in groups:
        parts.append(_datasets_of(name))
    if settings.custom:
        parts.append(_custom(settings.custom))
    parts.append(_combinations([*groups, *(["custom"] if settings.custom else [])], settings.max_samples))
    parts.append(_summarizer(groups))
    return "\n".join(parts)


_HEAD = """\
# Written by render_eval_config.py for OpenCompass 0.5.4, in the shape of the guide's step 7; run by evaluate_opencompass.py.
from mmengine.config import read_base
"""


def _imports(groups: Sequence[str]) -> str:
    lines = []
    for name in groups:
        group = GROUPS[name]
        for number, (module, variable) in enumerate(group.datasets):
            lines.append(f"from {_CONFIGS}.{module} import {variable} as {group.variable}_part_{number}")
        lines += [
            f"from {_CONFIGS}.summarizers.groups.{module} import {each}" for module, each in group.summary
        ]
    if not lines:
        return ""
    return "with read_base():\n" + "".join(f"    {line}\n" for line in lines)


def _settings_block(settings: EvalSettings) -> str:
    abbr = f"{settings.abbr}@{settings.iteration}"
    return f"""\
# ------------------ from the workflow's settings ------------------
model_path = {str(settings.model.absolute())!r}
model_abbr = {abbr!r}
"""


def _runner(stage: str, settings: EvalSettings) -> str:
    workers = settings.max_num_workers if stage == "infer" else settings.eval_max_num_workers
    kind = "SlurmRunner" if settings.runner == "slurm" else "LocalRunner"
    runner: dict[str, Any] = {
        "type": f"opencompass.runners.{kind}",
        "max_num_workers": workers,
        "task": {"type": f"opencompass.tasks.OpenICL{stage.capitalize()}Task"},
    }
    if settings.runner == "slurm":
        # quotatype is vendor-specific; stock Slurm does not have this flag.
        runner |= {"partition": settings.partition, "quotatype": settings.quotatype, "retry": 1}
        # Quoted, because OpenCompass puts them into a shell command.
        runner["extra_command"] = [shlex.quote(word) for word in _words(settings.srun_options or "")]
    # The partitioner that counts workers reads the data even in a dry run.
    partitioner = {"type": "opencompass.partitioners.NaivePartitioner", "n": settings.datasets_per_task}
    return _assign(stage, {"partitioner": partitioner, "runner": runner})


def _words(options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise UserError(
            f"srun_options cannot be read: {error}",
            found=options,
            expected="options as on the command line, such as --account=team --mem=64G",
            fix="fix the quotes in opencompass.srun_options",
        ) from None


def _model_configs(settings: EvalSettings, tokenizer: ExtendedTokenizer) -> str:
    template = tokenizer.template
    long = {"max_seq_len": settings.longtext_max_seq_len}
    base: dict[str, Any] = {
        "max_seq_len": settings.max_seq_len,
        "max_out_len": settings.max_out_len,
        "batch_size": settings.batch_size,
        "run_cfg": {"num_gpus": settings.gpus},
    }
    if settings.backend == "turbomind":
        engine = {
            "session_len": settings.max_seq_len,
            "max_batch_size": settings.batch_size,
            "tp": settings.gpus,
        }
        base |= {
            "type": "opencompass.models.TurboMindModel",
            "engine_config": engine,
            "gen_config": {"stop_words": stop_words(template)},
        }
        long |= {
            "engine_config": engine | {"session_len": settings.longtext_max_seq_len},
            "drop_middle": True,
            "batch_size": 1,
        }
    else:
        base |= {
            # The newer HuggingFaceBaseModel does not accept a meta_template.
            "type": "opencompass.models.HuggingFaceCausalLM",
            "model_kwargs": {"device_map": "auto" if settings.gpus else "cpu", "torch_dtype": "auto"},
            "generation_kwargs": {"eos_token_id": [tokenizer.end_of_turn_id]},
            "end_str": template.end_of_turn,
        }
        long |= {"mode": "mid", "batch_size": 1}
    text = _assign("meta_template", meta_template(template)) + "\n" + _assign("base_model_cfg", base)
    text += "base_model_cfg.update(path=model_path, meta_template=meta_template)\n"
    text += f"base_longtext_model_cfg = dict(base_model_cfg, **{_python(long)})\n"
    return text + _AGENTS


# Names from OpenCompass. Some are missing in 0.5.4 and fail at run time; see snaketune.opencompass.groups.
_AGENTS = """\
base_math_agent_cfg = dict(
    type='opencompass.models.lagent.CodeAgent', llm=base_model_cfg, max_turn=3, batch_size=1, max_out_len=1024,
    run_cfg=base_model_cfg['run_cfg'])
base_cibench_agent_cfg = dict(
    type='opencompass.models.lagent.LagentAgent', agent_type='opencompass.lagent.agents.react.CIReAct',
    actions=[dict(type='opencompass.lagent.actions.ipython_interpreter.IPythonInterpreter')],
    llm=base_model_cfg, max_turn=3, batch_size=1, max_out_len=1024, run_cfg=base_model_cfg['run_cfg'])
base_plugin_eval_model_cfg = base_model_cfg
"""

_MODEL_CONFIG = {
    "base": "base_model_cfg",
    "custom": "base_model_cfg",
    "longtext": "base_longtext_model_cfg",
    "math_agent": "base_math_agent_cfg",
    "cibench": "base_cibench_agent_cfg",
    "plugin_eval": "base_plugin_eval_model_cfg",
}


def _datasets_of(name: str) -> str:
    group = GROUPS[name]
    parts = " + ".join(f"{group.variable}_part_{number}" for number in range(len(group.datasets)))
    return f"{group.variable}_datasets = {parts}"


def _custom(sets: Mapping[str, Path]) -> str:
    entries = []
    for name, path in sets.items():
        check_custom_set(name, path)
        entries.append(
            {
                "abbr": name,
                "type": "opencompass.datasets.CustomDataset",
                "path": str(path.absolute()),
                "reader_cfg": {"input_columns": ["question"], "output_column": "answer"},
                "infer_cfg": {
                    "prompt_template": {
                        "type": "opencompass.openicl.icl_prompt_template.PromptTemplate",
                        "template": {
                            "round": [
                                {"role": "HUMAN", "prompt": "{question}"},
                                {"role": "BOT", "prompt": "{answer}"},
                            ]
                        },
                    },
                    "retriever": {"type": "opencompass.openicl.icl_retriever.ZeroRetriever"},
                    "inferencer": {"type": "opencompass.openicl.icl_inferencer.GenInferencer"},
                },
                "eval_cfg": {
                    "evaluator": {"type": "opencompass.openicl.icl_evaluator.AccEvaluator"},
                    "pred_role": "BOT",
                },
            }
        )
    digests = "".join(f"# {name}: sha256 {sha256_file(path)}\n" for name, path in sets.items())
    return digests + _assign("custom_datasets", entries)


def check_custom_set(name: str, path: Path) -> None:
    """Raises a UserError with file and line unless all lines are JSON with the texts `question` and `answer`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the custom set {name} cannot be read", found=error) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("question", "answer")):
            raise UserError(
                f"{path}:{number}: invalid question in the custom set {name}",
                found=f"{line[:80]!r}",
                expected='{"question": "a text", "answer": "a text"}',
                fix="correct or remove the line",
            )
    if not lines:
        raise UserError(f"the custom set {name} is empty", found=path)


def _combinations(names: Sequence[str], max_samples: int | None) -> str:
    text = "model_dataset_combinations = []\nmodels = []\ndatasets = []\n"
    for name in names:
        variable = GROUPS[name].variable if name in GROUPS else name
        suffix = GROUPS[name].suffix if name in GROUPS else "-custom"
        text += f"""
{variable}_models = [
    dict({_MODEL_CONFIG[name]}, abbr=model_abbr + {suffix!r}, summarizer_abbr=model_abbr)
]
model_dataset_combinations.append(dict(models={variable}_models, datasets={variable}_datasets, group={name!r}))
models.extend({variable}_models)
datasets.extend({variable}_datasets)
"""
    if max_samples is not None:
        text += f"\nfor each in datasets:\n    each['reader_cfg'] = dict(each['reader_cfg'], test_range='[0:{max_samples}]')\n"
        text += "del each\n"
    return text


def _summarizer(groups: Sequence[str]) -> str:
    averages = [each for name in groups for _, each in GROUPS[name].summary]
    joined = " + ".join(averages) or "[]"
    return f"# Every dataset has a row: a '-' there is a task that failed.\nsummarizer = dict(summary_groups={joined})\n"


def _assign(name: str, value: Any) -> str:
    return f"{name} = {_python(value)}\n"


def _python(value: Any, indent: int = 0) -> str:
    """Returns a Python literal, split into lines if it is long."""
    flat = repr(value)
    if len(flat) + indent < 100 or not isinstance(value, dict | list):
        return flat
    pad = " " * (indent + 4)
    if isinstance(value, list):
        inner = "".join(f"{pad}{_python(each, indent + 4)},\n" for each in value)
        return f"[\n{inner}{' ' * indent}]"
    inner = "".join(f"{pad}{key!r}: {_python(each, indent + 4)},\n" for key, each in value.items())
    return f"{{\n{inner}{' ' * indent}}}"
