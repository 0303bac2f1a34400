"""Converts a Hugging Face folder to a TurboMind workspace with lmdeploy 0.9.2's own converter.

lmdeploy 0.9.2.post1 is the last release that has one. This module runs in the converter's environment (transformers
4.57, numpy 1, lmdeploy) and must not need transformers 5 or mmengine's runner.

The converter rearranges numbers and writes raw files. It does not need a GPU, but its package imports the engine.
`_stand_ins` fills the gaps on a node without a usable GPU, and only there.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.files import atomic_dir, read_json, write_json
from snaketune.common.slurm import job_record
from snaketune.export.hf_folder import describe_files, require_in_range, require_model_folder
from snaketune.export.turbomind_config import WEIGHTS, converter_config, rope_numbers, shared_settings
from snaketune.export.turbomind_limits import check_limits
from snaketune.serving.lmdeploy_engines import ignored_window, longest_session
from snaketune.settings.schema import default_of


def convert(
    model_name: str,
    model_path: Path,
    dst_path: Path,
    *,
    chat_template: str = default_of("turbomind.chat_template"),
    tp: int = default_of("turbomind.tp"),
    dtype: str = default_of("turbomind.dtype"),
    session_len: int | None = default_of("turbomind.session_len"),
    model_format: str = "hf",
    group_size: int = 0,
    tokenizer_path: str | None = None,
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> dict[str, Any]:
    """Writes a TurboMind workspace and checks that its config agrees with the Hugging Face config.

    Args:
        model_name: Name to serve the model under; the guide's `internlm2-chat-7b` works for any model.
        model_path: Hugging Face folder.
        dst_path: Workspace to create; an existing one is replaced.
        chat_template: One of lmdeploy's built-in templates.
        tp: GPUs that share the model, a power of two.
        dtype: float16, bfloat16 or auto (bfloat16 for a bfloat16 model, else float16).
        session_len: Longest context in tokens; None uses the model's positions, or its sliding window if shorter.
        model_format: hf, awq, gptq or fp8.
        group_size: Group size of 4-bit weights; 0 uses the format's default.
        tokenizer_path: Another tokenizer file to copy.
        trust_remote_code: Allows a model folder with Python code, which lmdeploy would run.

    Returns:
        The manifest, which is also written to `manifest.json` in the workspace.

    Raises:
        UserError: lmdeploy is not installed or cannot convert the model (`check_limits`), the template is unknown,
            values do not fit float16, or the workspace disagrees with the Hugging Face config.
    """
    model_path = require_model_folder(model_path)
    hf_config = read_json(model_path / "config.json")
    if not trust_remote_code:
        _refuse_code(model_path)
    gpu = import_converter()
    from lmdeploy.model import MODELS
    from lmdeploy.turbomind.deploy import converter

    settings = {"mode": "convert", "tp": tp, "session_len": session_len}
    check_limits(hf_config, settings, f"{model_path}: ", proved=False)
    _require_template(chat_template, set(MODELS.module_dict))
    if model_format == "hf":
        _require_dtype_holds_weights(model_path, dtype, hf_config)
    with atomic_dir(dst_path) as folder, _readable(model_path, hf_config) as readable:
        # The manifest has everything that it prints about each split tensor. Its progress bar goes to stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            converter.main(
                model_name,
                str(readable),
                model_format=model_format,
                dtype=dtype,
                chat_template=chat_template,
                tokenizer_path=tokenizer_path,
                dst_path=str(folder),
                tp=tp,
                group_size=group_size,
            )
        written = _write_own_settings(folder, hf_config, session_len)
        _require_same_model(hf_config, written)
        _require_whole(folder, written, tp)
        manifest = _manifest(folder, model_name, model_path, written, tp, ignored_window(hf_config))
        write_json(folder / "manifest.json", manifest)
    if not gpu:
        print("converted without a GPU: the files are the same, but serving them needs one")
    return manifest


def fetch_model(name: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Returns a local folder: `name` itself, or the snapshot of that hub model.

    Raises:
        UserError: `name` is neither an existing folder nor a hub name (`owner/model`).
    """
    path = Path(name)
    if path.exists() or name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        return require_model_folder(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, cache_dir=download_dir, ignore_patterns=["*.pth"]))


