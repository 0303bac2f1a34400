"""Compares the logits of the training checkpoint, the Hugging Face folder in transformers 5 and 4, and TurboMind's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.checkpoints.safetensors_files import open_safetensors
from snaketune.common.files import read_json
from snaketune.export.hf_convert import training_dtype
from snaketune.export.lora_weights import grown_base
from snaketune.export.turbomind_folder import TurboMindFolder
from snaketune.models.device import attention_on
from snaketune.models.lora import ADAPTER, add_lora
from snaketune.models.packed_attention import resolve_attention
from snaketune.parity.layerwise import empty_with_buffers
from snaketune.parity.long_prompts import limits_of, long_batch, reachable_length
from snaketune.parity.model_logits import Batch, checkpoint_logits, folder_logits, prompts_batch
from snaketune.parity.reference_forward import recorded_routes, turbomind_logits
from snaketune.parity.turbomind_proof import LARGEST_DIFFERENCE, compare_logits
from snaketune.settings.schema import default_of
from snaketune.training.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Two versions of transformers sum the experts in another order, and a router may then choose another of two equal ones.
LARGEST_WITH_EXPERTS = 1e-2
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NO_READINGS = (
    "not compared: only a run with turbomind.enabled: true and turbomind.mode: convert has that environment"
)


def compare_models(
    config: TrainConfig,
    state: Mapping[str, torch.Tensor],
    hf: Path,
    turbomind: Path | None,
    prompts: list[list[int]],
    reading: Mapping[str, Any] | None = None,
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> dict[str, Any]:
    """Compares the logits of the checkpoint, the Hugging Face folder and the TurboMind files.

    Each is compared with its predecessor, whose weights are first rounded to the same dtype. Then only the order of
    summation differs. `rounding_difference` is the effect of the rounding itself.

    Args:
        config: The training config; names the base model and the attention.
        state: The checkpoint's weights by name.
        hf: Hugging Face folder.
        turbomind: TurboMind workspace, or None.
        prompts: Token ids.
        reading: Logits of the same prompts from transformers 4, see `prompt_readers.read_logits`.
        trust_remote_code: Runs Python code that comes with the model.

    Returns:
        {"logits": [{"of", "against", "dtype", "tokens", "relative_difference", "largest_difference",
        "top1_agreement", "rounding_difference"}], "limits": {name: tokens}, "unread": [{"reader", "why"}]}; `tokens` is
        the length of the longest prompt, `limits` are the lengths after which the model computes differently

    Raises:
        UserError: Logits differ by more than fp32 rounding explains.
    """
    from transformers import AutoConfig

    base, written = (
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        for path in (config.model_path, hf)
    )
    attention = _attention_on_cpu(config, base, trust_remote_code)
    options = {"attention": attention, "trust_remote_code": trust_remote_code}
    size = sum(each.shape.numel() for each in open_safetensors(hf).stored.values())
    own = [reachable_length(each, size, eager=attention == "eager") for each in (base, written)]
    theirs = (reading or {}).get("long")
    lengths = sorted({*own, theirs["tokens"] if theirs else None} - {None})
    batches = [prompts_batch(prompts), *(long_batch(prompts, length) for length in lengths)]

    dtype = getattr(torch, read_json(hf / "config.json")["dtype"])
    exact = rounded = checkpoint_logits(config.model_path, state, batches, **options)
    if any(kind.is_floating_point and kind != dtype for kind in _dtypes(state)):
        rounded = checkpoint_logits(config.model_path, state, batches, rounded_to=dtype, **options)
    with recorded_routes() as routes:
        ours = folder_logits(hf, batches, **options)
    # The folder may lack vocabulary rows without a token.
    rounded, exact = ([each[:, : ours[0].shape[-1]] for each in logits] for logits in (rounded, exact))
    longest = batches[-1].ids.shape[1]
    rows = [_row("Hugging Face", "checkpoint", dtype, longest, rounded, ours, exact)]
    unread = [{"reader": "transformers 4", "why": _NO_READINGS}]
    if reading is not None:
        unread = [{"reader": reading["reader"], "why": reading["unread"]}] if reading["unread"] else []
    if reading is not None and not unread:
        compared = [(ours[0], reading["prompts"])]
        if theirs:
            compared.append((ours[1 + lengths.index(theirs["tokens"])], theirs))
        tokens = max(batches[0].ids.shape[1], theirs["tokens"] if theirs else 0)
        rows.append(_older_row(reading["reader"], dtype, tokens, compared, base))
    if turbomind is not None:
        folder, expected = TurboMindFolder(turbomind), ours[0]
        if folder.dtype != dtype:
            with recorded_routes() as routes:
                (expected,) = folder_logits(hf, batches[:1], rounded_to=folder.dtype, **options)
        rows.append(_turbomind_row(folder, batches[0], routes, expected, ours[0]))
    return {"logits": rows, "limits": limits_of(base), "unread": unread}


def _attention_on_cpu(config: TrainConfig, base: PretrainedConfig, trust_remote_code: bool) -> str:
    """Returns transformers' name of the training's attention, or `eager` if a CPU or the architecture cannot run it."""
    name = resolve_attention(attention_on("cpu", config.attention), "cpu")
    try:
        empty_with_buffers(base, attn_implementation=name, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, KeyError):
        return "eager"
    return name


def _row(
    of: str,
    against: str,
    dtype: torch.dtype,
    tokens: int,
    expected: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    unrounded: Sequence[torch.Tensor],
) -> dict[str, Any]:
    pairs = zip(expected, found, strict=True)
    differences = _worst([compare_logits(*pair, of, f"the {against}") for pair in pairs])
    wholes = zip(expected, unrounded, strict=True)
    rounding = max(((each - whole).norm() / whole.norm()).item() for each, whole in wholes)
    name = str(dtype).removeprefix("torch.")
    row = {"of": of, "against": against, "dtype": name, "tokens": tokens}
    return {**row, **differences, "rounding_difference": rounding}


def _turbomind_row(
    folder: TurboMindFolder,
    batch: Batch,
    routes: Sequence[torch.Tensor],
    expected: torch.Tensor,
    unrounded: torch.Tensor,
) -> dict[str, Any]:
    """Compares the tokens that fit into a session; the engine never sees later ones."""
    length = min(batch.ids.shape[1], folder.session_len)
    served = (torch.arange(batch.ids.shape[1]) < length).expand_as(batch.wanted)[batch.wanted]
    # Those of longer batches come after this one's.
    routes = [route.unflatten(0, batch.ids.shape)[:, :length] for route in routes[: folder.layers]]
    found = turbomind_logits(folder, batch.ids[:, :length], routes)[batch.wanted[:, :length]]
    rows = [expected[served]], [found], [unrounded[served]]
    return _row("TurboMind", "Hugging Face", folder.dtype, length, *rows)


def _older_row(
    reader: str,
    dtype: torch.dtype,
    tokens: int,
    compared: Sequence[tuple[torch.Tensor, Mapping[str, list]]],
    config: PretrainedConfig,
) -> dict[str, Any]:
    """Compares with the largest logits of each token as transformers 4 has them."""
    text = config.get_text_config()
    experts = any(getattr(text, name, None) for name in _EXPERTS)
    limit = LARGEST_WITH_EXPERTS if experts else LARGEST_DIFFERENCE
    fix = "serve this model with transformers 5 only, and set parity.enabled: false to evaluate it without the gate"
    found = []
    for ours, theirs in compared:
        same = ours.gather(1, torch.tensor(theirs["ids"]))
        values = torch.tensor(theirs["values"])
        found.append(compare_logits(same, values, reader, "the training's transformers", limit, fix))
    row = {"of": reader, "against": "Hugging Face", "dtype": str(dtype).removeprefix("torch.")}
    return {**row, "tokens": tokens, **_worst(found), "rounding_difference": 0.0}


def _worst(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: (min if name == "top1_agreement" else max)(row[name] for row in rows)
        for name in ("relative_difference", "largest_difference", "top1_agreement")
    }


def _dtypes(state: Mapping[str, torch.Tensor]) -> set[torch.dtype]:
    return {each.dtype for each in getattr(state, "stored", state).values()}


@torch.no_grad()
def trained_weights(
    config: TrainConfig,
    checkpoint: Path,
    record: dict[str, Any],
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> Mapping[str, torch.Tensor]:
    """Returns all weights of a trained model by their names in it, for one comparison.

    Merges those of a LoRA run here, independently of the conversion: linear layers by our own arithmetic, others
    (experts) by the update that peft's layer adds when it runs.

    Args:
        config: The training config.
        checkpoint: An `iter_N.pth`.
        record: The run's `train.json`, or {}.
        trust_remote_code: Runs Python code that comes with the model.
    """
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    lora, state = config.lora, read_state_dict(checkpoint)
    if lora is None:
        return state
    dtype = training_dtype(config, record, checkpoint, state)
    model, new_ids = grown_base(config, dtype, trust_remote_code)
    weights = model.float().state_dict()  # the memory of the layers below, by the base model's names
    add_lora(model, lora, new_ids)
    model.load_state_dict(dict(state), strict=False)
    for name, layer in model.named_modules():
        if type(layer) is Linear:
            a, b = (state[f"{name}.lora_{each}.{ADAPTER}.weight"] for each in "AB")
            update = lora["alpha"] / lora["rank"] * (b @ a)
            layer.get_base_layer().weight += update.T if layer.fan_in_fan_out else update
        elif isinstance(layer, LoraLayer):
            layer.get_param().add_(layer.get_delta_weight(ADAPTER))
        elif isinstance(layer, TrainableTokensLayer) and layer.tied_adapter is None:
            rows = state[f"{name}.trainable_tokens_delta.{ADAPTER}"]
            layer.get_base_layer().weight[layer.token_indices[ADAPTER]] = rows
    return weights
