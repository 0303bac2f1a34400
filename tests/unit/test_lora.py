"""LoRA: trained parameters, checkpoint contents, and merging, which must give the model in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from export_models import extend_tokenizer, write_base, write_lora_checkpoint
from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.common.cli import UserError
from snaketune.export import lora_merge
from snaketune.export.hf_tensors import empty_model
from snaketune.export.lora_merge import merge_lora
from snaketune.export.lora_weights import open_base
from snaketune.models.base_model import resize_for_tokenizer
from snaketune.models.lora import add_lora, leave_out_frozen, trained_share

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
NEW = [90, 91]


def small_model(tied: bool, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request):
    """(base, model after some steps, ids for comparison)."""
    base = small_model(request.param)
    model = copy.deepcopy(base)
    add_lora(model, LORA, NEW)
    leave_out_frozen(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 3:7] = torch.tensor([90, 91, 90, 91])
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return base, model.eval(), ids


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_only_adapters_and_rows_of_new_tokens_are_trained(trained):
    base, model, _ = trained
    state = model.state_dict()
    assert state and all("lora_" in name or "trainable_tokens_delta" in name for name in state)
    # 7 linear layers per block: q and o 32 x 32, k and v 32 x 16, gate, up and down 32 x 48.
    matrices = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    tied = base.lm_head.weight is base.model.embed_tokens.weight
    assert trained_share(model)[0] == matrices + (1 if tied else 2) * len(NEW) * 32
    frozen = dict(model.named_parameters())
    weight = frozen["model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert torch.equal(weight, base.model.layers[0].self_attn.q_proj.weight)


def test_a_model_loaded_in_shards_is_refused():
    model = small_model(tied=False)
    model.lm_head.weight.ds_id = 0  # how DeepSpeed marks a shard
    with pytest.raises(UserError, match=r"(?s)loaded in shards.*zero3_init: false"):
        add_lora(model, LORA, NEW)


def merge_from_files(base, state, folder, vocab_size=96, new_ids=NEW, dtype="float32", **options):
    """Merges from files: `base` saved by transformers and grown to the tokenizer, and a checkpoint of `state`."""
    folder.mkdir()
    base.save_pretrained(folder / "base")
    torch.save({"state_dict": state}, folder / "iter_1.pth")
    model = empty_model(str(folder / "base"))
    model.tie_weights()
    before = resize_for_tokenizer(model, vocab_size, new_ids)
    merged = merge_lora(
        *(model, open_base(str(folder / "base")), LORA, new_ids, before),
        *(read_state_dict(folder / "iter_1.pth"), getattr(torch, dtype)),
        load=None,  # not called
        **options,
    )
    assert all(each.extents for each in merged.values())
    return {name: torch.cat(list(each.chunks())).view(each.shape) for name, each in merged.items()}


def test_merged_weights_give_the_logits_of_the_model_in_memory(trained, tmp_path):
    from peft import PeftModel

    base, model, ids = trained
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "adapter").mkdir()
    merged = merge_from_files(base, state, tmp_path / "merged", adapter_folder=tmp_path / "adapter")
    plain = copy.deepcopy(base)
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged, strict=False)
    assert (logits(plain, ids) - logits(base, ids)).abs().max() > 0.1
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), atol=1e-5, rtol=0)
    rows = merged["model.embed_tokens.weight"]
    others = [i for i in range(96) if i not in NEW]
    assert torch.equal(rows[others], base.model.embed_tokens.weight[others])
    assert not torch.equal(rows[NEW], base.model.embed_tokens.weight[NEW])
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(adapted, ids), logits(model, ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_in_blocks_it_is_what_peft_merges_in_memory(tmp_path, monkeypatch, tied, dtype):
    """Bit for bit. The vocabulary grows by tokens with trained rows and by padding rows with the base's mean."""
    monkeypatch.setattr(lora_merge, "_BLOCK", 500)
    monkeypatch.setattr(lora_merge, "_MEAN_BLOCK", 96 * 32)
    base, new_ids, vocab_size = small_model(tied, hidden=80), [90, 96, 98], 99
    grown = copy.deepcopy(base).to(getattr(torch, dtype))
    resize_for_tokenizer(grown, vocab_size, new_ids)
    tuner = add_lora(grown.float(), LORA, new_ids)
    with torch.no_grad():
        for parameter in grown.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    state = {name: value.clone() for name, value in grown.named_parameters() if value.requires_grad}
    found = merge_from_files(base, state, tmp_path / "merged", vocab_size, new_ids, dtype)
    expected = dict(tuner.merge_and_unload().named_parameters())
    assert found.keys() == expected.keys() and found["model.embed_tokens.weight"].shape == (128, 80)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_settings_that_do_not_fit_are_refused(trained, tmp_path):
    base, model, _ = trained
    with pytest.raises(UserError, match=r"(?s)LoRA does not fit the model.*no_such_proj"):
        add_lora(copy.deepcopy(base), {**LORA, "target_modules": ["no_such_proj"]}, [])
    state = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    with pytest.raises(UserError, match=r"(?s)does not belong to these LoRA settings.*layers\.1"):
        merge_from_files(base, state, tmp_path / "less")


MIXTURE = {"kind": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.mark.parametrize("settings", [{"kind": "mistral"}, MIXTURE], ids=["mistral", "mixture"])
def test_the_folder_holds_what_peft_merges_in_memory(tiny_tokenizer_dir, tmp_path, settings):
    """Trained in bf16. A mixture of experts, which are not linear layers, is merged in memory."""
    from transformers import AutoModelForCausalLM

    from snaketune.export.hf_convert import convert

    base = write_base(tmp_path / "base", tiny_tokenizer_dir, **settings)
    extend_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    config, checkpoint, tuner = write_lora_checkpoint(
        base, tmp_path / "tokenizer", tmp_path / "run", "bfloat16"
    )
    assert convert(config, checkpoint, tmp_path / "hf")["dtype"] == "bfloat16"
    expected = lora_merge.own_tensors(tuner.merge_and_unload().bfloat16())
    found = lora_merge.own_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name][: len(value)]) for name, value in found.items())
