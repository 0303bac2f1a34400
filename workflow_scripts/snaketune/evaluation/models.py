"""Loads the two models to compare: the tuned model, and its base as training started from it."""

from __future__ import annotations

from snaketune.common.cli import UserError
from snaketune.encoding.tokenizer import ExtendedTokenizer
from snaketune.settings.schema import default_of


def load_for_evaluation(
    model_path: str,
    tokenizer_path: str,
    tokenizer: ExtendedTokenizer,
    *,
    base: bool = False,
    dtype: str = default_of("train.dtype"),
    attention: str = default_of("train.attention"),
    trust_remote_code: bool = default_of("model.trust_remote_code"),
):
    """Loads a causal language model in eval mode, on a GPU if available.

    Args:
        model_path: Hugging Face folder or hub name.
        tokenizer_path: Folder of the extended tokenizer.
        tokenizer: That tokenizer, loaded.
        base: Grows the embedding to the tokenizer's size exactly as training does before its first step.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU), or a torch dtype's name.
        attention: `train.attention`: that of the training.
        trust_remote_code: Runs Python code that comes with the model.

    Raises:
        UserError: The model has fewer embedding rows than the tokenizer has ids.
    """
    from snaketune.models.base_model import grow_to_tokenizer, load_base_model
    from snaketune.models.device import attention_on, training_device

    attention = attention_on(training_device(), attention)
    model = load_base_model(model_path, dtype, attention, trust_remote_code)
    if base:
        grow_to_tokenizer(model, tokenizer_path, model_path)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"{model_path} has too few embedding rows for the tokenizer {tokenizer_path}",
            found=f"{rows} rows",
            expected=f"at least {tokenizer.vocab_size}",
            fix="pass the tokenizer that the model was trained with; for a base model add --base-model",
        )
    return model.to(training_device()).eval()
