"""Small tokenizers of different kinds, with the tokens of a chat template."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from snaketune.encoding.base_tokenizer import open_tokenizer
from snaketune.encoding.tokenizer import ExtendedTokenizer, load_tokenizer

CORPUS = [
    "Hello, how are you today? I am fine, thank you. 12 * 7 = 84.\n",
    'print("hello")\nfor i in range(10):\n    x = x + 1\n\n',
    '{"name": "get_weather", "arguments": {"city": "上海", "unit": "celsius"}}',
    "你好，世界。今天天气怎么样？ system user assistant environment name=\n",
]
# "newlines" merges line breaks with each other and with the text before them, as Llama 3's and Qwen's do.
KINDS = ("byte_level", "sentencepiece", "smollm_like", "newlines")
_NEWLINES = ["a.\n\nb\n\n\nc,\n\n\n\n", "user\n\nassistant\n\n \n\n>\n\n", "x\n y\n\n  z\n"]
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_base(folder: Path, first: list[str], config: dict, newlines: bool = False) -> Path:
    """Writes a byte-level BPE tokenizer whose first ids are `first`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if newlines:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((CORPUS + _NEWLINES * 9 * newlines) * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in first])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_model(folder: Path, **options) -> Path:
    """Trains a SentencePiece BPE model with Mistral's settings and returns its path."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "corpus.txt"
    text.write_text("\n".join("".join(CORPUS * 20).splitlines()), encoding="utf-8")
    settings = {
        "model_type": "bpe",
        "vocab_size": 430,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), **settings
    )
    return folder / "tokenizer.model"


@functools.cache
def extended_folder(kind: str = "byte_level", template: str = "internlm2_chat") -> Path:
    """Returns the folder `extended` with the extended tokenizer of a kind. The folder `base` beside it has the base."""
    folder = Path(tempfile.mkdtemp(prefix="ftdp_tokenizer_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if kind in ("byte_level", "newlines"):
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        byte_level_base(folder / "base", ["<unk>", "<s>", "</s>"], config, kind == "newlines")
    elif kind == "bang":
        # As in GPT-2, Llama 3 and Qwen: id 0 is "!".
        byte_level_base(folder / "base", [], {"bos_token": "<s>", "eos_token": "</s>"})
        path = folder / "base" / "tokenizer.json"
        bang = Tokenizer.from_file(str(path))
        bang.add_special_tokens(
            [AddedToken(each, special=True, normalized=False) for each in ("<s>", "</s>")]
        )
        assert bang.token_to_id("!") == 0
        bang.save(str(path))
    elif kind == "smollm_like":
        first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}
        byte_level_base(folder / "base", first, config)
    else:
        sentencepiece_model(folder / "base")
    open_tokenizer(folder / "base", folder / "extended", template=template)
    return folder / "extended"


@functools.cache
def small_tokenizer(kind: str = "byte_level", template: str = "internlm2_chat") -> ExtendedTokenizer:
    """Returns the extended tokenizer of a kind."""
    return load_tokenizer(extended_folder(kind, template))
