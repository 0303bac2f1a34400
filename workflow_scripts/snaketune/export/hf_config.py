"""Makes a `config.json` that transformers 4, transformers 5 and lmdeploy 0.9 read alike.

A tuned model keeps its base model's own file, in which only the vocabulary and the dtype change: every reader that knows
the base then knows the tuned model. transformers 5 renames settings when it writes a config (`rope_parameters`, `dtype`,
aliases such as `num_local_experts`), and readers of the 4 line silently use their defaults for those they miss. So a file
in the new spelling gets the old one beside it, as far as the old one can express it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from snaketune.common.cli import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = ("float32", "float16", "bfloat16")
_DTYPE_KEYS = ("dtype", "torch_dtype")
# Settings of the base's stored weights or its place, which do not apply to the tuned model's folder.
_NOT_OURS = ("_name_or_path", "_model_name_or_path", "quantization_config")
_LONGROPE = {"rope_type", "short_factor", "long_factor", "original_max_position_embeddings"}
# transformers 4 knows no other family whose rope differs by layer type; of those, transformers 5 misreads the old names.
_GEMMA_3 = ("gemma3_text", "gemma3n_text")
_OWN_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# Tables of the vocabulary besides the embedding and the head, which transformers resizes with them (Gemma 3n and 4).
_OTHER_TABLES = ("vocab_size_per_layer_input",)
# Settings of a composite config that its text part does not repeat.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def rope_of(config: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """Reads the rotary embedding from a config in either spelling.

    Args:
        config: The parsed `config.json`.

    Returns:
        The rope base (None if the config has none), and the scaling entries (`rope_type`, `factor`, ...;
        empty for plain rope).

    Raises:
        UserError: Both spellings are present and give different bases.
    """
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    bases = {
        float(source["rope_theta"]) for source in (parameters, scaling, config) if "rope_theta" in source
    }
    if len(bases) > 1:
        raise UserError(
            "config.json has two rope bases",
            found=f"rope_theta {config.get('rope_theta')}, rope_parameters {parameters}, rope_scaling {scaling}",
            expected="one base",
            fix="keep the base that the model was trained with",
        )
    scaling = dict(scaling or parameters)
    scaling.pop("rope_theta", None)
    older_name = scaling.pop("type", "default")
    scaling.setdefault("rope_type", older_name)
    return (bases.pop() if bases else None), ({} if scaling["rope_type"] == "default" else scaling)


def tuned_config(base: dict[str, Any], model: PreTrainedModel, dtype: str) -> dict[str, Any]:
    """Returns the base model's `config.json` with the tuned model's vocabulary and dtype.

    Args:
        base: The base model's parsed `config.json`.
        model: The tuned model's class with its vocabulary; weights are not read. If it is only the text part of a
            composite base, so is the result.
        dtype: Type of the weights in the same folder, one of `DTYPES`.
    """
    config = copy.deepcopy(base)
    if base.get("model_type") != model.config.model_type and isinstance(base.get("text_config"), dict):
        shared = {key: base[key] for key in _SHARED if key in base}
        config = {**shared, **config["text_config"], "model_type": model.config.model_type}
    config["architectures"] = [type(model).__name__]
    if "auto_map" in config:
        config["auto_map"] = model.config.auto_map  # of a hub model: with the name of its repository
    text, grown = _text_part(config, model.config), model.config.get_text_config().to_dict()
    sizes = {key: grown[key] for key in ("vocab_size", *_OTHER_TABLES) if key in grown}
    text |= sizes
    if "vocab_size" in config:
        config["vocab_size"] = sizes["vocab_size"]
    return portable_config(config, dtype, model.config)


def _text_part(config: dict[str, Any], known: PretrainedConfig) -> dict[str, Any]:
    """Returns the part of a parsed config that describes the language model: all of it, or that of a composite."""
    text = known.get_text_config()
    names = [name for name in known.sub_configs if getattr(known, name) is text]
    return config.setdefault(names[0], {}) if names else config


def portable_config(
    config: Mapping[str, Any], dtype: str, known: PretrainedConfig | None = None
) -> dict[str, Any]:
    """Returns `config` with this dtype, and if transformers 5 wrote it, also with the old spelling of its settings.

    Args:
        config: A parsed `config.json` of transformers 4 or 5.
        dtype: Type of the weights in the same folder, one of `DTYPES`.
        known: The config as transformers read it, for the older names of its settings.
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_OURS}
    return _in_both_spellings(_with_dtype(kept, dtype), known) | dict.fromkeys(_DTYPE_KEYS, dtype)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config and its parts with this dtype wherever they state one."""
    return {
        key: dtype if key in _DTYPE_KEYS else _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def _in_both_spellings(config: dict[str, Any], known: PretrainedConfig | None) -> dict[str, Any]:
    """Returns a config with the old spelling of its parts that are in that of transformers 5."""
    parts = {
        key: _in_both_spellings(config[key], getattr(known, key))
        for key in getattr(known, "sub_configs", ())
        if isinstance(config.get(key), dict)
    }
    older = _older_names(config, known) | _older_rope(config) if "rope_parameters" in config else {}
    return config | parts | older


def _older_names(config: Mapping[str, Any], known: PretrainedConfig | None) -> dict[str, Any]:
    """Returns settings under the names that transformers 4 had for them, such as `num_experts`."""
    aliases = getattr(known, "attribute_map", {})
    return {old: config[new] for old, new in aliases.items() if new in config and old not in config}


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `rope_theta`, `rope_scaling` and their like for `rope_parameters`, {} if they cannot say the same.

    Of rope that differs by layer type they can say only Gemma 3's, which is plain in sliding layers.
    """
    parameters = config["rope_parameters"] or {}
    older: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in parameters.values()):
        local, scaled = rope_of({"rope_parameters": parameters.get("sliding_attention")})
        known = config.get("model_type") in _GEMMA_3
        if not known or len(parameters) > 2 or local is None or scaled:
            return {}
        older["rope_local_base_freq"] = local
        base, scaling = rope_of({"rope_parameters": parameters.get("full_attention")})
    else:
        base, scaling = rope_of(dict(config))
    if base is None:
        return {}
    partial = scaling.pop("partial_rotary_factor", parameters.get("partial_rotary_factor"))
    if partial is not None:
        older["partial_rotary_factor"] = partial
    if scaling.keys() == _LONGROPE:
        # transformers 4 accepts exactly three settings, and the original length beside them.
        older["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        scaling["type"] = scaling.pop("rope_type")
    older |= {"rope_theta": base, "rope_scaling": scaling or None}
    names = _OWN_NAMES.get(config.get("model_type"), {})
    return {names.get(name, name): value for name, value in older.items()}
