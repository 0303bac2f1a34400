"""Runs the proof over every causal language model that transformers has, for docs/models.md."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.progress import Progress

_LONGEST = 32768
_LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
_SECONDS = 1800  # for one family
# Settings of published models without which a family's default config cannot be run.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16},
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": [
            *["conv", "conv", "full_attention", "conv"] * 5,
            *["conv", "full_attention", "conv", "conv"],
        ],
    },
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}


@dataclass(frozen=True)
class Family:
    """How a family trains.

    Attributes:
        name: `model_type` in config.json.
        architecture: Name of the model's class.
        attention: The attention that trains it correctly.
        packing: `best_fit`, or `single` if only a document alone is right; None if nothing is.
        reason: Why packed training is refused, or None.
        lora: True if LoRA trains and merges.
        zero_3: `yes` if two ranks train a twin with ZeRO-3 as a plain loop does, else what goes wrong; None if nothing
            trains it.
        transformers_4: `equal` if the exported folder gives the same logits in transformers 4.57, `unknown` if that does
            not know the family, else `different`; None if it was not tried.
        turbomind: True if TurboMind's converter and our proof cover it, by its default config.
        direct: The lmdeploy engine that serves the folder directly, or None.
    """

    name: str
    architecture: str
    attention: str | None
    packing: str | None
    reason: str | None
    lora: bool
    zero_3: str | None
    transformers_4: str | None
    turbomind: bool
    direct: str | None


def describe_families(names: Sequence[str], processes: int = 2, python_4: Path | None = None) -> list[Family]:
    """Returns a description of each family, in processes that each look at one.

    Args:
        names: Model types. Import what training needs before (`sft.import_for_training`): each process is a fork.
        processes: Processes side by side. Each starts two ranks for ZeRO-3.
        python_4: A Python with transformers 4.57; None leaves that out.

    Raises:
        RuntimeError: The process of a family dies, or takes longer than half an hour.
    """
    import torch

    torch.set_num_threads(1)
    progress = Progress("families", len(names))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        describe = functools.partial(describe_family, folder=Path(folder))
        for name, family in _each_in_a_process(describe, names, processes):
            found[name] = family
            progress.add(name, families=1)
        read = _read_in_4(python_4, Path(folder)) if python_4 else {}
    return [dataclasses.replace(found[name], transformers_4=read.get(name)) for name in names]


def _each_in_a_process(
    function: Callable[[str], Any], names: Sequence[str], processes: int
) -> Iterator[tuple[str, Any]]:
    """Yields (name, result of the function) as results come. A pool's processes could not start ranks."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(names))
    running: dict[Connection, tuple[str, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_send, args=(function, name, theirs))
                process.start()
                theirs.close()
                running[ours] = (name, process, time.monotonic())
            for pipe in wait(list(running), timeout=1):
                name, process, _ = running.pop(pipe)
                try:
                    yield name, pipe.recv()
                except EOFError:
                    raise RuntimeError(f"the process of {name} died") from None
                process.join()
            for name, _, started in running.values():
                if time.monotonic() > started + _SECONDS:
                    raise RuntimeError(f"{name} takes longer than {_SECONDS} seconds")
    finally:
        for _, process, _ in running.values():
            process.kill()


def _send(function: Callable[[str], Any], name: str, pipe: Connection) -> None:
    pipe.send(function(name))


def _read_in_4(python: Path, folder: Path) -> dict[str, str]:
    """Returns how transformers 4 reads each exported twin below a folder."""
    done = subprocess.run(
        [python, "-c", _READER, folder], capture_output=True, text=True, check=True, timeout=3600
    )
    return json.loads(done.stdout.splitlines()[-1])


# Runs in an environment without this package's dependencies.
_READER = """
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
found = {}
for expected in sorted(Path(sys.argv[1]).glob("*/expected.safetensors")):
    stored = load_file(expected)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            expected.parent, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            logits = model(input_ids=stored["ids"], use_cache=False).logits[0]
        difference = ((logits - stored["logits"]).abs().max() / stored["logits"].std()).item()
        found[expected.parent.name] = "equal" if difference < 1e-3 else "different"
    except Exception as error:
        unknown = "does not recognize this architecture" in str(error) or isinstance(error, KeyError)
        found[expected.parent.name] = "unknown" if unknown else f"{type(error).__name__}: {error}".splitlines()[0][:120].replace("|", " ")
print(json.dumps(found))
"""


def _export(config, name: str, folder: Path) -> None:
    """Writes a twin as a Hugging Face folder, with the logits that it should give."""
    import torch
    from safetensors.torch import save_file

    from snaketune.export.hf_folder import save_model
    from snaketune.models.isolation import random_row
    from snaketune.models.twin import VOCABULARY, make_twin

    twin = make_twin(config, longest=0, trust_remote_code=False)
    target = folder / name
    target.mkdir()
    save_model(twin, target, "float32")
    ids = random_row(VOCABULARY, (45,)).ids
    with torch.no_grad():
        logits = twin(ids, use_cache=False).logits[0].contiguous()
    save_file({"ids": ids, "logits": logits}, target / "expected.safetensors")


def describe_family(name: str, folder: Path) -> Family:
    """Returns the description of one family, by its default config or a published one.

    Args:
        name: `model_type` in config.json.
        folder: A twin is exported to a folder of the family's name below it.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from snaketune.preflight.architecture_proof import TrainingOptions, other_settings, prove

    torch.set_num_threads(1)
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    architecture = classes if isinstance(classes, str) else classes[0]
    attention = packing = reason = zero_3 = None
    lora = False
    options = TrainingOptions("auto", "best_fit", _LONGEST, True, trust_remote_code=False)
    changes = [{}, *(change for _, change in other_settings(options))]
    changes.append({"gradient_checkpointing": False})
    try:
        config = CONFIG_MAPPING[name](**_PUBLISHED.get(name, {}))
    except Exception as error:  # whatever the family's own code raises
        return Family(name, architecture, None, None, _first_line(error), False, None, None, False, None)
    for change in changes:
        tried = dataclasses.replace(options, **change)
        try:
            attention = prove(config, tried)["attention"]
        except UserError as error:
            reason = reason or _reason(error)
            continue
        packing = tried.packing
        attention += "" if tried.gradient_checkpointing else ", train.gradient_checkpointing: false"
        try:
            prove(config, dataclasses.replace(tried, lora=_LORA))
            lora = True
        except UserError:
            pass
        zero_3 = train_with_zero_3(config, tried)
        try:
            _export(config, name, folder)
        except Exception as error:  # the table then has no entry
            print(f"{name} was not exported: {_first_line(error)}", flush=True)
        break
    values = {**config.to_dict(), "architectures": [architecture]}
    return Family(
        name,
        architecture,
        attention,
        packing,
        reason,
        lora,
        zero_3,
        None,
        _fits(values, "convert"),
        _engine(architecture) if _fits(values, "direct") else None,
    )


def train_with_zero_3(config, options) -> str:
    """Returns `yes` if ZeRO-3 trains a twin as a plain loop does, else what goes wrong."""
    from snaketune.preflight.zero3_proof import prove_zero_3

    try:
        prove_zero_3(config, options)
    except UserError as error:
        return _reason(error)
    return "yes"


def _reason(error: UserError) -> str:
    """Returns what an error found, or what went wrong where that says more."""
    if "not a causal" in str(error):
        return "tokens see later tokens"
    found = str(error.found).splitlines()[0]
    return found.split(": logits differ")[0] if ": logits differ" in found else found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _fits(config: dict[str, Any], mode: str) -> bool:
    from snaketune.export.turbomind_limits import check_limits

    try:
        check_limits(config, {"mode": mode, "tp": 1, "session_len": None}, "", proved=True)
    except (UserError, KeyError):
        return False
    return True


def _engine(architecture: str) -> str:
    from snaketune.serving.lmdeploy_engines import TURBOMIND_ARCHITECTURES

    return "TurboMind" if architecture in TURBOMIND_ARCHITECTURES else "PyTorch"
