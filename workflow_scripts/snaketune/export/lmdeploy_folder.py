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
from snaketune.export.turbomind_limits import check_limits
from snaketune.serving.lmdeploy_engines import as_llama, session_length
from snaketune.settings.schema import default_of


def make_serving_folder(
    model: Path,
    dst: Path,
    *,
    model_name: str,
    tp: int = default_of("turbomind.tp"),
    session_len: int | None = default_of("turbomind.session_len"),
) -> dict[str, Any]:
    """Makes a folder for lmdeploy >= 0.10, with the serving command in `serve.txt`.

    Args:
        model: Hugging Face folder.
        dst: Folder to create; an existing one is replaced.
        model_name: Name to serve the model under.
        tp: GPUs that share the model.
        session_len: Longest context in tokens; None leaves it to lmdeploy, or uses the model's sliding window where
            lmdeploy's TurboMind engine would ignore it.

    Returns:
        The manifest, which is also written to `manifest.json` in the folder.

    Raises:
        UserError: lmdeploy cannot serve the model (`check_limits`).
    """
    from snaketune.serving.commands import lmdeploy_command

    config = read_json(require_model_folder(model) / "config.json")
    settings = {"mode": "direct", "tp": tp, "session_len": session_len}
    check_limits(config, settings, f"{model}: ", proved=False)
    written = as_llama(config)
    session_len = session_length(written, session_len)
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
            "session_len": session_len,
            "hf_weights_sha256": source.get("weights_sha256"),
            "files": describe_files(folder, same),
            **job_record(),
        }
        write_json(folder / "manifest.json", manifest)
    return manifest
