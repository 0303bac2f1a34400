"""Runs one case of test_zero3_proof.py, and prints what the proof of ZeRO-3 says of it as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import distributed
from transformers import Gemma3nTextConfig, LlamaConfig, Mamba2Config, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import snaketune.training.deepspeed_strategy
from snaketune.common.cli import UserError
from snaketune.models.base_model import read_model_config
from snaketune.preflight.architecture_proof import TrainingOptions, prove
from snaketune.preflight.zero3_proof import prove_zero_3

GEMMA_3N = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
}
CONFIGS = {
    "dense": LlamaConfig,
    "mixture": MixtralConfig,
    "recurrent": Mamba2Config,
    "weights that the layer reads, not their module": lambda: Gemma3nTextConfig(**GEMMA_3N),
    "a weight kept in a list": LlamaConfig,
    "a rank that waits": LlamaConfig,
    "a gradient that ranks halve": LlamaConfig,
    "a weight that ranks freeze": LlamaConfig,
}


def module_experts(folder: Path):
    """Returns the config of a base with code of its own and a module for each expert."""
    from module_experts import ModuleExpertsConfig, ModuleExpertsForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    config = ModuleExpertsConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    ModuleExpertsForCausalLM(config).save_pretrained(folder)
    return read_model_config(str(folder), True)


def break_it(case: str) -> None:
    """Breaks the code that this process uses, for some of the cases."""
    build, run = LlamaMLP.__init__, LlamaMLP.forward

    def build_and_keep(self, config):
        build(self, config)
        self.kept = [self.gate_proj.weight]  # DeepSpeed does not see that it is read

    def run_and_wait(self, hidden):
        if os.environ.get("RANK") == "1":
            distributed.barrier()
        return run(self, hidden)

    def run_with_half_the_gradient(self, hidden):
        output = run(self, hidden)
        return output.detach() + (output - output.detach()) / 2 if "RANK" in os.environ else output

    if case == "a weight kept in a list":
        LlamaMLP.__init__ = build_and_keep
        LlamaMLP.forward = lambda self, hidden: run(self, hidden) * (1 + self.kept[0].detach().sum())
    elif case == "a rank that waits":
        LlamaMLP.forward = run_and_wait
    elif case == "a gradient that ranks halve":
        LlamaMLP.forward = run_with_half_the_gradient
    elif case == "experts as modules, gathered one at a time":
        snaketune.training.deepspeed_strategy.use_experts_together = lambda *_: None
    elif case == "a weight that ranks freeze":
        freeze = lambda model, *_: next(model.parameters()).requires_grad_(False)  # noqa: E731
        snaketune.training.deepspeed_strategy.use_experts_together = freeze


def main(case: str, folder: Path) -> None:
    packing = "single" if case == "recurrent" else "best_fit"
    own_code = case not in CONFIGS  # that of tests/module_experts.py
    options = TrainingOptions("auto", packing, 4096, True, trust_remote_code=own_code)
    config = module_experts(folder) if own_code else CONFIGS[case]()
    prove(config, options)
    break_it(case)
    try:
        print(json.dumps(prove_zero_3(config, options, idle_seconds=10)))
    except UserError as error:
        print(json.dumps({"refused": str(error)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
