"""Records what a config's TurboMindModel passes to the engine for conversations. Runs in OpenCompass's environment.

python opencompass_prompts.py FOLDER...    each with config.py and talks.json; writes given.json

A pipeline that records its input replaces lmdeploy, which needs a GPU. Everything before it is OpenCompass's own:
reading the config, the prompt template, the parser of the meta template and the model class.
"""

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

given = []


@dataclass
class GenerationConfig:
    """The fields of lmdeploy 0.9.2's config that OpenCompass sets."""

    max_new_tokens: int = 512
    min_new_tokens: int = None
    do_sample: bool = False
    top_k: int = 50
    temperature: float = 0.8
    stop_words: list = None


def pipeline(path, backend_config=None, **kwargs):
    def answer(inputs, gen_config, do_preprocess):
        assert do_preprocess is False  # the engine must not apply its own chat template
        given.append(
            {"inputs": inputs, "stop_words": gen_config.stop_words, "path": path, **vars(backend_config)}
        )
        return [types.SimpleNamespace(token_ids=[]) for _ in inputs]

    return answer


@dataclass
class TurbomindEngineConfig:
    session_len: int = None
    max_batch_size: int = None
    tp: int = 1


sys.modules["lmdeploy"] = types.SimpleNamespace(
    version_info=(0, 9, 2),
    GenerationConfig=GenerationConfig,
    TurbomindEngineConfig=TurbomindEngineConfig,
    PytorchEngineConfig=None,
    pipeline=pipeline,
)

from opencompass.openicl.icl_prompt_template import PromptTemplate  # noqa: E402
from opencompass.utils import build_model_from_cfg  # noqa: E402

from snaketune.opencompass.eval_run import load_config  # noqa: E402

ROLES = {"user": "HUMAN", "assistant": "BOT", "system": "SYSTEM"}
for folder in map(Path, sys.argv[1:]):
    model = build_model_from_cfg(load_config(folder / "config.py")["custom_models"][0])
    results = []
    for conversation in json.loads((folder / "talks.json").read_text()):
        items = [
            {"role": ROLES[message["role"]], "prompt": message["content"], "fallback_role": "HUMAN"}
            for message in conversation
        ]
        system = [item for item in items if item["role"] == "SYSTEM"]
        template = {"begin": system, "round": [*items[len(system) :], {"role": "BOT", "prompt": ""}]}
        prompt = PromptTemplate(template).generate_item({})
        model.generate_from_template([prompt], max_out_len=8)
        ids = model.tokenizer(given[-1]["inputs"])["input_ids"][0]
        results.append({**given[-1], "ids": ids})
    (folder / "given.json").write_text(json.dumps(results))
