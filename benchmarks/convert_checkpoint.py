"""Converts a synthetic checkpoint of two ranks to Hugging Face; prints time, ratio to a copy and peak memory.

    python benchmarks/convert_checkpoint.py [--layers 26] [--zero 2 3] [--folder DIR]          # 2.2 B parameters, 9 GB
    python benchmarks/convert_checkpoint.py --layers 10 --turbomind .venv-turbomind/bin/python  # 1 B parameters

The checkpoint is a Llama with fp32 weights split as by DeepSpeed. It lacks the optimizer's moments, which
conversions do not read. Conversion and plain copy of the same files alternate; the fastest of each counts.
The folder needs free disk space for twice the checkpoint (18 GB for 26 layers, 8 GB for 10) and is emptied
afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO / "workflow_scripts"), str(REPO / "tests")]
LLAMA = {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
}
RANKS = 2


def write_run(folder: Path, layers: int) -> OrderedDict:
    """Writes the base config, tokenizer and training config; returns the shapes of the weights by name."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig

    from export_models import extend_tokenizer, train_config

    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], **LLAMA)
    config.save_pretrained(folder / "base")
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(tokens))
    extend_tokenizer(folder / "base", folder / "tokenizer")
    paths = {"model_path": str(folder / "base"), "tokenizer_path": str(folder / "tokenizer")}
    (folder / "train_config.py").write_text(train_config(**paths, train_folder="nowhere"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return OrderedDict((f"llm.{name}", value.shape) for name, value in model.state_dict().items())


def write_checkpoint(folder: Path, shapes: OrderedDict, stage: int) -> Path:
    """Writes `iter_1.pth` and its train.json; returns the path of train.json."""
    import torch

    from snaketune.checkpoints.checkpoint_content import read_state_dict
    from snaketune.checkpoints.weights_digest import weights_digest
    from snaketune.common.files import write_json

    pth = folder / "iter_1.pth"
    pth.mkdir()
    model = {"module": {}, "param_shapes": [shapes], "buffer_names": [], "shared_params": {}}
    torch.save(model, pth / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    parts = [math.ceil(shape.numel() / RANKS) for shape in shapes.values()]
    total = sum(parts) if stage == 3 else math.ceil(sum(shape.numel() for shape in shapes.values()) / RANKS)
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(stage)) * 0.02
    for rank in range(RANKS):
        flat = block.roll(rank).repeat(math.ceil(total / block.numel()))[:total].clone()
        name = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"optimizer_state_dict": {"zero_stage": stage, name: [flat]}}
        torch.save(state, pth / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        del flat, state
    digest = weights_digest(read_state_dict(pth))
    record = {"checkpoint": pth.name, "weights_sha256": digest, "dtype": "bfloat16", "zero_stage": stage}
    counts = {
        "steps": 1,
        "global_batch": 1,
        "epochs": 1.0,
        "tokens": 1,
        "world_size": RANKS,
        "final_loss": 0.0,
    }
    write_json(folder / "train.json", record | counts)
    return folder / "train.json"


# The process reads its own peak memory: the value that its parent gets includes the parent's, from before the
# exec.
_RUN = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("PEAK", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def timed(python: Path | str, *command: object) -> tuple[float, float]:
    """Runs a script; returns its seconds and peak memory in MB."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), "-c", _RUN, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{command[0]} failed\n{done.stderr}")
    return seconds, int(done.stdout.rpartition("PEAK ")[2]) * 1024 / 1e6


def copied(source: Path, target: Path) -> float:
    """Copies a folder and flushes it to disk; returns the seconds."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Prints one row per conversion."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=26, help="default: 26")
    parser.add_argument("--zero", type=int, nargs="+", choices=(2, 3), default=[2, 3], help="default: 2 3")
    parser.add_argument(
        "--repeats", type=int, default=2, help="number of conversions and of copies (default: 2)"
    )
    parser.add_argument("--max-shard-size", default="2GB", help="default: 2GB")
    parser.add_argument("--turbomind", type=Path, help="Python of the converter; also converts to TurboMind")
    parser.add_argument(
        "--folder", type=Path, help="folder to write to (default: the system's temporary folder)"
    )
    arguments = parser.parse_args()

    scripts = REPO / "workflow_scripts"
    print("| Conversion | Read | Written | Time | Plain copy | Ratio | Peak memory | Allowed MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for stage in arguments.zero:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            record = write_checkpoint(folder, write_run(folder, arguments.layers), stage)
            size = sum(path.stat().st_size for path in (folder / "iter_1.pth").iterdir())
            command = [scripts / "convert_pth_to_hf.py", folder / "train_config.py", record, folder / "hf"]
            command += ["--max-shard-size", arguments.max_shard_size]
            runs, copies = [], []
            for _ in range(arguments.repeats):
                shutil.rmtree(folder / "hf", ignore_errors=True)
                copies.append(copied(folder / "iter_1.pth", folder / "copy"))
                runs.append(timed(sys.executable, *command))
            shards = [path.stat().st_size for path in (folder / "hf").glob("*.safetensors")]
            allowed = 1.3 * max(shards) / 1e6 + 1000
            print_row(f"ZeRO-{stage} to Hugging Face", size, sum(shards), runs, copies, f"{allowed:,.0f}")
            if arguments.turbomind:
                shutil.rmtree(folder / "iter_1.pth")
                copy = copied(folder / "hf", folder / "copy")
                command = [scripts / "convert_hf_to_turbomind.py", "internlm2-chat-7b", folder / "hf"]
                command += ["--dst-path", folder / "turbomind"]
                runs = [timed(arguments.turbomind.absolute(), *command)]
                written = sum(path.stat().st_size for path in (folder / "turbomind").rglob("*.weight"))
                print_row("Hugging Face to TurboMind", sum(shards), written, runs, [copy], "")


def print_row(
    what: str, read: int, written: int, runs: list[tuple[float, float]], copies: list[float], allowed: str
) -> None:
    """Prints a table row: bytes read and written, (seconds, MB) of each run, seconds of each copy."""
    seconds, copy, peak = min(runs)[0], min(copies), max(peak for _, peak in runs)
    print(
        f"| {what} | {read / 1e9:.2f} GB | {written / 1e9:.2f} GB | {seconds:.1f} s | {copy:.1f} s | "
        f"{seconds / copy:.2f} | {peak:,.0f} MB | {allowed} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
