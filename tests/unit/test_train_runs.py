"""Complete training runs of a tiny model: every ZeRO stage, a kill, a refusal, weights only.

Importing torch, DeepSpeed and mmengine takes ten seconds per process, so each run serves several tests.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pack_samples import write_bin
from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.checkpoints.checkpoint_folders import newest_whole_checkpoint
from snaketune.packing.packed_sequences import PackedSequences
from snaketune.packing.planner import make_plan
from snaketune.tokenized.data_order import read_data_order
from snaketune.training.metrics_hook import MEASURED
from warm import PARENT

pytestmark = pytest.mark.slow

STEPS, ACCUMULATION, RANKS, LR, LENGTH = 8, 2, 2, 5e-3, 64
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_dir, tiny_tokenizer_dir, run_script):
    """A folder with the model, an extended tokenizer and tokenised data."""
    folder = tmp_path_factory.mktemp("train")
    run_script(
        *("extend_tokenizer.py", "--tokenizer-path", tiny_tokenizer_dir),
        *("--tokenizer-w-special-tokens-save-dir", folder / "tokenizer"),
    )
    size = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).get_vocab_size()
    rng = np.random.RandomState(7)
    for name, samples in (("one", 25), ("two", 16)):  # few enough rows to cross an epoch
        made = []
        for _ in range(samples):
            ids = rng.randint(3, size, rng.randint(4, 90))
            ids[1 : len(ids) // 2] *= -1
            ids[-1] = size - 1 - rng.randint(NEW_TOKENS)
            made.append(ids.tolist())
        write_bin(folder / "data" / "chatml_llamav13_32k" / "train" / "cn" / name / "chat.bin", made)
    (folder / "data_order.txt").write_text("cn/two/chat.bin\ncn/one/chat.bin\n")
    return folder, tiny_model_dir, size


@pytest.fixture(scope="module")
def render(world, run_script):
    """Writes a config with the test hooks and returns its path."""
    folder, model, _ = world

    def write(name: str, *flags: object) -> Path:
        path = folder / name
        run_script(
            "render_train_config.py",
            *("--output", path, "--model-path", model, "--tokenizer-path", folder / "tokenizer"),
            *(
                "--train-folder",
                folder / "data/chatml_llamav13_32k/train",
                "--data-order",
                folder / "data_order.txt",
            ),
            *(
                "--max-length",
                LENGTH,
                "--max-steps",
                STEPS,
                "--lr",
                LR,
                "--warmup-ratio",
                0.25,
                "--max-norm",
                0.5,
            ),
            *("--accumulative-counts", ACCUMULATION, "--save-steps", 3, "--save-total-limit", 2, *flags),
        )
        text = path.read_text().replace(
            "custom_hooks = []", "custom_hooks = [dict(type=DumpWeights), dict(type=KillRank)]"
        )
        path.write_text(
            text.replace(
                "from torch.optim", "from train_hooks import DumpWeights, KillRank\nfrom torch.optim"
            )
        )
        return path

    return write


@pytest.fixture(scope="module")
def train(repo_root):
    """Runs train_model.py and returns the finished process."""

    def start(config: Path, *flags: object, **environment: object) -> subprocess.CompletedProcess:
        command = [repo_root / "workflow_scripts" / "train_model.py", config, *flags]
        own = {"PYTHONPATH": str(repo_root / "tests"), "OMP_NUM_THREADS": "1"}
        own |= {name: str(value) for name, value in environment.items()}
        return PARENT.run(command, timeout=300, env={**os.environ, **own})

    return start


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeatable(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def ok(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def zero_runs(world, render, train):
    """One run per ZeRO stage, on two ranks: {stage: run folder}."""
    folder, _, _ = world
    runs = {}
    for stage in (1, 2, 3):
        settings, flags = ["--zero-stage", stage], []
        if stage == 3:  # the command line wins; the model is built, grown and loaded in shards
            settings, flags = (
                ["--zero-stage", 2, "--zero3-init", "true"],
                ["--deepspeed", "deepspeed_zero3"],
            )
        config = render(f"zero{stage}.py", *settings)
        work_dir = folder / f"zero{stage}"
        manifest = folder / f"zero{stage}.json"
        ok(
            train(
                config,
                *("--work-dir", work_dir, "--processes", RANKS, "--manifest", manifest, *flags),
                TEST_DUMP=folder / f"zero{stage}.pt",
            )
        )
        runs[stage] = work_dir
    return runs


def expected_lr(step: int) -> float:
    """XTuner's learning rate schedule in closed form: warm-up from lr / 40, then a cosine to 0.15 lr."""
    warm_up = int(0.25 * STEPS)
    if step < warm_up:
        return LR * (1 / 40 + (1 - 1 / 40) * step / (warm_up - 1))
    share = (step - warm_up) / (STEPS - warm_up)
    return 0.15 * LR + 0.85 * LR * (1 + math.cos(math.pi * share)) / 2


