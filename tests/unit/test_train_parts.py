"""Parts of a training run, without training: schedule, data order, config, identity, ranks, checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from hashlib import sha256

import pytest
import torch

from export_models import train_config
from snaketune.checkpoints.checkpoint_content import read_state_dict
from snaketune.checkpoints.checkpoint_folders import (
    is_intact,
    is_whole,
    list_checkpoints,
    newest_whole_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    set_aside,
)
from snaketune.common.cli import UserError
from snaketune.common.files import write_json
from snaketune.training.launch import slurm_environment
from snaketune.training.run_identity import differences, run_identity
from snaketune.training.train_config import load_config
from warm import PARENT


@pytest.fixture
def config_path(tmp_path):
    """A rendered config with default settings."""
    path = tmp_path / "train_config.py"
    path.write_text(train_config(model_path="base", tokenizer_path="tokenizer", train_folder="data/train"))
    return path


def xtuner_lr(step: int, warm_up: int, total: int, lr: float) -> float:
    """XTuner's learning rate schedule in closed form."""
    if step < warm_up:
        return lr * (1 / 40 + (1 - 1 / 40) * step / (warm_up - 1))
    return 0.15 * lr + 0.85 * lr * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("rows", "epochs", "max_steps"), [(401, 1, None), (150, 2.5, None), (60, 1, 333), (20, 1, 12)]
)
def test_lr_curve(tmp_path, accumulation, rows, epochs, max_steps):
    from mmengine.optim import OptimWrapper

    from snaketune.training.deepspeed_strategy import DeepSpeedStrategy

    paths = {"model_path": "base", "tokenizer_path": "tok", "train_folder": "train"}
    text = train_config(**paths, max_epochs=epochs, max_steps=max_steps, lr=1e-3)
    (tmp_path / "config.py").write_text(text)
    config = load_config(tmp_path / "config.py").source
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.dispatch_kwargs = {"epoch_length": rows / accumulation, "max_epochs": 1, "max_iters": 10**6}
    import logging

    strategy.__dict__["logger"] = logging.getLogger()
    optimizer = OptimWrapper(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3))
    schedulers = strategy.build_param_scheduler(config.param_scheduler, optimizer)
    total = max_steps or int(epochs * rows / accumulation)
    warm_up = int(0.025 * (max_steps or epochs * rows / accumulation))
    if warm_up < 2:  # too short: no warm-up, instead of XTuner's cosine from lr / 40
        assert len(schedulers) == 1
        warm_up = 0
    for step in range(total):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            xtuner_lr(step, warm_up, total, 1e-3), rel=1e-6
        )
        optimizer.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_config_reads_back(config_path):
    values = load_config(config_path).values
    assert values["optim_wrapper"]["optimizer"] == {
        "type": "torch.optim.AdamW",
        "lr": 4e-5,
        "betas": [0.9, 0.95],
        "weight_decay": 0.01,
    }
    assert values["train_dataloader"]["dataset"]["packed_length"] == 32768
    assert values["model"]["type"] == "sft.SupervisedFinetune"
    compile(config_path.read_text(), "config", "exec")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr = 4e-05", "lr = 4e-05e", "cannot be read"),
        ("batch_size = 1 ", "batch_size = 2 ", "batch_size must be 1"),
        ("strategy = dict(", "other = dict(", "does not define strategy"),
        ("'base'", "None", "model.llm.model_path is not a path"),
        ("from torch.optim import AdamW", "from xtuner.optim import AdamW", "XTuner's own classes"),
        ("zero_stage = 2", "zero_stage = 4", "invalid zero_stage"),
        ("import os", "", None),
    ],
)
def test_config_errors_say_what_to_do(config_path, old, new, said):
    text = config_path.read_text()
    config_path.write_text("import os\nhome = os.sep\n" + text if said is None else text.replace(old, new))
    if said is None:
        assert load_config(config_path).source.home == "/"
        return
    with pytest.raises(UserError, match=said):
        load_config(config_path)


