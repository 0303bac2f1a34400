"""Speed of layers that run document by document: packed sequences against `packing.mode: single`.

Trains small models of recurrent families on the same documents: all in one packed sequence, and each as a sequence of its
own. Takes turns, and prints the median CPU time of a forward and backward pass over all documents, which a busy machine
changes little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import JambaConfig, Lfm2Config, Mamba2Config, Qwen3NextConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow_scripts"))

from snaketune.models.base_model import fit_attention
from snaketune.models.isolation import Row, random_row
from snaketune.models.twin import VOCABULARY, build, make_twin
from snaketune.training.supervised_finetune import SupervisedFinetune

FAMILIES = {
    "lfm2": Lfm2Config(full_attn_idxs=[2], num_hidden_layers=4),
    "mamba2": Mamba2Config(),
    "jamba": JambaConfig(),
    "qwen3_next": Qwen3NextConfig(),
}


def main() -> None:
    """Prints a line for each family and length of documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=2048, help="of all documents")
    parser.add_argument("--documents", type=int, nargs="+", default=[4, 64], help="that have them")
    parser.add_argument("--turns", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(1)
    for name in a.families:
        twin = make_twin(FAMILIES[name], longest=0, trust_remote_code=False)
        model = fit_attention("auto", "cpu", lambda each, config=twin.config: build(config, each, False))
        model.load_state_dict(twin.state_dict())
        trained = SupervisedFinetune(model, gradient_checkpointing=True).train()
        for documents in a.documents:
            row = random_row(VOCABULARY, [a.tokens // documents] * documents)
            packed, single = [], []
            for _ in range(a.turns):
                packed.append(seconds(trained, [row]))
                single.append(seconds(trained, row.documents()))
            times = [statistics.median(each) for each in (packed, single)]
            print(
                f"{name}: {documents} documents of {a.tokens // documents} tokens: packed {times[0]:.2f} s, "
                f"single {times[1]:.2f} s, {times[1] / times[0]:.2f} times as fast packed",
                flush=True,
            )


def seconds(model: SupervisedFinetune, rows: list[Row]) -> float:
    """Returns the CPU seconds of a forward and backward pass over each row."""
    started = time.process_time()
    for row in rows:
        model(
            {
                "input_ids": row.ids,
                "labels": row.ids,
                "position_ids": row.inputs()["position_ids"],
                "cumulative_len": torch.tensor(row.boundaries),
            }
        )["loss"].backward()
    return time.process_time() - started


if __name__ == "__main__":
    main()
