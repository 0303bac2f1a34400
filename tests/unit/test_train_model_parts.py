"""The model in training: packed sequences without leaks, and embedding rows for new tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from snaketune.common.cli import UserError
from snaketune.models.base_model import load_base_model, resize_for_tokenizer
from snaketune.models.vocabulary_rows import find_new_tokens
from snaketune.training.packed_data import packed_collate
from snaketune.training.supervised_finetune import SupervisedFinetune

LENGTHS = (5, 1, 17, 9)


def row(vocabulary: int = 96, seed: int = 0) -> dict:
    """A packed sequence of documents of LENGTHS tokens, with the first half of each untrained."""
    import numpy as np

    rng = np.random.RandomState(seed)
    ids = rng.randint(3, vocabulary, sum(LENGTHS))
    positions = np.concatenate([np.arange(n) for n in LENGTHS])
    labels = np.where(positions % 3 == 1, -100, ids)
    boundaries = np.cumsum([0, *LENGTHS])
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "cumulative_len": boundaries}


def small_config(kind: str):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    if kind == "mistral":  # a window shorter than the longest document
        return MistralForCausalLM, MistralConfig(**sizes, sliding_window=6)
    return LlamaForCausalLM, LlamaConfig(**sizes, tie_word_embeddings=kind == "tied")


@pytest.fixture(scope="module", params=["llama", "tied", "mistral"])
def model_folder(request, tmp_path_factory):
    torch.manual_seed(3)
    kind, config = small_config(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    kind(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_row_equals_documents_alone(model_folder, checkpointing):
    packed = row()
    model = SupervisedFinetune(
        load_base_model(str(model_folder)), gradient_checkpointing=checkpointing
    ).train()
    loss = model(**packed_collate([packed]))["loss"]
    loss.backward()

    alone = load_base_model(str(model_folder), attention="eager").train()
    labels = torch.from_numpy(packed["labels"])
    boundaries = packed["cumulative_len"]
    pieces = [
        alone(torch.from_numpy(packed["input_ids"][a:b])[None], use_cache=False).logits[0]
        for a, b in zip(boundaries[:-1], boundaries[1:], strict=True)
    ]
    # Labels shift over the whole row, as in XTuner: a document's last token predicts the next one's first.
    expected = torch.nn.functional.cross_entropy(torch.cat(pieces)[:-1], labels[1:], ignore_index=-100)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    gradients = dict(model.llm.named_parameters())
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=2e-6, rtol=1e-4)

    with torch.no_grad():
        batch = packed_collate([packed])["data"]
        logits = model.llm(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    torch.testing.assert_close(logits[0], torch.cat(pieces).detach(), atol=2e-6, rtol=1e-4)


def test_padded_batches_and_generation_stay_right(model_folder):
    """Evaluation uses packed attention too: padded batches and a cache must give the same result as sdpa."""
    ours, stock = (
        load_base_model(str(model_folder)).eval(),
        load_base_model(str(model_folder), attention="eager").eval(),
    )
    ids = torch.from_numpy(row()["input_ids"])[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        a = ours(ids, attention_mask=mask, use_cache=False).logits
        b = stock(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(a[0], b[0], atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(a[1, 7:], b[1, 7:], atol=2e-6, rtol=1e-4)
        settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        assert torch.equal(
            ours.generate(ids[:1, :9], **settings),
            stock.generate(ids[:1, :9], **settings | {"use_cache": False}),
        )


def test_no_mask_is_made_for_a_long_row(model_folder, monkeypatch):
    shapes = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, **kwargs):
        shapes.append((query.shape[2], key.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return real(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr("snaketune.models.packed_attention.scaled_dot_product_attention", watch)
    SupervisedFinetune(load_base_model(str(model_folder)), gradient_checkpointing=False)(
        **packed_collate([row()])
    )
    assert shapes and all(queries <= max(LENGTHS) for queries, _, _ in shapes)
    assert all(mask is None or mask[0] * mask[1] <= 6 * 12 for _, _, mask in shapes)


def test_row_without_trained_tokens_gives_zero(model_folder):
    model = SupervisedFinetune(load_base_model(str(model_folder))).train()
    empty = row()
    empty["labels"][:] = -100
    loss = model(**packed_collate([empty]))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_first_token_of_the_row_is_never_a_target(model_folder):
    model = SupervisedFinetune(load_base_model(str(model_folder))).train()
    plain, changed = row(), row()
    changed["labels"][0] = -100
    losses = [model(**packed_collate([each]))["loss"].item() for each in (plain, changed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "new", "rows_after"),
    [
        (90, 96, range(90, 96), 128),  # grown, and padded to 128
        (128, 96, range(90, 96), 128),  # a padded base already has the rows
        (90, 90, [], 90),  # nothing new
        (90, 93, [4, 90, 91, 92], 128),  # one new ID within the old range (the base replaced a token)
        (96, 96, [95, 93], 96),
    ],
)
def test_rows_of_new_ids_are_the_mean_of_the_old(tied, rows, vocabulary, new, rows_after):
    torch.manual_seed(0)
    _, config = small_config("tied" if tied else "llama")
    config.vocab_size = rows
    model = LlamaForCausalLM(config)
    before = copy.deepcopy(model.state_dict())
    old = [i for i in range(min(rows, vocabulary)) if i not in set(new)]
    assert resize_for_tokenizer(model, vocabulary, list(new)) == old
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight, was = model.state_dict()[name], before[name]
        assert weight.shape[0] == rows_after
        assert torch.equal(weight[old], was[old])
        for i in new:
            torch.testing.assert_close(weight[i], was[old].mean(dim=0))
        if rows_after > rows:
            torch.testing.assert_close(weight[-1], was[old].mean(dim=0))
        else:
            untouched = [i for i in range(rows) if i not in set(new)]
            assert torch.equal(weight[untouched], was[untouched])
    assert model.config.vocab_size == rows_after
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(UserError):
        resize_for_tokenizer(model, vocabulary, [vocabulary])


def test_new_tokens_from_manifest_or_comparison(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models

    from snaketune.common.files import sha256_file, write_json

    tokenizer = Tokenizer(models.BPE({f"t{i}": i for i in range(50)}, []))
    base, extended = tmp_path / "base", tmp_path / "extended"
    for folder in (base, extended):
        folder.mkdir()
    tokenizer.save(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|a|>", special=True), AddedToken("t7", special=True)])
    tokenizer.save(str(extended / "tokenizer.json"))
    assert find_new_tokens(str(extended), str(base)) == (51, [50])
    assert find_new_tokens(str(extended), None) == (51, [])
    manifest = {"tokenizer_sha256": sha256_file(extended / "tokenizer.json"), "added": {"<|a|>": 50, "x": 9}}
    write_json(extended / "manifest.json", manifest)
    assert find_new_tokens(str(extended), str(base)) == (51, [9, 50])
    write_json(extended / "manifest.json", {**manifest, "tokenizer_sha256": "of another"})
    assert find_new_tokens(str(extended), str(base)) == (51, [50])
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        find_new_tokens(str(tmp_path), None)