# Keys that a training config may leave out: the key, its line in the config, and the default.
LEFT_OUT = [
    ("dtype", "        dtype=dtype,", "auto"),
    ("zero_stage", "    zero_stage=zero_stage,", 2),
    ("sequence_parallel", "    sequence_parallel=sequence_parallel,", 1),
    ("accumulative_counts", "    accumulative_counts=accumulative_counts,", 1),
    ("step_rows", "    global_batch=global_batch,", None),
    ("max_epochs", "    max_epochs=max_epochs,", 1),
    ("max_steps", "    max_steps=max_steps,", None),
    ("save_steps", "        interval=save_steps,", 500),
    ("lora", "    lora=lora,", None),
    ("tokenizer_path", "    tokenizer=tokenizer_path,", None),
]


def test_keys_that_a_config_leaves_out_have_one_default(config_path, monkeypatch):
    """The parsed config and the runner get the default. The run identity has only the keys in the file."""
    from snaketune.training.train_rank import runner_config

    text = config_path.read_text()
    for _, line, _ in LEFT_OUT:
        assert text.count(f"\n{line}") == 1, line
        text = text.replace(f"\n{line}", "")
    config_path.write_text(text)
    config = load_config(config_path)
    assert {name: getattr(config, name) for name, _, _ in LEFT_OUT} == {
        name: default for name, _, default in LEFT_OUT
    }
    assert config.values["strategy"].keys() == {"type", "offload", "zero3_init"}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    made = runner_config(config, config_path.parent)
    assert (made.strategy.zero_stage, made.strategy.sequence_parallel, made.strategy.dtype) == (2, 1, "auto")
    assert (made.train_cfg.max_epochs, made.train_cfg.max_steps) == (1, None)
    assert made.default_hooks.checkpoint.interval == 500
    assert load_config(config_path, zero_stage=0).zero_stage == 0
    with pytest.raises(AttributeError):
        config.zero_stage = 3


def test_equal_configs_keep_their_identity(config_path):
    """The digest is that of the first release. If it changed, everybody's runs would be trained again."""
    import numpy as np

    from snaketune.common.files import sha256_json
    from snaketune.common.fingerprints import FingerprintCache

    folder = config_path.parent
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text("{}")
    (folder / "base/model.safetensors").write_text("weights")
    data = folder / "train/cn/one/chat.bin"
    data.parent.mkdir(parents=True)
    data.write_text('{"tokens": [1, -2]}\n')
    with open(f"{data}.meta", "wb") as meta:
        np.save(meta, np.array([(0, 2)], dtype=np.int64))
    paths = {
        "model_path": str(folder / "base"),
        "tokenizer_path": "none",
        "train_folder": str(folder / "train"),
    }
    config_path.write_text(
        train_config(**paths, dtype="float32").replace("tokenizer=tokenizer_path", "tokenizer=None")
    )
    fields = run_identity(load_config(config_path), 2, FingerprintCache(folder / "digests.json"))
    assert sha256_json(fields) == "7da7adb1fd82ddfc186937db6a92b97ae451e86a2ebc26fa6ee275a8e49e1042"


def test_a_setting_is_part_of_the_identity_only_if_it_is_set():
    base = {"model_path": "m", "tokenizer_path": "t", "train_folder": "d", "lora_rank": 2}
    text = train_config(**base)
    lora = "lora = {'rank': 2, 'alpha': 4, 'dropout': 0.0, 'target_modules': 'auto'}"
    assert f"\n{lora}\n" in text and "\nrouter_aux_loss = None" in text
    changed = train_config(**base, lora_experts=False, router_aux_loss=0.0)
    assert f"\n{lora[:-1]}, 'experts': False}}\n" in changed and "\nrouter_aux_loss = 0.0" in changed


