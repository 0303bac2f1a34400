"""Mixtures of experts: the router's auxiliary loss and the load of the experts, against transformers itself."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from snaketune.common.cli import UserError
from snaketune.models.expert_load import ExpertLoad
from snaketune.training.packed_data import packed_collate
from snaketune.training.supervised_finetune import SupervisedFinetune

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS, ACTIVE, COEFFICIENT = 8, 2, 0.5
KINDS = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16},
    "granitemoe": {"num_local_experts": EXPERTS, "logits_scaling": 3.0},
}
ASKS = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}


def make_model(kind: str, **settings):
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind], num_experts_per_tok=ACTIVE, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name or ".router." in name:
                parameter.mul_(40)  # an uneven load
    return model


def row(lengths=(13, 20, 7)) -> dict:
    ids = torch.randint(0, 96, (sum(lengths),), generator=torch.Generator().manual_seed(1)).numpy()
    positions = torch.cat([torch.arange(length) for length in lengths]).numpy()
    boundaries = torch.tensor([0, *lengths]).cumsum(0).numpy()
    return {"input_ids": ids, "labels": ids.copy(), "position_ids": positions, "cumulative_len": boundaries}


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_that_transformers_computes_with_labels(kind, checkpointing):
    reference = make_model(kind, **ASKS).train()
    model = SupervisedFinetune(copy.deepcopy(reference), gradient_checkpointing=checkpointing).train()
    document = row((40,))
    losses = model(**packed_collate([document]))
    sum(losses.values()).backward()
    ids = torch.from_numpy(document["input_ids"])[None]
    expected = reference(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    assert losses["aux_loss"].item() == pytest.approx(COEFFICIENT * expected.aux_loss.item(), abs=1e-6)
    assert expected.aux_loss.item() > ACTIVE + 0.1, "the load is uneven"
    assert sum(losses.values()).item() == pytest.approx(expected.loss.item(), abs=1e-5)
    found = gradients(model.llm)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_of_a_packed_sequence_it_is_that_of_its_documents_together():
    model = make_model("mixtral", **ASKS).train()
    packed = row()
    found = SupervisedFinetune(copy.deepcopy(model)).train()(**packed_collate([packed]))["aux_loss"]
    documents = zip(packed["cumulative_len"][:-1], packed["cumulative_len"][1:], strict=True)
    alone = [
        model(torch.from_numpy(packed["input_ids"][a:b])[None], use_cache=False).router_logits
        for a, b in documents
    ]
    layers = tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
    expected = load_balancing_loss_func(layers, EXPERTS, ACTIVE)
    assert found.item() == pytest.approx(COEFFICIENT * expected.item(), abs=1e-6)


def test_who_asks_for_it_and_who_has_none(capsys):
    silent = SupervisedFinetune(make_model("mixtral", router_aux_loss_coef=COEFFICIENT))
    assert silent.router_aux_loss == 0 and "aux_loss" not in silent(**packed_collate([row()]))
    assert "auxiliary" not in capsys.readouterr().out
    assert SupervisedFinetune(make_model("mixtral"), router_aux_loss=0.1).router_aux_loss == 0.1
    assert "Adds 0.1 x the router's auxiliary loss, as train.router_aux_loss asks" in capsys.readouterr().out
    off = SupervisedFinetune(make_model("mixtral", **ASKS), router_aux_loss=0.0)
    assert off.router_aux_loss == 0 and "aux_loss" not in off(**packed_collate([row()]))
    assert "Adds no auxiliary loss of the router, although" in capsys.readouterr().out
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, **ASKS))
    assert SupervisedFinetune(copy.deepcopy(dense)).router_aux_loss == 0
    assert "transformers has none for LlamaForCausalLM" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"(?s)LlamaForCausalLM has no auxiliary loss.*router_aux_loss to null"
    ):
        SupervisedFinetune(dense, router_aux_loss=0.1)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_load_is_the_number_of_tokens_that_each_expert_gets(kind):
    """Counted once a step, also with recomputed activations, and not in other forward passes."""
    model = SupervisedFinetune(make_model(kind), gradient_checkpointing=True).train()
    batch = packed_collate([row()])
    model(**batch)["loss"].backward()
    with torch.no_grad():
        logits = model.llm(
            **{name: batch["data"][name] for name in ("input_ids", "position_ids")},
            use_cache=False,
            output_router_logits=True,
        ).router_logits
    load = model.expert_load
    counts = load.take(torch.device("cpu"))
    expected = [torch.bincount(each.topk(ACTIVE).indices.flatten(), minlength=EXPERTS) for each in logits]
    assert counts.tolist() == torch.cat(expected).tolist() and counts.sum() == 2 * 40 * ACTIVE
    assert not load.take(torch.device("cpu")).any()
    for (least, most, entropy), layer in zip(load.describe(counts), expected, strict=True):
        share = layer / layer.sum()
        assert least == pytest.approx(share.min().item() * EXPERTS)
        assert most == pytest.approx(share.max().item() * EXPERTS)
        assert 0 < entropy < 1
    even, one = torch.ones(EXPERTS), torch.eye(EXPERTS)[0]
    assert load.describe(torch.cat([even, one]).double()) == [
        (1.0, 1.0, pytest.approx(1.0)),
        (0.0, EXPERTS, 0.0),
    ]


def test_a_model_without_experts_has_no_load():
    assert not ExpertLoad(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))).layers
