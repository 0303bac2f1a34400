"""Proves, on a twin without the base's weights, that a base's architecture trains correctly in packed sequences.

Each document of a packed sequence must get the logits, loss and gradients that it gets alone with transformers' plain
attention. What cannot be proved is refused here, in seconds on one CPU core, instead of trained wrongly.
"""

from __future__ import annotations

import copy
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

from snaketune.common.cli import UserError
from snaketune.models.base_model import fit_attention
from snaketune.models.isolation import BOUND, LENGTHS, Row, logits_of, random_row, relative_difference
from snaketune.models.leaking_layers import leaking_layers
from snaketune.models.lora import add_lora, describe_lora
from snaketune.models.twin import (
    TRAINED_LENGTH,
    VOCABULARY,
    build,
    make_twin,
    rope_parameters,
    trained_length,
)
from snaketune.tokenized.bin_reader import IGNORE_INDEX
from snaketune.training.supervised_finetune import SupervisedFinetune

_SEEDS = (0, 1)  # a router may choose between two equal experts by rounding: one of two twins has to be right
_BESIDE_LONG = (
    45,
    TRAINED_LENGTH + 26,
    TRAINED_LENGTH + 6,
)  # two documents are longer than the trained length
_GRADIENT_BOUND = 1e-3


@dataclass(frozen=True)
class TrainingOptions:
    """The settings of a training that decide whether an architecture trains correctly.

    Attributes:
        attention: `train.attention`.
        packing: `packing.mode`.
        max_length: Tokens of a packed sequence.
        gradient_checkpointing: `train.gradient_checkpointing`.
        lora: `train.lora`, or None.
        trust_remote_code: Runs Python code that comes with the base.
    """

    attention: str
    packing: str
    max_length: int
    gradient_checkpointing: bool
    lora: Mapping[str, Any] | None = None
    trust_remote_code: bool = field(kw_only=True)


