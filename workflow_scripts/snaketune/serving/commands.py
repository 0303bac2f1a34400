"""Commands that serve a tuned model with lmdeploy, vLLM and SGLang."""

from __future__ import annotations

import shlex
from pathlib import Path

from snaketune.common.files import read_json
from snaketune.serving.lmdeploy_engines import TURBOMIND_ARCHITECTURES
from snaketune.settings.schema import default_of

# The only shipped template whose tool calls these servers can parse.
_PARSED = "internlm2_chat"


def stop_tokens(folder: Path) -> str:
    """Returns the tokens in a model folder's generation_config.json that end an answer, with their ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = read_json(folder / "generation_config.json")["eos_token_id"]
    return " or ".join(f"{tokenizer.id_to_token(each)} ({each})" for each in ids)


def lmdeploy_command(
    folder: Path,
    name: str,
    architecture: str,
    tp: int = default_of("turbomind.tp"),
    session_len: int | None = default_of("turbomind.session_len"),
    template: str = _PARSED,
) -> str:
    """Returns the lmdeploy >= 0.10 command for a Hugging Face folder.

    Args:
        folder: The folder.
        name: Name to serve the model under.
        architecture: Name of the model's class.
        tp: GPUs that share the model.
        session_len: Longest context in tokens, from `session_length`; None leaves it to lmdeploy.
        template: The model's chat template.
    """
    backend = "turbomind" if architecture in TURBOMIND_ARCHITECTURES else "pytorch"
    words = ["lmdeploy", "serve", "api_server", str(folder), "--model-name", name, "--backend", backend]
    words += ["--tp", str(tp)]
    words += ["--session-len", str(session_len)] if session_len else []
    words += ["--tool-call-parser", "internlm"] if template == _PARSED else []
    return shlex.join(words)


def converted_command(
    folder: Path,
    name: str,
    chat_template: Path,
    tp: int = default_of("turbomind.tp"),
    session_len: int | None = default_of("turbomind.session_len"),
) -> str:
    """Returns the lmdeploy 0.9.2.post1 command for a TurboMind workspace.

    Args:
        folder: The workspace.
        name: Name to serve the model under.
        chat_template: File with `chat_template_config`.
        tp: The tp of the conversion.
        session_len: Longest context in tokens; None uses config.yaml's, which is the same.
    """
    words = ["lmdeploy", "serve", "api_server", str(folder), "--model-name", name, "--tp", str(tp)]
    words += ["--session-len", str(session_len)] if session_len else []
    return shlex.join([*words, "--chat-template", str(chat_template), "--tool-call-parser", "internlm"])


def chat_template_config(name: str) -> dict[str, str | None]:
    """Returns the config of lmdeploy 0.9.2's chat template without its own system message at the start."""
    return {"model_name": name, "meta_instruction": None}


def vllm_command(
    folder: Path, name: str, tp: int = default_of("turbomind.tp"), template: str = _PARSED
) -> str:
    """Returns the vLLM command."""
    words = ["vllm", "serve", str(folder), "--served-model-name", name, "--tensor-parallel-size", str(tp)]
    words += ["--enable-auto-tool-choice", "--tool-call-parser", "internlm"] if template == _PARSED else []
    return shlex.join(words)


def sglang_command(folder: Path, name: str, tp: int = default_of("turbomind.tp")) -> str:
    """Returns the SGLang command.

    It has no tool parser: that of 0.5.23 for InternLM expects a space between the two tokens that begin a call.
    """
    words = ["python", "-m", "sglang.launch_server", "--model-path", str(folder)]
    return shlex.join([*words, "--served-model-name", name, "--tp-size", str(tp)])
