"""One rank of test_train_parity.py: trains all cases of its world size, one at a time, in one process group.

Argument: the folder that `prepare` filled. Reads RANK and WORLD_SIZE like any other rank.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from snaketune.preflight.zero3_proof import RowsInOrder

STEPS, GLOBAL_BATCH, LR, CLIP, BETAS, DECAY = 6, 4, 5e-3, 0.5, (0.9, 0.95), 0.01
VOCABULARY = 160
RECURRENT = ("lfm2", "mamba2")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["in_proj", "out_proj"]}
SHARED = {"sequence_parallel": 2}
# name: (world size, model, ZeRO stage, changes to the defaults)
CASES = {
    **{f"zero{stage}, 1 rank": (1, "llama", stage, {}) for stage in range(4)},
    **{f"zero{stage}, 2 ranks": (2, "llama", stage, {}) for stage in range(4)},
    "micro_batch, 2 ranks": (2, "llama", 2, {"loss_normalisation": "micro_batch"}),
    "eager attention, zero1, 1 rank": (1, "llama", 1, {"attention": "eager"}),
    "offload optimizer, zero1, 2 ranks": (2, "llama", 1, {"strategy": {"offload": "optimizer"}}),
    "offload all, zero3, 2 ranks": (2, "llama", 3, {"strategy": {"offload": "all"}}),
    **{f"bfloat16, zero{stage}, 2 ranks": (2, "llama", stage, {"dtype": "bfloat16"}) for stage in (1, 3)},
    "sequence parallel, zero0, scaled logits": (2, "cohere", 0, {"strategy": SHARED}),
    "sequence parallel, zero1, one KV head": (2, "one_kv_head", 1, {"strategy": SHARED}),
    "sequence parallel, zero2, micro_batch": (
        2,
        "llama",
        2,
        {"strategy": SHARED, "loss_normalisation": "micro_batch", "gradient_checkpointing": False},
    ),
    "sequence parallel, zero3": (2, "llama", 3, {"strategy": SHARED}),
    "tied head, zero3, 2 ranks": (2, "tied", 3, {}),
    "scaled logits, zero3, 2 ranks": (2, "cohere", 3, {}),
    "router loss, zero1, 1 rank": (1, "mixtral", 1, {}),
    "router loss, zero2, 2 ranks, micro_batch": (2, "mixtral", 2, {"loss_normalisation": "micro_batch"}),
    "router loss, zero3, 2 ranks": (2, "mixtral", 3, {"gradient_checkpointing": False}),
    # Ranks whose rows have different numbers of documents.
    **{f"{name}, zero3, 2 ranks": (2, name, 3, {}) for name in RECURRENT},
    "lora, zero1, 1 rank": (1, "lfm2", 1, {"lora": LORA}),
    "lora, zero3, 2 ranks": (2, "lfm2", 3, {"lora": LORA}),
    **{f"experts as modules, zero{stage}, 2 ranks": (2, "module_experts", stage, {}) for stage in (0, 3)},
    # Last: transformers goes on to load models in shards in these processes.
    "lfm2, zero3_init, 2 ranks": (2, "lfm2", 3, {"strategy": {"zero3_init": True}}),
}


class Rows(RowsInOrder):
    """Packed sequences of documents of 1 to 30 tokens. The share of trained tokens in one ranges from none to all."""

    def __init__(self, count: int = 16):
        rng = np.random.RandomState(5)
        rows = []
        for number in range(count):
            lengths = rng.randint(1, 31, rng.randint(1, 5))
            ids = rng.randint(3, VOCABULARY, lengths.sum())
            share = (0.0, 0.05, 0.3, 1.0)[number % 4] if number % 3 else rng.rand()
            rows.append(
                {
                    "input_ids": ids,
                    "labels": np.where(rng.rand(len(ids)) < share, ids, -100),
                    "position_ids": np.concatenate([np.arange(length) for length in lengths]),
                    "cumulative_len": np.cumsum([0, *lengths]),
                }
            )
        super().__init__(rows, "xtuner")


def lr_of(step: int) -> float:
    """Returns the learning rate of a step, from 0: a half cosine from LR down to 0.15 LR."""
    return 0.15 * LR + 0.85 * LR * (1 + np.cos(np.pi * step / STEPS)) / 2


def prepare(folder: Path) -> None:
    """Writes the random base models that all cases share."""
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Lfm2Config,
        Lfm2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Mamba2Config,
        Mamba2ForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    from module_experts import ModuleExpertsConfig, ModuleExpertsForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    torch.manual_seed(11)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder / "tied")
    one_kv_head = LlamaConfig(**{**sizes, "num_key_value_heads": 1})
    LlamaForCausalLM(one_kv_head).save_pretrained(folder / "one_kv_head")
    CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.3)).save_pretrained(folder / "cohere")
    router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    MixtralForCausalLM(MixtralConfig(**sizes, **router)).save_pretrained(folder / "mixtral")
    ModuleExpertsForCausalLM(ModuleExpertsConfig(**sizes)).save_pretrained(folder / "module_experts")
    # Layers that carry state, which run document by document: one of lfm2's two, and all of mamba2's.
    conv = Lfm2Config(**sizes, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    Lfm2ForCausalLM(conv).save_pretrained(folder / "lfm2")
    heads = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    Mamba2ForCausalLM(Mamba2Config(**sizes, **heads)).save_pretrained(folder / "mamba2")


def make_config(folder: Path, world_size: int, model: str, stage: int, changes: dict):
    """Returns the config of a case."""
    from mmengine.config import Config
    from mmengine.hooks import ParamSchedulerHook
    from mmengine.optim import CosineAnnealingLR
    from torch.utils.data import BatchSampler

    import sft
    from train_hooks import DumpWeights

    strategy = changes.get("strategy", {})
    return Config(
        {
            "model": {
                "type": sft.SupervisedFinetune,
                "gradient_checkpointing": changes.get("gradient_checkpointing", True),
                "lora": changes.get("lora"),
                "llm": {
                    "type": sft.load_base_model,
                    "model_path": str(folder / model),
                    "dtype": changes.get("dtype", "float32"),
                    "attention": changes.get("attention", "auto"),
                    "trust_remote_code": True,
                },
            },
            "train_dataloader": {
                "batch_size": 1,
                "num_workers": 0,
                "dataset": {"type": Rows},
                "sampler": {"type": sft.PackedSampler},
                "batch_sampler": {"type": BatchSampler, "drop_last": True, "batch_size": 1},
                "collate_fn": {"type": sft.packed_collate},
            },
            "optim_wrapper": {
                "optimizer": {"type": torch.optim.AdamW, "lr": LR, "betas": BETAS, "weight_decay": DECAY},
                "clip_grad": {"max_norm": CLIP},
                "accumulative_counts": GLOBAL_BATCH // (world_size // strategy.get("sequence_parallel", 1)),
            },
            "param_scheduler": [
                {
                    "type": CosineAnnealingLR,
                    "eta_min": 0.15 * LR,
                    "begin": 0,
                    "end": STEPS,
                    "by_epoch": False,
                }
            ],
            "train_cfg": {
                "type": sft.TrainLoop,
                "max_steps": STEPS,
                "loss_normalisation": changes.get("loss_normalisation", "token"),
            },
            "strategy": {
                "type": sft.DeepSpeedStrategy,
                "zero_stage": stage,
                **strategy,
            },
            "default_hooks": {
                "metrics": {"type": sft.MetricsHook, "interval": 1000},
                "param_scheduler": {"type": ParamSchedulerHook},
                "checkpoint": {"type": sft.CheckpointHook, "interval": 0},
            },
            "custom_hooks": [{"type": DumpWeights}],
            "randomness": {"seed": 1},
        }
    )


def main(folder: Path) -> None:
    import snaketune.models.cross_entropy
    from snaketune.training.deepspeed_strategy import init_process_group
    from snaketune.training.train_config import parse_config
    from snaketune.training.train_loop import TrainRunner
    from snaketune.training.train_rank import runner_config

    warnings.filterwarnings("ignore", category=FutureWarning)
    snaketune.models.cross_entropy.CHUNK_ELEMENTS = 1  # sixteen tokens per chunk
    init_process_group()
    world_size = torch.distributed.get_world_size()
    for name, (ranks, model, stage, changes) in CASES.items():
        if ranks == world_size:
            run_folder = folder / name
            run_folder.mkdir(exist_ok=True)
            os.environ["TEST_DUMP"] = str(run_folder / "weights.pt")
            config = make_config(folder, ranks, model, stage, changes)
            TrainRunner.from_cfg(runner_config(parse_config(config), run_folder)).train()
            # mmengine registers DeepSpeed's optimizers for each strategy, which fails the second time.
            sys.modules["mmengine._strategy.deepspeed"].register_deepspeed_optimizers = list
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