def test_render_script(run_script, tmp_path):
    paths = ("--model-path", "m", "--tokenizer-path", "t", "--train-folder", "d", "--data-order", "o")
    run_script(
        "render_train_config.py", "--output", tmp_path / "a.py", *paths, "--lr", "1e-5", "--max-steps", 7
    )
    text = (tmp_path / "a.py").read_text()
    assert "\nlr = 1e-05 " in text and "\nmax_steps = 7 " in text and str(tmp_path) not in text
    mine = tmp_path / "mine.py"
    mine.write_text(text + "\n# mine\n")
    run_script("render_train_config.py", "--output", tmp_path / "b.py", "--from-config", mine)
    assert (tmp_path / "b.py").read_bytes() == mine.read_bytes()
    mine.write_text("model = (")
    refused = run_script(
        "render_train_config.py", "--output", tmp_path / "c.py", "--from-config", mine, check=False
    )
    assert (
        refused.returncode == 2
        and "mine.py cannot be read" in refused.stderr
        and not (tmp_path / "c.py").exists()
    )
    refused = run_script(
        "render_train_config.py", "--output", tmp_path / "c.py", *paths, "--lr", 0, check=False
    )
    assert refused.returncode == 2 and "argument --lr: found 0, expected more than 0" in refused.stderr


def test_differences_name_the_fields():
    old = {"hyperparameters": {"lr": 1.0, "same": 2, "gone": 3}, "data": "a" * 64, "world_size": 1}
    new = {"hyperparameters": {"lr": 2.0, "same": 2}, "data": "b" * 64, "world_size": 1}
    assert differences(old, new) == [
        "data: aaaaaaaaaaaa -> bbbbbbbbbbbb",
        "hyperparameters.gone: 3 -> (none)",
        "hyperparameters.lr: 1.0 -> 2.0",
    ]


def test_slurm_environment():
    variables = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    found = slurm_environment({**variables, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"})
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": 23456,
    }
    with pytest.raises(UserError, match="SLURM_LAUNCH_NODE_IPADDR is not set"):
        slurm_environment(variables)


@pytest.mark.slow
def test_ranks_end_together(tmp_path, repo_root):
    script, launcher = tmp_path / "rank.py", repo_root / "tests" / "ranks.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "if os.environ['RANK'] == sys.argv[1]: time.sleep(1); os.kill(os.getpid(), int(sys.argv[2]))\n"
        "time.sleep(0 if sys.argv[1] == '-' else 60)\n"
    )
    own = {"env": {**os.environ, "PYTHONPATH": str(repo_root / "workflow_scripts")}, "timeout": 60}
    assert PARENT.run([launcher, 2, script, "-"], **own).returncode == 0
    ended = PARENT.run([launcher, 3, script, 1, 9], **own)
    assert ended.returncode == 137 and "Rank 1 was killed by signal 9" in ended.stderr
    for rank in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def checkpoint(folder, step: int, **marker) -> None:
    path = folder / f"iter_{step}.pth"
    path.mkdir()
    (path / "weights.pt").write_bytes(b"12345")
    files = {"weights.pt": {"bytes": 5, "sha256": sha256(b"12345").hexdigest()}}
    marker = {"step": step, "total_steps": 9, "save_optimizer": True, "files": files, **marker}
    write_json(path / "COMPLETE.json", marker)


def test_only_whole_checkpoints_count(tmp_path, capsys):
    for step in (2, 10, 4):
        checkpoint(tmp_path, step)
    assert newest_whole_checkpoint(tmp_path).name == "iter_10.pth"
    (tmp_path / "iter_10.pth" / "weights.pt").write_bytes(b"123")
    assert newest_whole_checkpoint(tmp_path).name == "iter_4.pth"
    assert "iter_10.pth is not a whole checkpoint" in capsys.readouterr().out
    (tmp_path / "iter_4.pth" / "COMPLETE.json").write_text("{")
    (tmp_path / ".iter_11.pth.tmp").mkdir()
    (tmp_path / "iter_3.pth").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iter_2.pth"]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_10.pth", "iter_2.pth", "iter_4.pth"]
    checkpoint(tmp_path, 12)
    prune_checkpoints(tmp_path, -1)
    assert len(list_checkpoints(tmp_path)) == 2
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iter_12.pth"]
    assert newest_whole_checkpoint(tmp_path / "nothing") is None


