"""Small models that look trained, for the conversion tests, and the converter's Python."""

from __future__ import annotations

import shutil
from pathlib import Path

from environments import python_of


def converter_python() -> str:
    """Returns the Python of the TurboMind environment (lmdeploy 0.9.2.post1, transformers 4.57)."""
    return python_of("turbomind", "`make setup`")


def extend_tokenizer(base: Path, folder: Path, template: str = "internlm2_chat"):
    """Writes the tokenizer of `base`, extended with a chat template's control tokens, to `folder` and loads it."""
    from snaketune.chat_format.template_file import load_template
    from snaketune.encoding.extend_tokenizer import extend, save_tokenizer
    from snaketune.encoding.tokenizer import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    save_tokenizer(folder, *extend(text, base, load_template(template)))
    return load_tokenizer(folder)


def write_base(folder: Path, tokenizer_dir: Path, kind: str = "mistral", **settings) -> Path:
    """Writes a random two-layer base model with heads of size 64 (for TurboMind), and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from snaketune.encoding.tokenizer import parse_tokenizer, rows_needed

    torch.manual_seed(1)
    rows = rows_needed(
        parse_tokenizer((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"), tokenizer_dir)
    )
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": rows,
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 54321.0},
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # large enough logits to reveal a wrong rope base
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, folder / name)
    return folder


def train_config(**own) -> str:
    """Returns the text of a training config with default settings, except for those given."""
    from snaketune.settings.command_line import defaults_of
    from snaketune.training.config_template import render_config

    settings = defaults_of("render_train_config")
    given = {name: own.pop(name) for name in list(own) if name in settings}
    return render_config(settings | given, num_workers=0, log_interval=1, **own)


def write_checkpoint(base: Path, tokenizer_dir: Path, run: Path, attention: str = "auto"):
    """Writes a training config and a weights-only checkpoint of the grown base, as in training.

    Returns:
        (config path, checkpoint path, model in memory)
    """
    import torch

    from snaketune.models.base_model import grow_to_tokenizer, load_base_model

    model = load_base_model(str(base), "float32", attention).eval()
    grow_to_tokenizer(model, str(tokenizer_dir), str(base))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    run.mkdir(parents=True, exist_ok=True)
    config = run / "train_config.py"
    paths = {"model_path": str(base), "tokenizer_path": str(tokenizer_dir), "train_folder": "nowhere"}
    config.write_text(train_config(**paths, attention=attention))
    checkpoint = run / "iter_7.pth"
    torch.save(
        {"state_dict": {f"llm.{name}": value for name, value in model.state_dict().items()}}, checkpoint
    )
    return config, checkpoint, model


def write_lora_checkpoint(
    base: Path, tokenizer_dir: Path, run: Path, dtype: str = "float32", attention: str = "auto"
):
    """Writes a LoRA training config and a checkpoint of random trained parts.

    Returns:
        (config path, checkpoint path, PEFT's model in memory, in fp32)
    """
    import torch

    from snaketune.common.files import write_json
    from snaketune.export.lora_weights import grown_base
    from snaketune.models.lora import add_lora
    from snaketune.training.train_config import load_config

    run.mkdir(parents=True, exist_ok=True)
    config = run / "train_config.py"
    settings = {"model_path": str(base), "tokenizer_path": str(tokenizer_dir), "train_folder": "nowhere"}
    config.write_text(train_config(**settings, lora_rank=2, lora_alpha=3, attention=attention))
    write_json(run / "identity.json", {"fields": {"dtype": dtype}})
    loaded = load_config(config)
    model, new_ids = grown_base(loaded, dtype)
    tuner = add_lora(model.float(), loaded.lora, new_ids)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    torch.manual_seed(3)
    for value in trained.values():
        torch.nn.init.normal_(value)
    torch.save({"state_dict": {f"llm.{name}": value for name, value in trained.items()}}, run / "iter_7.pth")
    return config, run / "iter_7.pth", tuner


def write_tuned(model: Path, tokenizer: Path, root: Path):
    """Writes a tuned model of a base to `tokenizer` and `hf` below `root`.

    Returns:
        (tokenizer folder, loaded tokenizer, Hugging Face folder)
    """
    from snaketune.export.hf_convert import convert

    extended = extend_tokenizer(tokenizer, root / "tokenizer")
    config, checkpoint, _ = write_checkpoint(model, root / "tokenizer", root / "run")
    convert(config, checkpoint, root / "hf")
    return root / "tokenizer", extended, root / "hf"
