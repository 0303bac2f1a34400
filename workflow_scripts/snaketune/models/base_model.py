"""Loads the base model for a device and grows it by the rows that new tokens need."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from snaketune.common.cli import UserError
from snaketune.models.device import resolve_dtype, training_device
from snaketune.models.document_borders import keep_documents_apart
from snaketune.models.packed_attention import PACKED, resolve_attention
from snaketune.models.vocabulary_rows import find_new_tokens, grown_rows
from snaketune.settings.schema import default_of


def load_base_model(
    model_path: str,
    dtype: str | torch.dtype = default_of("train.dtype"),  # noqa: B008 (a string)
    attention: str = default_of("train.attention"),
    trust_remote_code: bool = default_of("model.trust_remote_code"),
) -> PreTrainedModel:
    """Loads a causal language model without a cache, with attention that separates packed documents.

    Args:
        model_path: A local folder, or a hub name.
        dtype: `auto` (by device), a name such as `bfloat16`, or a torch dtype.
        attention: `auto`, `sdpa`, `flash_attention_2`, or any other name that transformers knows.
        trust_remote_code: Runs Python code that comes with the model.

    Raises:
        UserError: A path that looks local has no model.
    """
    if Path(model_path).is_absolute() or model_path.startswith("."):
        _check_folder(Path(model_path))
    device = training_device()
    return fit_attention(
        attention,
        device,
        lambda name: AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=resolve_dtype(dtype, device) if isinstance(dtype, str) else dtype,
            attn_implementation=name,
            trust_remote_code=trust_remote_code,
        ),
    )


def read_model_config(model_path: str, trust_remote_code: bool) -> PretrainedConfig:
    """Returns the config of a local folder or a hub model.

    Raises:
        UserError: A path that looks local has no model, or its config is not readable.
    """
    if Path(model_path).is_absolute() or model_path.startswith("."):
        _check_folder(Path(model_path))
    try:
        return AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"the config of {model_path} is not readable",
            found=str(error).strip().splitlines()[0][:300],
            expected="an architecture that transformers knows",
            fix="correct model.path or model.hub; set model.trust_remote_code if you trust the model's own code",
        ) from None


def fit_attention(attention: str, device: str, load: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Loads a model with an attention that separates packed documents, and layers that do.

    Args:
        attention: As in `load_base_model`. For `auto`, an architecture that does not support the first choice gets the
            next: flash attention on a GPU, one document at a time, `eager`.
        device: `cpu` or `cuda`.
        load: Loads the model with an attention that transformers knows.
    """
    names = [resolve_attention(attention, device)]
    if attention == "auto":
        names += [name for name in (PACKED, "eager") if name not in names]
    for name in names:
        try:
            model = load(name)
        except (
            ValueError,
            ImportError,
            KeyError,
        ):  # transformers' refusals of an attention, by kind of model
            if name == names[-1]:
                raise
            continue
        own = not (model._supports_attention_backend or model._supports_sdpa)
        if not (
            own and name == PACKED and attention == "auto"
        ):  # else its layers compute attention themselves
            break
    if attention == "auto" and name.startswith("flash") and _needs_packed(model):
        model.set_attn_implementation(PACKED)
    # With a cache, transformers 5 does not detect packed documents, and they would attend to each other.
    model.config.use_cache = False
    keep_documents_apart(model)
    return model


def _needs_packed(model: PreTrainedModel) -> bool:
    """True if the model attends within chunks or with sinks, which flash attention 2 cannot do."""
    chunks = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    return bool(chunks) or any(hasattr(module, "sinks") for module in model.modules())


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a model folder",
            found="no config.json" if folder.is_dir() else "no such folder",
            expected="config.json and *.safetensors",
            fix="set model_path to a Hugging Face model folder or a hub name",
        )


