"""Makes a `config.json` that transformers 4, transformers 5 and lmdeploy 0.9 read alike.

transformers 5 writes `dtype` and `rope_parameters`. Readers of the 4 line look for `torch_dtype`, `rope_theta`
and `rope_scaling`, and silently use a rope base of 10,000 if these are missing. So the file has both spellings.
"""

from __future__ import annotations

from typing import Any

from snaketune.common.cli import UserError

DTYPES = ("float32", "float16", "bfloat16")


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


def portable_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns `config` with both spellings of rope and dtype.

    Rope parameters that differ by layer type (nested dictionaries) are kept unchanged, since the old spelling
    cannot express them.

    Args:
        config: A parsed `config.json` of transformers 4 or 5.
        dtype: Type of the weights in the same folder, one of `DTYPES`.
    """
    config = {
        key: value for key, value in config.items() if key not in ("_name_or_path", "_model_name_or_path")
    }
    config["dtype"] = config["torch_dtype"] = dtype
    nested = any(isinstance(value, dict) for value in (config.get("rope_parameters") or {}).values())
    base, scaling = (None, {}) if nested else rope_of(config)
    if base is not None:
        config["rope_theta"] = base
        config["rope_scaling"] = scaling or None
        config["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": base}
    return config
