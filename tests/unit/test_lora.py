"""LoRA: what is trained, what a checkpoint holds, and that merging gives the model that was in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.cli import UserError
from sft.lora import add_lora, leave_out_frozen, merge_lora, trained_share

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
NEW = [90, 91]


def small_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request):
    """(the base, the model after some steps, ids to look at)."""
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
    # 7 linear layers a block: q and o 32 x 32, k and v 32 x 16, gate, up and down 32 x 48.
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


def test_merged_weights_give_the_logits_of_the_model_in_memory(trained, tmp_path):
    from peft import PeftModel

    base, model, ids = trained
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merge_lora(copy.deepcopy(base), LORA, NEW, state, tmp_path)
    plain = copy.deepcopy(base)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    assert (logits(plain, ids) - logits(base, ids)).abs().max() > 0.1
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), atol=1e-5, rtol=0)
    rows = merged["model.embed_tokens.weight"]
    others = [i for i in range(96) if i not in NEW]
    assert torch.equal(rows[others], base.model.embed_tokens.weight[others])
    assert not torch.equal(rows[NEW], base.model.embed_tokens.weight[NEW])
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(logits(adapted, ids), logits(model, ids), atol=1e-6, rtol=0)


def test_settings_that_do_not_fit_are_refused(trained):
    base, model, _ = trained
    with pytest.raises(UserError, match=r"(?s)LoRA does not fit the model.*no_such_proj"):
        add_lora(copy.deepcopy(base), {**LORA, "target_modules": ["no_such_proj"]}, [])
    state = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    with pytest.raises(UserError, match=r"(?s)does not belong to these LoRA settings.*layers\.1"):
        merge_lora(copy.deepcopy(base), LORA, NEW, state)
