"""A Llama whose MLPs are mixtures of experts, each expert a module of its own, as in remote code of some families."""

from torch import nn, zeros_like
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

EXPERTS = 6


class ModuleExpertsConfig(LlamaConfig):
    """Llama's config."""

    model_type = "module_experts"


class Mixture(nn.Module):
    """Sends each token to one expert, and calls only the experts that get tokens."""

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(EXPERTS)])

    def forward(self, hidden):
        """Returns the experts' answers, in the shape of `hidden`."""
        tokens = hidden.view(-1, hidden.shape[-1])
        weights, chosen = self.router(tokens).softmax(dim=-1).max(dim=-1)
        answers = zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().flatten()
            if len(mine):
                answers = answers.index_add(0, mine, expert(tokens[mine]) * weights[mine, None])
        return answers.view(hidden.shape)


class ModuleExpertsForCausalLM(LlamaForCausalLM):
    """Llama with mixtures in place of its MLPs."""

    config_class = ModuleExpertsConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Mixture(config)
        self.post_init()


ModuleExpertsConfig.register_for_auto_class()
ModuleExpertsForCausalLM.register_for_auto_class("AutoModelForCausalLM")