def cuda_is_usable() -> bool:
    """True if libcuda loads, initialises and finds a device."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return libcuda.cuInit(0) == 0 and libcuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def import_converter() -> bool:
    """Prepares lmdeploy 0.9.2 for import on any node.

    Returns:
        True if a usable GPU was found.

    Raises:
        UserError: lmdeploy is not installed, or has no converter.
    """
    package = importlib.util.find_spec("lmdeploy")
    if package is None:
        raise UserError(
            "lmdeploy is not installed in this Python",
            found=sys.executable,
            expected="the converter's environment, with lmdeploy 0.9.2.post1",
            fix="run this script with the converter's Python, .venv-turbomind/bin/python",
        )
    root = Path(package.origin).parent
    if not (root / "turbomind" / "deploy" / "converter.py").is_file():
        raise UserError(
            "this lmdeploy has no TurboMind converter",
            found=f"lmdeploy {importlib.metadata.version('lmdeploy')}",
            expected="0.9.2.post1, the last release that has one",
            fix="pip install --no-deps lmdeploy==0.9.2.post1",
        )
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated")
    import torch

    gpu = cuda_is_usable() and torch.cuda.is_available()
    _stand_ins(root, gpu)
    return gpu


def _stand_ins(root: Path, gpu: bool) -> None:
    """Without a usable GPU, lets the converter's modules be imported and keeps tensors on the CPU.

    The stand-ins do not affect the converter's output. They replace the engine, which it never calls, and the
    moves of tensors to the device and back.
    """
    import torch

    # lmdeploy looks for its engine there. It fails to load without libcuda, cuBLAS or NCCL.
    sys.path.append(str(root / "lib"))
    try:
        importlib.import_module("_turbomind")
    except ImportError:
        engine = types.ModuleType("_turbomind")
        engine.__spec__ = importlib.machinery.ModuleSpec("_turbomind", None)
        engine.__getattr__ = _empty_class
        sys.modules["_turbomind"] = engine
    if gpu:
        return
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.empty_cache = lambda: None
    import lmdeploy.utils
    from lmdeploy.turbomind.deploy import converter

    # Otherwise the converter falls back from bfloat16 to float16 on hardware without bfloat16.
    lmdeploy.utils.is_bf16_supported = converter.is_bf16_supported = lambda *args: True


def _empty_class(name: str) -> type:
    if name.startswith("__"):  # inspect expects this of a module without a file
        raise AttributeError(name)
    return type(name, (), {})


def _refuse_code(model_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        if (model_path / name).is_file() and read_json(model_path / name).get("auto_map"):
            raise UserError(
                f"{model_path / name} refers to Python code (auto_map), which lmdeploy would run",
                fix="add --trust-remote-code if you trust that code",
            )


def _require_template(chat_template: str, templates: set[str]) -> None:
    if chat_template not in templates:
        raise UserError(
            "unknown chat template",
            found=chat_template,
            expected="one of " + ", ".join(sorted(templates)),
            fix="use --chat-template internlm2, the format that SnakeTune trains",
        )


@contextlib.contextmanager
def _readable(model_path: Path, hf_config: dict[str, Any]) -> Iterator[Path]:
    """Yields a folder of links to the model's files, with a config.json that lmdeploy reads as transformers does.

    Raises:
        UserError: lmdeploy refuses the model.
    """
    from lmdeploy.turbomind.supported_models import is_supported

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in model_path.iterdir():
            if path.name != "config.json":
                (folder / path.name).symlink_to(path.resolve())
        write_json(folder / "config.json", converter_config(hf_config))
        if not is_supported(name):
            raise UserError(
                f"lmdeploy 0.9.2.post1 refuses {model_path}",
                expected="a model that its supported_models.py accepts",
                fix="set turbomind.enabled: false, and serve the Hugging Face folder",
            )
        yield folder


def _require_dtype_holds_weights(model_path: Path, dtype: str, hf_config: dict) -> None:
    """Raises a `UserError` if a weight would overflow in the float16 to be written."""
    from snaketune.checkpoints.safetensors_files import open_safetensors, safetensors_files

    source = hf_config.get("torch_dtype") or hf_config.get("dtype")
    target = dtype if dtype != "auto" else ("bfloat16" if source == "bfloat16" else "float16")
    if target != "float16" or source == "float16" or not safetensors_files(model_path):
        return
    for name, tensor in open_safetensors(model_path).items():
        require_in_range(name, tensor, target)


def _write_own_settings(folder: Path, hf_config: dict[str, Any], session_len: int | None) -> dict[str, Any]:
    """Writes the session length and the rope's numbers to config.yaml, and returns all of it.

    lmdeploy takes all positions for a session, also beyond a sliding window, and computes yarn's factor from them.
    """
    import yaml

    path = folder / WEIGHTS / "config.yaml"
    written = yaml.safe_load(path.read_text())
    written["attention_config"]["rope_param"] |= rope_numbers(hf_config)
    model = written["model_config"]
    model["session_len"] = session_len or longest_session(hf_config) or model["session_len"]
    path.write_text(yaml.safe_dump(written))
    return written


def _require_same_model(hf_config: dict, written: dict) -> None:
    """Raises a `UserError` if the workspace's config.yaml disagrees with the Hugging Face config."""
    for what, (expected, found) in shared_settings(hf_config, written).items():
        if expected != found:
            raise UserError(
                f"TurboMind's config.yaml and the Hugging Face config.json disagree on {what.replace('_', ' ')}",
                found=found,
                expected=expected,
                fix="set turbomind.enabled: false, and serve the Hugging Face folder",
            )