def prove(config: PretrainedConfig, options: TrainingOptions) -> dict[str, Any]:
    """Runs all checks on twins of a base.

    Args:
        config: The base's config.
        options: The training's settings.

    Returns:
        {"format", "model_type", "attention", "layers", "twin": {"layers", "weights"}, "checks": [{"name", "difference",
        "bound"}], "lora", "seconds", "peak_bytes"}; a difference is relative.

    Raises:
        UserError: A check fails, or the architecture cannot be run. Names the layers and a setting that works.
    """
    started = time.perf_counter()
    for number, seed in enumerate(_SEEDS):
        reference = make_twin(
            config,
            longest=options.max_length,
            trust_remote_code=options.trust_remote_code,
            seed=seed,
        )
        try:
            report = _prove(config, reference, options)
        except UserError:
            if number + 1 == len(_SEEDS):
                raise
            continue
        except Exception as error:  # whatever the model's own code raises
            raise _cannot_run(config, options, error) from error
        return {
            "format": 1,
            "model_type": config.model_type,
            **report,
            "twin": {
                "layers": reference.config.get_text_config().num_hidden_layers,
                "weights": sum(each.numel() for each in reference.parameters()),
            },
            "seconds": round(time.perf_counter() - started, 2),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    raise AssertionError("no seed")


def _prove(config: PretrainedConfig, reference: PreTrainedModel, options: TrainingOptions) -> dict[str, Any]:
    model = trained_twin(reference, options)
    rows = _rows(config, options)
    checks = [_check_causal(reference)]
    checks += [
        _check_isolation(config, model, reference, rows, options),
        _check_gradients(model, reference, rows[-1], options),
        _check_saved(reference),
    ]
    lora = None
    if options.lora is not None:
        check, lora = _check_merge(reference, options)
        checks.append(check)
    return {"attention": model.config._attn_implementation, "checks": checks, "lora": lora}


def _rows(config: PretrainedConfig, options: TrainingOptions) -> list[Row]:
    lengths = [LENGTHS]
    if _length_dependent(config) and options.max_length > _rope_limit(config):
        lengths.append(_BESIDE_LONG)
    return [random_row(VOCABULARY, each) for each in lengths]


def _length_dependent(config: PretrainedConfig) -> str | None:
    """Returns the type of a rope whose frequencies depend on the length of the input, else None."""
    kinds = {each.get("rope_type") for each in rope_parameters(config.get_text_config().to_dict())}
    return next(iter(kinds & {"dynamic", "longrope"}), None)


def _rope_limit(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    return min(trained_length(each, text) for each in rope_parameters(text.to_dict()))


def trained_twin(reference: PreTrainedModel, options: TrainingOptions) -> PreTrainedModel:
    """Returns the reference with the attention of the training."""
    model = fit_attention(
        options.attention,
        "cpu",
        lambda name: build(reference.config, name, options.trust_remote_code),
    )
    model.load_state_dict(reference.state_dict())
    return model.eval()


def _difference_from_alone(
    model: PreTrainedModel, reference: PreTrainedModel, row: Row, options: TrainingOptions
) -> float:
    """Returns how far a row's logits, as training computes them, are from those of its documents alone."""
    documents = row.documents()
    # Each by a model that has seen nothing else.
    alone = torch.cat([logits_of(copy.deepcopy(reference), each) for each in documents])
    rows = documents if options.packing == "single" else [row]
    return relative_difference(torch.cat([logits_of(model, each) for each in rows]), alone)


@torch.no_grad()
def _check_causal(reference: PreTrainedModel) -> dict[str, Any]:
    row = random_row(VOCABULARY, LENGTHS[:1])
    half = LENGTHS[0] // 2
    ids = row.ids.clone()
    ids[:, half:] ^= 1
    before, after = (logits_of(reference, Row(each, row.boundaries))[:half] for each in (row.ids, ids))
    difference = relative_difference(after, before)
    if difference > BOUND:
        raise UserError(
            f"{reference.config.model_type} is not a causal language model: tokens see later tokens",
            found=f"logits move by {difference:.2g} of their standard deviation when a later token changes",
            expected="a model that predicts the next token from earlier ones",
            fix="choose another base model",
        )
    return _passed("a token does not see later ones", difference, BOUND)


@torch.no_grad()
def _check_isolation(
    config: PretrainedConfig,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    rows: Sequence[Row],
    options: TrainingOptions,
) -> dict[str, Any]:
    worst = 0.0
    for row in rows:
        difference = _difference_from_alone(model, reference, row, options)
        if not difference <= BOUND:
            raise _not_alone(config, model, row, difference, options)
        worst = max(worst, difference)
    return _passed(
        "each document of a packed sequence = the document alone, in plain attention", worst, BOUND
    )


def _cannot_run(config: PretrainedConfig, options: TrainingOptions, error: Exception) -> UserError:
    text = str(error).strip().splitlines()
    return UserError(
        f"{config.model_type} cannot be trained with train.attention: {options.attention} and packing.mode: "
        f"{options.packing}",
        found=f"{type(error).__name__}: {text[0][:200] if text else ''}",
        expected="a model that runs on packed sequences",
        fix=_alternatives(config, options),
    )


def _not_alone(
    config: PretrainedConfig, model: PreTrainedModel, row: Row, difference: float, options: TrainingOptions
) -> UserError:
    rope = _length_dependent(config)
    if rope and max(each.ids.shape[1] for each in row.documents()) > TRAINED_LENGTH:
        limit = _rope_limit(config)
        fix = f"set train.max_length to at most {limit}"
        if options.packing != "single" and rope == "longrope":
            fix += ", or packing.mode: single"
        return UserError(
            f"rope_type {rope} takes its frequencies from the longest document of a packed sequence",
            found=f"train.max_length {options.max_length}; the base was trained on {limit} positions",
            expected=f"no document longer than {limit} tokens beside shorter ones",
            fix=fix,
        )
    layers = leaking_layers(model, row) if len(row.boundaries) > 2 else []
    return UserError(
        f"documents of a packed sequence see each other in {config.model_type}"
        if layers
        else f"attention {model.config._attn_implementation} does not compute {config.model_type} correctly",
        found=f"{', '.join(layers) + ': ' if layers else ''}logits differ by {difference:.2g} of their standard deviation "
        f"from those of the documents alone",
        expected=f"at most {BOUND:g}",
        fix=_alternatives(config, options),
    )


def other_settings(options: TrainingOptions) -> list[tuple[str, dict[str, Any]]]:
    """Returns changes of options under which an architecture may train correctly, in words and by name. Best ones first."""
    changes = [
        ("train.attention: auto", {"attention": "auto"}),
        ("train.attention: eager", {"attention": "eager"}),
        ("packing.mode: single (each document is a packed sequence of its own)", {"packing": "single"}),
        ("packing.mode: single and train.attention: eager", {"packing": "single", "attention": "eager"}),
    ]
    return [(words, change) for words, change in changes if replace(options, **change) != options]


def _alternatives(config: PretrainedConfig, options: TrainingOptions) -> str:
    """Returns the settings under which this architecture trains correctly, as found by trying them."""
    for words, change in other_settings(options):
        if _works(config, replace(options, lora=None, **change)):
            return f"set {words}"
    return "choose another base model"


def _works(config: PretrainedConfig, options: TrainingOptions) -> bool:
    reference = make_twin(
        config,
        longest=options.max_length,
        trust_remote_code=options.trust_remote_code,
    )
    try:
        model = trained_twin(reference, options)
        with torch.no_grad():
            return all(
                _difference_from_alone(model, reference, row, options) <= BOUND
                for row in _rows(config, options)
            )
    except Exception:  # whatever the model's own code raises
        return False


def _check_gradients(
    model: PreTrainedModel, reference: PreTrainedModel, row: Row, options: TrainingOptions
) -> dict[str, Any]:
    """Compares loss and gradients as training computes them with those of documents alone in plain attention."""
    expected_loss = _loss_alone(reference, row)
    trained = SupervisedFinetune(model, gradient_checkpointing=options.gradient_checkpointing).train()
    rows = row.documents() if options.packing == "single" else [row]
    targets = row.ids.shape[1] - (len(row.boundaries) - 1)
    loss = 0.0
    for each in rows:
        labels = each.ids.clone()
        labels[:, each.boundaries[:-1]] = IGNORE_INDEX
        inputs = each.inputs()
        data = {
            "input_ids": each.ids,
            "labels": labels,
            "position_ids": inputs["position_ids"],
            "cumulative_len": torch.tensor(each.boundaries),
            "loss_weight": 1 / targets,
        }
        part = trained(data)["loss"]
        part.backward()
        loss += part.item()
    difference = abs(loss - expected_loss) / abs(expected_loss)
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    total = torch.stack([each.grad.norm() for each in theirs.values() if each.grad is not None]).norm()
    worst, worst_name = 0.0, ""
    for name, parameter in theirs.items():
        mine = ours[name].grad if name in ours else None  # some are constants, see make_constants_buffers
        if parameter.grad is None and mine is None:
            continue
        zero = torch.zeros(())
        apart = (
            (zero if mine is None else mine) - (zero if parameter.grad is None else parameter.grad)
        ).norm() / total
        if apart > worst:
            worst, worst_name = apart.item(), name
    model.zero_grad()
    reference.zero_grad()
    model.eval()
    if not max(difference, worst) <= _GRADIENT_BOUND:
        raise UserError(
            f"the gradients of {model.config.model_type} in a packed sequence differ from those of its documents",
            found=f"loss {loss:.6f} instead of {expected_loss:.6f}; {worst_name}: {worst:.2g} of all gradients' norm",
            expected=f"at most {_GRADIENT_BOUND:g}",
            fix=_alternatives(model.config, options),
        )
    return _passed(
        "loss and gradients as training computes them = those of the documents alone",
        max(difference, worst),
        _GRADIENT_BOUND,
    )


def _loss_alone(reference: PreTrainedModel, row: Row) -> float:
    """Returns the mean loss over documents, each alone, and leaves the gradients in the reference."""
    reference.train()
    documents = row.documents()
    targets = sum(each.ids.shape[1] - 1 for each in documents)
    total = 0.0
    for each in documents:
        loss = cross_entropy(logits_of(reference, each)[:-1], each.ids[0, 1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    reference.eval()
    return total


@torch.no_grad()
def _check_saved(reference: PreTrainedModel) -> dict[str, Any]:
    """Compares a model with itself, saved and loaded."""
    row = random_row(VOCABULARY, LENGTHS[:1])
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        loaded = type(reference).from_pretrained(  # a base's own code is not in the folder
            Path(folder), attn_implementation=reference.config._attn_implementation, dtype=torch.float32
        )
    expected = logits_of(reference, row)
    difference = relative_difference(logits_of(loaded.eval(), row), expected)
    if not difference <= BOUND:
        raise UserError(
            f"{reference.config.model_type} is not the same model when it is saved and loaded",
            found=f"logits differ by {difference:.2g} of their standard deviation",
            expected=f"at most {BOUND:g}",
            fix="choose another base model, or another version of transformers",
        )
    return _passed("saved and loaded = in memory", difference, BOUND)


def _check_merge(reference: PreTrainedModel, options: TrainingOptions) -> tuple[dict[str, Any], str]:
    """Compares a model with LoRA to itself with the adapters merged. Also returns which layers are adapted, in words."""
    model = trained_twin(reference, options)
    adapted = add_lora(model, options.lora, new_ids=[])
    words = describe_lora(model)
    generator = torch.Generator().manual_seed(0)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        row = random_row(VOCABULARY, LENGTHS[:1])
        before = logits_of(reference, row)
        expected = logits_of(model, row)
        merged = logits_of(adapted.merge_and_unload(), row)
    moved = relative_difference(expected, before)
    difference = relative_difference(merged, expected)
    if moved <= BOUND or not difference <= BOUND:
        raise UserError(
            f"LoRA does not fit {model.config.model_type}",
            found=f"adapters change the logits by {moved:.2g}, and merging them by {difference:.2g} of their standard "
            "deviation",
            expected=f"a change, and at most {BOUND:g} by merging",
            fix="set train.lora to null, or name other layers in train.lora.target_modules",
        )
    return _passed("LoRA merged = LoRA beside the weights", difference, BOUND), words


def _passed(name: str, difference: float, bound: float) -> dict[str, Any]:
    return {"name": name, "difference": float(f"{difference:.2g}"), "bound": bound}
