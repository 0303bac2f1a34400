"""Makes the folder that lmdeploy 0.10 and later serve. They load Hugging Face folders and have no converter.

The weights are the same files (hard links if the file system supports them). A Mistral model without a sliding window
is equivalent to a Llama with the same sizes, and lmdeploy 0.14 dropped Mistral from its TurboMind engine. So the config
is written as Llama's, which this engine accepts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snaketune.common.files import atomic_dir, link_or_copy, read_json, write_json, write_text
from snaketune.common.slurm import job_record
from snaketune.export.hf_config import rope_of
from snaketune.export.hf_folder import describe_files, require_model_folder
from snaketune.settings.schema import default_of


def make_serving_folder(
    model: Path,
    dst: Path,
    *,
    model_name: str,
    tp: int = default_of("turbomind.tp"),
    session_len: int | None = None,
) -> dict[str, Any]:
    """Makes a folder for lmdeploy >= 0.10, with the serving command in `serve.txt`.

    Args:
        model: Hugging Face folder.
        dst: Folder to create; an existing one is replaced.
        model_name: Name to serve the model under.
        tp: GPUs that share the model.
        session_len: Longest context; None uses the model's config.

    Returns:
        The manifest, which is also written to `manifest.json` in the folder.
    """
    from snaketune.serving.commands import lmdeploy_command

    config = read_json(require_model_folder(model) / "config.json")
    written = as_llama(config)
    with atomic_dir(dst) as folder:
        for path in sorted(model.rglob("*")):
            if path.is_file() and path.name not in ("config.json", "manifest.json"):
                target = folder / path.relative_to(model)
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)
        write_json(folder / "config.json", written)
        command = lmdeploy_command(dst, model_name, written["architectures"][0], tp, session_len)
        write_text(folder / "serve.txt", command + "\n")
        source = read_json(model / "manifest.json") if (model / "manifest.json").is_file() else {"files": {}}
        same = {name: entry for name, entry in source["files"].items() if name.endswith(".safetensors")}
        manifest = {
            "format": 1,
            "mode": "direct",
            "model_name": model_name,
            "chat_template": "the model's own",
            "architecture": written["architectures"][0],
            "trained_architecture": config["architectures"][0],
            "dtype": written["dtype"],
            "tp": tp,
            "rope_theta": rope_of(written)[0],
            "hf_weights_sha256": source.get("weights_sha256"),
            "files": describe_files(folder, same),
            **job_record(),
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def as_llama(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the equivalent Llama for a Mistral config without a sliding window; others unchanged."""
    if config.get("model_type") != "mistral" or config.get("sliding_window") is not None:
        return config
    llama = {key: value for key, value in config.items() if key != "sliding_window"}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return llama | {"attention_bias": False, "mlp_bias": False}
