"""Forecasts the memory of a training process from the shape of the model and the ZeRO stage.

Sharding follows Rajbhandari et al. 2020 (arXiv 1910.02054, section 5): stage 1 shards the optimizer states,
stage 2 also the gradients, stage 3 also the weights. Added to that are DeepSpeed's buckets, the activations
(with checkpointing, the input of each layer plus the activations of the layer being recomputed) and a chunk
of logits. CUDA's context and allocator fragmentation were not measured; `GPU_FIXED` is an estimate of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snaketune.settings.schema import default_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MIB = 2**20
# A training process with a model of a few bytes takes 485 MiB after one step (torch 2.13, transformers 5.23,
# DeepSpeed 0.19.8). The rest was fitted to the peaks of three CPU runs with 8.5 and 134 million parameters.
CPU_FIXED = 590 * MIB
GPU_FIXED = 2048 * MIB
# Elements, as in `snaketune.training.deepspeed_strategy.deepspeed_settings`.
_GPU_BUCKET, _CPU_BUCKET = 500_000_000, 50_000_000
# Elements of the logits in memory at a time, see `snaketune.models.cross_entropy`.
_CHUNK = 2**25
SETTINGS = (
    (0, "none"),
    (1, "none"),
    (1, "optimizer"),
    (2, "none"),
    (2, "optimizer"),
    (3, "none"),
    (3, "optimizer"),
    (3, "all"),
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its memory.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        trained: Number of parameters that are not frozen.
        layers: Number of decoder layers.
        hidden: Width of the residual stream.
        query: Total width of the query heads, of the widest layer.
        key: Total width of the key heads, of the widest layer.
        intermediate: Width of the MLP, of the widest layer.
        vocabulary: Rows of the output head.
        unknown: Why the activations are not known; then `query`, `key` and `intermediate` are 0.
    """

    parameters: int
    trained: int
    layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    vocabulary: int
    unknown: str | None = None


def read_shape(model: PreTrainedModel, vocab_size: int | None = None, lora_rank: int | None = None) -> Shape:
    """Returns the shape of a model.

    Args:
        model: A model without memory for weights; gets adapters if `lora_rank` is given.
        vocab_size: Ids of the tokenizer; a model with fewer rows grows to it.
        lora_rank: Rank of the adapters, if only those are trained.
    """
    from snaketune.models.vocabulary_rows import grown_rows
    from snaketune.preflight.sizes import count_parameters

    config = model.config.get_text_config()
    rows = grown_rows(config.vocab_size, vocab_size or 0)
    matrices = 1 if config.tie_word_embeddings else 2
    grown = matrices * (rows - config.vocab_size) * config.hidden_size
    query, key, intermediate, unknown = _widths(config)
    weights, trained = count_parameters(model, lora_rank)
    return Shape(
        parameters=weights + grown,
        trained=trained + (grown if lora_rank is None else 0),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=query,
        key=key,
        intermediate=intermediate,
        vocabulary=rows,
        unknown=unknown,
    )


def _widths(config: PretrainedConfig) -> tuple[int, int, int, str | None]:
    """Returns (query, key, intermediate, None) of the widest layers; zeros and the reason if they are not known."""
    from snaketune.models.attention_shapes import attention_shapes

    try:
        shapes = attention_shapes(config)
        mlp = [layer.intermediate_size for layer in config.per_layer_config]
        mlp = [max(each) if isinstance(each, list | tuple) else each for each in mlp]
        return max(each.query for each in shapes), max(each.key for each in shapes), max(mlp), None
    except Exception as error:  # the config of an architecture that we do not know may raise anything
        return 0, 0, 0, str(error).splitlines()[0]


def process_memory(
    shape: Shape,
    *,
    dtype_bytes: int,
    zero_stage: int,
    offload: str = default_of("train.offload"),
    ranks: int = 1,
    row_tokens: int,
    gradient_checkpointing: bool,
    on_gpu: bool,
) -> dict[str, Any]:
    """Returns the bytes of one training process at its peak.

    Args:
        shape: Shape of the model.
        dtype_bytes: Bytes of a weight in training: 4, or 2 with fp32 copies in the optimizer.
        zero_stage: 0 to 3.
        offload: none, optimizer or all.
        ranks: Processes among which the stage shards.
        row_tokens: Tokens of a packed sequence on one process.
        gradient_checkpointing: True if activations are recomputed in the backward pass.
        on_gpu: True for a GPU, False for a CPU.

    Returns:
        `device` and `host` bytes, and `parts` of `device`. On a CPU everything is `device`. If the shape's activations
        are not known, they are counted as the width of the residual stream alone, so the bytes are a lower bound.
    """
    own = shape.trained / ranks
    weights = dtype_bytes * shape.parameters / (ranks if zero_stage == 3 else 1)
    # Two moments in fp32, plus an fp32 copy of the weights from stage 1 on.
    optimizer = 8 * shape.trained if zero_stage == 0 else 12 * own
    gradients = dtype_bytes * shape.trained if zero_stage < 2 else 4 * own
    bucket = min(shape.trained, _GPU_BUCKET if on_gpu else _CPU_BUCKET) * dtype_bytes if zero_stage else 0
    # Gradients waiting to be reduced, and those being reduced: twice if the two overlap.
    buckets = bucket * (2 if zero_stage else 1)
    host = 0.0
    if offload != "none" and on_gpu:
        host += optimizer + 4 * own
        optimizer = 0
        if offload == "all":
            host += weights
            weights = dtype_bytes * shape.parameters / shape.layers
    token = dtype_bytes * (8 * shape.hidden + 3 * shape.query + 4 * shape.key + 4 * shape.intermediate)
    activations = row_tokens * token * (1 if gradient_checkpointing else shape.layers)
    if gradient_checkpointing:
        activations += row_tokens * dtype_bytes * shape.hidden * shape.layers
    rows = min(row_tokens, max(16, _CHUNK // shape.vocabulary))
    logits = rows * shape.vocabulary * (4 if dtype_bytes == 4 else 4 + 2 * dtype_bytes)
    logits += 4 * shape.vocabulary * shape.hidden
    # In the optimizer step the activations are freed, and the gradients of its shard are copied in fp32.
    step = 0 if zero_stage == 0 or offload != "none" else 4 * own
    working = max(activations + logits, step)
    fixed = GPU_FIXED if on_gpu else CPU_FIXED
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "buckets": buckets,
        "activations and logits, or step": working,
        "fixed": fixed,
    }
    return {
        "device": round(sum(parts.values())),
        "host": round(host),
        "parts": {name: round(size) for name, size in parts.items()},
    }
