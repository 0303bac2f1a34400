"""Small models of many families, with `config.json` spelled as on the hubs and values other than the defaults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from snaketune.common.files import write_json

_ROPE = {"rope_theta": 54321.0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GEMMA_3 = {
    **_ROPE,
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "rope_local_base_freq": 777.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "sliding_window": 200,
    "sliding_window_pattern": 3,
    "hidden_activation": "gelu_pytorch_tanh",
}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "torch_dtype": "float32",
}
# {name: (class, settings)}. The names of settings are those of the published files.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"model_type": "llama", **_ROPE}),
    "mistral": ("MistralForCausalLM", {"model_type": "mistral", **_ROPE, "sliding_window": 300}),
    "mixtral": (
        "MixtralForCausalLM",
        {"model_type": "mixtral", **_ROPE, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **_ROPE,
            **_EXPERTS,
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
            "use_sliding_window": False,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_ROPE, **_EXPERTS, "model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True},
    ),
    "gemma": (
        "GemmaForCausalLM",
        {"model_type": "gemma", **_ROPE, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **_ROPE,
            "model_type": "gemma2",
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 200,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 9.0,
        },
    ),
    "gemma3_text": ("Gemma3ForCausalLM", _GEMMA_3),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "model_type": "gemma3",
            "text_config": _GEMMA_3,
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 262144,
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {
            **_ROPE,
            "model_type": "phi3",
            "pad_token_id": 0,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
            },
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            **_ROPE,
            "model_type": "glm4_moe",
            "head_dim": 16,
            "partial_rotary_factor": 0.25,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_ROPE,
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {
            **_ROPE,
            "model_type": "granitemoe",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 0.5,
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {"model_type": "gpt_neox", "rotary_emb_base": 54321, "rotary_pct": 0.5, "hidden_act": "gelu"},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **_ROPE,
            "model_type": "gpt_oss",
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 200,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        {
            "model_type": "jamba",
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
            "pad_token_id": 0,
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **_ROPE,
            "model_type": "llama4_text",
            "head_dim": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 200,
            "no_rope_layers": [1, 0],
            "pad_token_id": 0,
        },
    ),
    "gemma4_text": (  # transformers 4.57 does not know it
        "Gemma4ForCausalLM",
        {
            "model_type": "gemma4_text",
            "num_hidden_layers": 6,
            "head_dim": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 480,
            "num_kv_shared_layers": 0,
            "sliding_window": 200,
        },
    ),
    "ministral3": (  # transformers 4.57 does not know it
        "Ministral3ForCausalLM",
        {"model_type": "ministral3", "head_dim": 16},
    ),
}
# Trained with `train.attention: eager`, so that the gate sees both attentions.
EAGER = ("gemma2", "gpt_oss", "llama4_text")


def write_family(folder: Path, tokenizer_dir: Path, name: str) -> Path:
    """Writes a random base model of a family and its tokenizer, with a `config.json` as published."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from snaketune.encoding.tokenizer import parse_tokenizer, rows_needed

    text = (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    architecture, own = FAMILIES[name]
    common = {
        "vocab_size": rows_needed(parse_tokenizer(text, tokenizer_dir)),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = {**common, **ends, **own}
    if "text_config" in own:
        config = {**ends, **own, "text_config": {**common, **own["text_config"], "torch_dtype": "float32"}}
    config |= {"architectures": [architecture], "torch_dtype": "float32", "transformers_version": "4.50.0"}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in key:
                parameter.mul_(4.0)  # large enough logits to reveal a wrong rope base
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.5, 0.5, len(buffer)))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    published = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weights[name] for name in weights
    }
    save_file(published, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / file, folder / file)
    return folder