def _require_whole(folder: Path, written: dict, tp: int) -> None:
    """Raises a `UserError` if the embedding, head or a norm is missing or has the wrong size."""
    model = written["model_config"]
    rows = -(-model["vocab_size"] // tp) * tp
    share = rows * model["hidden_units"] * 2 // tp  # 16-bit values
    expected = {f"{name}.{rank}.weight": share for name in ("tok_embeddings", "output") for rank in range(tp)}
    expected["norm.weight"] = model["hidden_units"] * 2
    expected |= {
        f"layers.{i}.attention_norm.weight": model["hidden_units"] * 2 for i in range(model["num_layer"])
    }
    for name, size in expected.items():
        path = folder / WEIGHTS / name
        found = path.stat().st_size if path.is_file() else "no such file"
        if found != size:
            raise UserError(
                f"the converter wrote an incomplete {name}", found=found, expected=f"{size} bytes"
            )


def _manifest(
    folder: Path, model_name: str, model_path: Path, written: dict, tp: int, window: int | None
) -> dict[str, Any]:
    model, rope = written["model_config"], written["attention_config"]["rope_param"]
    source = model_path / "manifest.json"
    # lmdeploy copies every JSON file of the source. Its manifest and weight index do not describe this folder.
    for name in ("manifest.json", "model.safetensors.index.json"):
        (folder / name).unlink(missing_ok=True)
    return {
        "format": 1,
        "model_name": model_name,
        "chat_template": model["chat_template"],
        "architecture": model["model_arch"],
        "dtype": model["weight_type"],
        "model_format": model["model_format"],
        "tp": tp,
        "rope_theta": rope["base"],
        "rope_type": rope["type"],
        "session_len": model["session_len"],
        "sliding_window": window,
        "vocab_size": model["vocab_size"],
        "tokenizer_size": model["tokenizer_size"],
        "hf_weights_sha256": read_json(source).get("weights_sha256") if source.is_file() else None,
        "versions": {
            name: importlib.metadata.version(name) for name in ("lmdeploy", "torch", "transformers")
        },
        "files": describe_files(folder),
        **job_record(),
    }