def test_a_flipped_bit_is_seen_and_the_checkpoint_set_aside(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step)
    broken = tmp_path / "iter_4.pth"
    assert is_intact(broken)
    (broken / "weights.pt").write_bytes(b"12345"[:-1] + bytes([ord("5") ^ 1]))
    assert is_whole(broken) and not is_intact(broken)
    assert is_intact(broken, rank=1, world_size=2), "the only file is in rank 0's share"
    with pytest.raises(UserError, match="torn or corrupt"):
        read_state_dict(broken)
    assert set_aside(broken).name == "corrupt_iter_4.pth"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iter_2.pth"]


def test_metrics_are_cut_back(tmp_path):
    from snaketune.training.metrics_file import cut_metrics

    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    file.write_text("".join(lines) + '{"step": 6, "lo')
    cut_metrics(file, 9)
    assert file.read_text() == "".join(lines)
    cut_metrics(file, 3)
    assert file.read_text() == "".join(lines[:3])
    cut_metrics(tmp_path / "none.jsonl", 3)


def test_random_state_comes_back(tmp_path):
    import random

    import numpy as np

    from snaketune.checkpoints.checkpoint_content import load_random_state, random_state

    torch.save(random_state(), tmp_path / "random_state_rank_0.pt")
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    load_random_state(tmp_path, 0)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first


def test_zero_0_clips_by_the_norm_in_fp64_and_skips_what_is_not_finite():
    """On a CPU, torch's norm of this many fp32 numbers is off by a thousandth."""
    from types import SimpleNamespace

    from snaketune.training.nonfinite_steps import replace_zero_0_step

    weight = torch.nn.Parameter(torch.zeros(5, 4_000_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    replace_zero_0_step(SimpleNamespace(optimizer=optimizer, gradient_clipping=lambda: 2.0))
    gradient = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.clone()
    optimizer.step()
    norm = math.sqrt(sum(row.double().square().sum().item() for row in gradient))
    assert optimizer._global_grad_norm == pytest.approx(norm, rel=1e-9) and not optimizer.overflow
    torch.testing.assert_close(weight.detach(), gradient * (-2.0 / norm), rtol=1e-5, atol=0)
    before = weight.detach().clone()
    weight.grad[3, 77] = math.nan
    optimizer.step()
    assert optimizer.overflow and torch.equal(weight, before)


def test_zero_layouts_are_joined(tmp_path):
    """Files of two ranks with padding, for stages 2 and 3, against the tensors they were made from."""
    from snaketune.checkpoints.zero_weights import read_zero_state_dict

    tensors = OrderedDict(a=torch.arange(15.0).view(3, 5), b=torch.arange(7.0), c=torch.tensor(3.0))
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in tensors.items())]
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()] + [torch.zeros(1)])
    model = {"module": {}, "param_shapes": shapes, "buffer_names": [], "shared_params": {"tied": "a"}}
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(flat.view(2, -1)):
        state = {"zero_stage": 2, "single_partition_of_fp32_groups": [part]}
        torch.save(
            {"optimizer_state_dict": state}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    for stage in (2, 3):
        if stage == 3:
            for rank in range(2):
                pieces = []
                for tensor in tensors.values():
                    size = math.ceil(tensor.numel() / 2)
                    padded = torch.cat([tensor.flatten(), torch.zeros(2 * size - tensor.numel())])
                    pieces.append(padded[rank * size : (rank + 1) * size])
                state = {"zero_stage": 3, "fp32_flat_groups": [torch.cat(pieces)]}
                torch.save(
                    {"optimizer_state_dict": state},
                    tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
                )
        read = read_zero_state_dict(tmp_path)
        assert set(read) == {"a", "b", "c", "tied"}
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        assert torch.equal(read["tied"], tensors["a"])