def grow_to_tokenizer(
    model: PreTrainedModel, tokenizer_path: str | None, base_path: str | None
) -> tuple[list[int], list[int]]:
    """Grows a base model for an extended tokenizer, in training, evaluation, export and the parity check.

    Args:
        model: Changed in place.
        tokenizer_path: Folder of the extended tokenizer; None leaves the model unchanged.
        base_path: The base model, see `find_new_tokens`.

    Returns:
        (ids of the tokens that are new to the base, rows whose mean initialised theirs)
    """
    if tokenizer_path is None:
        return [], []
    vocab_size, new_ids = find_new_tokens(tokenizer_path, base_path)
    return new_ids, resize_for_tokenizer(model, vocab_size, new_ids)


def resize_for_tokenizer(model: PreTrainedModel, vocab_size: int, new_ids: Sequence[int]) -> list[int]:
    """Resizes a model for a tokenizer and initialises the rows of new tokens with the mean of the old rows.

    XTuner 0.2.0 also grows the embedding to a multiple of 64, but then sets the *last* n rows to the mean. With
    padding, these are not the rows of the new ids (Mistral: 32058-32063 instead of 32000-32005). This function sets
    exactly the rows of `new_ids`, in the input embedding and in the head, even if the base already had spare rows for
    them. Rows without a token (padding) get the mean too, so equal inputs give equal bytes.

    Args:
        model: Changed in place; supports tied and untied heads, and parameters partitioned by ZeRO-3.
        vocab_size: Entries of the tokenizer.
        new_ids: Ids that the tokenizer has and the base tokenizer does not.

    Returns:
        The rows that were averaged, without a padded base's spare rows, which were never trained.

    Raises:
        UserError: A new id does not fit the tokenizer.
    """
    outside = [i for i in new_ids if not 0 <= i < vocab_size]
    if outside:
        raise UserError(
            "new token ids are outside the tokenizer", found=outside, expected=f"0 to {vocab_size - 1}"
        )
    old_rows = _rows(model.get_input_embeddings())
    rows = grown_rows(old_rows, vocab_size)
    if rows > old_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    new = set(new_ids)
    old = [i for i in range(min(old_rows, vocab_size)) if i not in new]
    fresh = [*sorted(new), *(i for i in range(old_rows, rows) if i not in new)]
    if not fresh:
        return old
    head = model.get_output_embeddings()
    for layer in [model.get_input_embeddings(), *([] if head is None or _is_tied(model) else [head])]:
        parameters = [layer.weight, *([layer.bias] if getattr(layer, "bias", None) is not None else [])]
        with _gathered(parameters), torch.no_grad():
            for parameter in parameters:
                if parameter.numel():
                    # fp32: a mean over 32,000 rows in bfloat16 would lose most of its digits.
                    mean = parameter[torch.tensor(old, device=parameter.device)].float().mean(dim=0)
                    parameter[torch.tensor(fresh, device=parameter.device)] = mean.to(parameter.dtype)
    return old


def make_constants_buffers(model: PreTrainedModel) -> None:
    """Turns the parameters that an architecture never trains into buffers of the same names.

    Some mixtures of experts have such a correction of the router's scores (Ernie 4.5, Afmoe), others have it as a
    buffer (DeepSeek-V3). transformers makes all parameters trainable when it loads them, so weight decay would shrink
    it. DeepSpeed saves buffers, and keeps in float32 those that transformers keeps so. (A model that was loaded in
    shards keeps its parameters.)
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        as_defined = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    for name, parameter in as_defined.named_parameters():
        if not parameter.requires_grad:
            owner, _, own_name = name.rpartition(".")
            module = model.get_submodule(owner)
            value = getattr(module, own_name).data
            delattr(module, own_name)
            module.register_buffer(own_name, value)


def weights_kept_in_float32(model: PreTrainedModel) -> list[str]:
    """Returns the names of the parameters and buffers that transformers keeps in float32 if the others are bfloat16."""
    patterns = [
        each.replace("*", ".*") for each in getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    ]
    names = [name for name, value in model.state_dict(keep_vars=True).items() if value.is_floating_point()]
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _rows(layer: nn.Module) -> int:
    # A ZeRO-3 parameter is empty until gathered; ds_shape has its full shape.
    return (getattr(layer.weight, "ds_shape", None) or layer.weight.shape)[0]


def _gathered(parameters: list[nn.Parameter]):
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    # Rank 0 writes; the other ranks get its values when the context exits.
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