@pytest.fixture(scope="module")
def reference(world):
    """A plain AdamW loop over single documents, without packing code: (losses by step, final weights)."""
    from transformers import AutoModelForCausalLM

    folder, model_path, size = world
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    old = size - NEW_TOKENS
    for layer in (model.model.embed_tokens, model.lm_head):
        rows = torch.empty(-(-size // 64) * 64, layer.weight.shape[1])
        rows[:old] = layer.weight.data
        rows[old:] = layer.weight.data.mean(0)
        layer.weight = torch.nn.Parameter(rows)
    names = read_data_order(folder / "data_order.txt")
    rows = PackedSequences(make_plan(folder / "data/chatml_llamav13_32k/train", names, LENGTH, "xtuner"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    order = [[], []]
    for epoch in range(3):
        for rank in range(RANKS):
            shuffled = np.arange(len(rows))
            np.random.RandomState(1024 + epoch).shuffle(shuffled)
            order[rank] += shuffled[rank : len(rows) // RANKS * RANKS : RANKS].tolist()
    losses = []
    for step in range(STEPS):
        micro = [
            rows[order[rank][step * ACCUMULATION + i]] for i in range(ACCUMULATION) for rank in range(RANKS)
        ]
        total = 0.0
        trained = sum(int((row["labels"][1:] != -100).sum()) for row in micro)
        for row in micro:
            boundaries = row["cumulative_len"]
            logits = torch.cat(
                [
                    model(torch.from_numpy(row["input_ids"][start:stop])[None], use_cache=False).logits[0]
                    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True)
                ]
            )
            labels = torch.from_numpy(row["labels"])
            loss = torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            (loss / trained).backward()
            total += loss.item() / trained
        losses.append(total)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = expected_lr(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def relative_l2(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return math.sqrt(difference / sum(float(b[name].double().square().sum()) for name in b))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stage_equals_a_plain_loop(stage, world, zero_runs, reference):
    folder, _, _ = world
    losses, weights = reference
    lines = metrics(zero_runs[stage])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([line["loss"] for line in lines], losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        [line["lr"] for line in lines], [expected_lr(i) for i in range(STEPS)], rtol=1e-9
    )
    read = read_state_dict(newest_whole_checkpoint(zero_runs[stage]))
    in_memory = torch.load(folder / f"zero{stage}.pt", weights_only=True)
    assert read.keys() == in_memory.keys()
    assert all(torch.equal(read[name], in_memory[name]) for name in read)
    assert relative_l2(read, weights) < 2e-6
    tokens = RANKS * ACCUMULATION * LENGTH
    assert all(line["tokens"] == tokens and 0 < line["trained_tokens"] < tokens for line in lines)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_hf_weights_of_a_zero_stage_equal_the_model_in_memory(stage, world, zero_runs, run_script, repo_root):
    folder, _, _ = world
    hf = folder / f"hf{stage}"
    run_script(
        *("convert_pth_to_hf.py", folder / f"zero{stage}.py", zero_runs[stage] / f"iter_{STEPS}.pth", hf),
        env={**os.environ, "PYTHONPATH": str(repo_root / "tests")},
    )
    written = load_file(hf / "model.safetensors")
    in_memory = torch.load(folder / f"zero{stage}.pt", weights_only=True)
    assert written.keys() == in_memory.keys()
    # Rows of the vocabulary without a token are not written.
    assert all(torch.equal(value, in_memory[name][: len(value)]) for name, value in written.items())


def test_run_folder_and_manifest(world, zero_runs):
    folder, _, _ = world
    assert sorted(path.name for path in zero_runs[2].glob("iter_*.pth")) == ["iter_6.pth", "iter_8.pth"]
    manifest = json.loads((folder / "zero2.json").read_text())
    assert manifest["run_folder"] == "zero2" and manifest["checkpoint"] == "zero2/iter_8.pth"
    assert (manifest["steps"], manifest["world_size"], manifest["zero_stage"]) == (STEPS, RANKS, 2)
    assert manifest["dtype"] == "float32" and manifest["tokens"] == STEPS * RANKS * ACCUMULATION * LENGTH
    assert manifest["final_loss"] == metrics(zero_runs[2])[-1]["loss"]
    assert list((zero_runs[2] / "tensorboard").glob("events*"))
    assert json.loads((folder / "zero3.json").read_text())["zero_stage"] == 3


def processes_below(marker: str) -> list[str]:
    """Returns the command lines of running trainers that contain `marker`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in line and "train_model.py" in line:
            found.append(line)
    return found


def test_killed_run_goes_on_as_if_nothing_had_happened(world, zero_runs, render, train):
    folder, _, _ = world
    config, work_dir = folder / "zero2.py", folder / "killed"
    flags = ("--work-dir", work_dir, "--processes", RANKS)
    killed = train(config, *flags, TEST_KILL="6:1")
    assert killed.returncode not in (0, 2) and "Rank 1 was killed by signal 9" in killed.stderr
    assert processes_below(str(work_dir)) == []
    assert metrics(work_dir)[-1]["step"] == 5 and not (work_dir / "finished.json").exists()
    ok(train(config, *flags, TEST_DUMP=folder / "killed.pt"))
    lines = metrics(work_dir)
    assert [line["attempt"] for line in lines] == [1] * 3 + [2] * (STEPS - 3)
    assert repeatable(lines) == repeatable(metrics(zero_runs[2]))
    weights, expected = (torch.load(folder / name, weights_only=True) for name in ("killed.pt", "zero2.pt"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    both = [
        json.loads((path / "finished.json").read_text())["weights_sha256"]
        for path in (work_dir, zero_runs[2])
    ]
    assert both[0] == both[1]


def test_identity(world, zero_runs, render, train):
    folder, _, _ = world
    before = metrics(zero_runs[2])
    commented = folder / "commented.py"
    commented.write_text(
        (folder / "zero2.py").read_text().replace("save_steps = 3", "# more often\nsave_steps = 1")
    )
    moved = folder / "moved data"
    shutil.copytree(folder / "data", moved, dirs_exist_ok=True)
    commented.write_text(commented.read_text().replace(f"{folder}/data/", f"{moved}/"))
    start = time.monotonic()
    again = ok(
        train(
            commented,
            "--work-dir",
            zero_runs[2],
            "--processes",
            RANKS,
            "--manifest",
            folder / "again" / "train.json",
        )
    )
    assert "Already finished" in again.stdout and time.monotonic() - start < 30
    assert metrics(zero_runs[2]) == before
    assert json.loads((folder / "again" / "train.json").read_text())["run_folder"] == "../zero2"

    changed = render("changed.py", "--zero-stage", 2, "--lr", 1e-4)
    refused = train(changed, "--work-dir", zero_runs[2], "--processes", RANKS)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "optim_wrapper.optimizer.lr: 0.005 -> 0.0001" in refused.stderr
    assert "new --work-dir" in refused.stderr
    refused = train(folder / "zero2.py", "--work-dir", zero_runs[2], "--processes", 1)
    assert refused.returncode == 2 and "world_size: 2 -> 1" in refused.stderr
    file = next(moved.rglob("cn/one/chat.bin"))
    file.write_bytes(file.read_bytes().replace(b"[4", b"[5", 1).replace(b"[3", b"[6", 1))
    refused = train(commented, "--work-dir", zero_runs[2], "--processes", RANKS)
    assert refused.returncode == 2 and "data: " in refused.stderr


def test_weights_only_and_runs_dir(world, render, train):
    folder, _, _ = world
    runs = folder / "runs"
    config = render("weights_only.py", "--save-optimizer", "false", "--zero-stage", 3, "--max-steps", 4)
    cut = train(config, "--runs-dir", runs, TEST_KILL="4:0")
    assert cut.returncode != 0
    (run_folder,) = [path for path in runs.iterdir() if path.is_dir()]
    assert sorted(path.name for path in (run_folder / "iter_3.pth").iterdir()) == [
        "COMPLETE.json",
        "weights.pt",
    ]
    refused = train(config, "--runs-dir", runs)
    assert refused.returncode == 2 and "weights only" in refused.stderr and "save_optimizer" in refused.stderr

    changed = render(
        "weights_only_2.py",
        "--save-optimizer",
        "false",
        "--zero-stage",
        3,
        "--max-steps",
        2,
        "--save-steps",
        0,
    )
    done = ok(
        train(
            changed, "--runs-dir", runs, "--manifest", folder / "m" / "train.json", TEST_DUMP=folder / "w.pt"
        )
    )
    assert "Notice: a new run" in done.stdout and "train_cfg.max_steps: 4 -> 2" in done.stdout
    manifest = json.loads((folder / "m" / "train.json").read_text())
    new_folder = (folder / "m" / manifest["run_folder"]).resolve()
    assert new_folder.parent == runs and new_folder.name == manifest["identity"][:12] != run_folder.name
    checkpoint = newest_whole_checkpoint(new_folder)
    content = torch.load(checkpoint / "weights.pt", weights_only=True)["state_dict"]
    read, in_memory = read_state_dict(checkpoint), torch.load(folder / "w.pt", weights_only=True)
    assert len(content) == len(read) and read.keys() == in_memory.keys()
    assert all(torch.equal(read[name], in_memory[name]) for name in read)
    assert "Already finished" in ok(train(changed, "--runs-dir", runs)).stdout
