"""Adapts mmengine's DeepSpeed strategy to current DeepSpeed, on CPU ranks (gloo) and GPUs (nccl)."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from snaketune.common.cli import UserError
from snaketune.models.device import check_dtype, resolve_dtype, training_device
from snaketune.models.lora import register_token_rows
from snaketune.models.sequence_parallel import SequenceParallel
from snaketune.settings.schema import default_of
from snaketune.training.document_modules import gather_for_all_documents
from snaketune.training.expert_modules import use_experts_together
from snaketune.training.train_config import plain


def prepare_deepspeed() -> None:
    """Patches DeepSpeed. Must run before the first import of mmengine's strategies.

    mmengine 0.10.7 imports optimizers that DeepSpeed 0.19.7 removed; empty classes replace them. The
    shared-memory collective, which gloo does not need, is turned off: compiling it on first use takes a
    minute.
    """
    if training_device() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to guess
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    name = "deepspeed.runtime.fp16.onebit"
    if name not in sys.modules and find_spec(name) is None:
        module = ModuleType(name)
        for optimizer in ("OnebitAdam", "OnebitLamb", "ZeroOneAdam"):
            setattr(module, optimizer, type(optimizer, (torch.optim.Optimizer,), {}))
        sys.modules[name] = module


prepare_deepspeed()

import deepspeed  # noqa: E402
from mmengine._strategy.deepspeed import DeepSpeedStrategy as _MMEngineDeepSpeedStrategy  # noqa: E402
from mmengine.optim import LinearLR  # noqa: E402
from torch import distributed  # noqa: E402


def init_process_group() -> None:
    """Joins the process group given by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""
    if training_device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "nccl"
    else:
        backend = "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


class DeepSpeedStrategy(_MMEngineDeepSpeedStrategy):
    """ZeRO training of one model.

    Attributes:
        steps_per_epoch: Optimizer steps per epoch, set by the training loop; may be fractional.

    Args:
        zero_stage: 0 (plain data parallel), 1 (optimizer state sharded), 2 (and gradients), 3 (and weights).
        dtype: Type of weights and activations: `auto`, `float32`, `bfloat16` or `float16`.
        gradient_clipping: Maximum L2 norm of the gradient; 0 turns clipping off. Always set, because
            DeepSpeed's default changed from 0 to 1.
        sequence_parallel: Ranks that share the tokens of each packed sequence, see
            `snaketune.models.sequence_parallel`.
        zero3_init: With stage 3, loads the model in shards, so that no rank ever holds it whole. For models
            so large that a host cannot hold one copy per rank.
        offload: State kept in host memory between uses, and updated there: `none`, `optimizer` (stage 1 to
            3), or `all` (the weights too; stage 3).
        config: Additional DeepSpeed settings; they override the ones made here.
    """

    def __init__(
        self,
        zero_stage: int,
        dtype: str,
        gradient_clipping: float,
        sequence_parallel: int,
        zero3_init: bool = default_of("train.zero3_init"),
        offload: str = default_of("train.offload"),
        config: dict | None = None,
        **kwargs,
    ):
        device = training_device()
        check_dtype(resolve_dtype(dtype, device), device)
        settings = deepspeed_settings(zero_stage, dtype, device, offload)
        # DeepSpeed writes its settings into checkpoints, which we read with weights_only: use plain values
        # only.
        for key, value in plain(config or {}).items():
            both = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = {**settings[key], **value} if both else value
        super().__init__(config=settings, gradient_clipping=float(gradient_clipping), **kwargs)
        self.sequence_parallel = SequenceParallel(sequence_parallel)
        if zero3_init and zero_stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            # transformers uses it when it builds a model, as long as this object is alive.
            self.transformers_config = HfDeepSpeedConfig(self.config)

    def _setup_env(self, **kwargs) -> None:
        super()._setup_env(**kwargs)
        self._timestamp = "mmengine_log"  # one log folder for all attempts

    def _setup_distributed(self, launcher: str | None = None, backend: str = "", **kwargs) -> None:
        init_process_group()

    def _init_model_weights(self, model):
        # Every rank loads the same files, and DeepSpeed also broadcasts rank 0's weights.
        return model

    def _wrap_model(self, model):
        if self.sequence_parallel.size > 1 and model.router_aux_loss:
            raise UserError(
                "the router's auxiliary loss cannot be computed by ranks that share a packed sequence",
                found=f"sequence_parallel = {self.sequence_parallel.size}",
                fix="set sequence_parallel to 1, or router_aux_loss to 0",
            )
        self.sequence_parallel.attach(model.llm)
        stage = self.config["zero_optimization"]["stage"]
        use_experts_together(model, stage, distributed.get_world_size())
        if stage == 3:
            gather_for_all_documents(model)
        if stage == 3 and _has_frozen(model):
            register_token_rows(model)
        wrapper = super()._wrap_model(model)
        # ZeRO-3 does not move the module to the device, but the preprocessor, which moves batches, has to be
        # there.
        wrapper.model.module.data_preprocessor.to(wrapper.model.device)
        return wrapper

    def prepare(self, model, *, dispatch_kwargs: dict, **kwargs):
        """Like mmengine's, but counts an epoch in optimizer steps, at which the schedulers step."""
        dispatch_kwargs = {**dispatch_kwargs, "epoch_length": self.steps_per_epoch}
        return super().prepare(model, dispatch_kwargs=dispatch_kwargs, **kwargs)

    def _build_param_scheduler(self, scheduler, optim_wrapper, default_args):
        built = super()._build_param_scheduler(
            _drop_empty(scheduler, default_args), optim_wrapper, default_args
        )
        return [s for s in built if s is not None]

    def resume(self, filename: str, **kwargs) -> dict:
        """Loads weights, optimizer and schedulers from `<run folder>/iter_N.pth`. Returns the client state.

        DeepSpeed unpickles these files without restriction; they are trusted because this run wrote them.
        """
        path = Path(filename)
        # LoRA's frozen weights are not in the checkpoint: the base model has them.
        strict = not _has_frozen(self.model.model.module)
        _, client_state = self.model.load_checkpoint(
            str(path.parent), tag=path.name, load_module_strict=strict
        )
        self.load_scheduler_state_dict(client_state["param_schedulers"])
        return client_state


def _has_frozen(model: torch.nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in model.parameters())


def _drop_empty(schedulers: list[dict], default_args: dict) -> list[dict]:
    """Drops a warm-up of fewer than two steps.

    LinearLR moves from start to end within its steps. With one step it would stay at the start value, and the
    cosine would begin there, as XTuner's schedule does on runs of fewer than 80 steps.
    """
    epoch_length = default_args.get("epoch_length", 1)
    kept = []
    for scheduler in schedulers:
        if scheduler["type"] in (LinearLR, "LinearLR"):
            unit = epoch_length if scheduler.get("convert_to_iter_based") else 1
            if int(scheduler["end"] * unit) - int(scheduler.get("begin", 0) * unit) < 2:
                continue
        kept.append(scheduler)
    return kept


def deepspeed_settings(
    zero_stage: int, dtype: str, device: str, offload: str = default_of("train.offload")
) -> dict:
    """Returns the DeepSpeed config for a ZeRO stage, dtype, device (`cpu` or `cuda`) and offload.

    Raises:
        UserError: The combination is not supported.
    """
    on_gpu = device == "cuda"
    resolved = resolve_dtype(dtype, device)
    if zero_stage == 0 and resolved != torch.float32:
        raise UserError(
            f"zero_stage 0 cannot train in {str(resolved).removeprefix('torch.')}",
            found="stage 0 saves no fp32 copy of the weights, so small updates would be rounded away",
            expected="zero_stage 1, 2 or 3, or dtype float32",
            fix="set zero_stage to 1, which costs nothing extra on one rank",
        )
    least = {"none": 0, "optimizer": 1, "all": 3}
    if offload not in least:
        raise UserError("invalid offload", found=offload, expected="none, optimizer or all")
    if zero_stage < least[offload]:
        raise UserError(
            f"offload {offload} needs a higher ZeRO stage",
            found=zero_stage,
            expected=f"{least[offload]} or more",
        )
    bucket = int(5e8 if on_gpu else 5e7)
    zero = {
        "stage": zero_stage,
        "overlap_comm": on_gpu and zero_stage > 0,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": resolved == torch.bfloat16},
        "fp16": {"enabled": resolved == torch.float16, "initial_scale_power": 16},
        # Accumulate gradients in fp32: summing many micro-batches in bfloat16 loses precision. Not in stage
        # 1, where DeepSpeed would switch to an optimizer that neither skips nonfinite steps nor writes the
        # same checkpoints.
        "data_types": {"grad_accum_dtype": "fp32" if resolved == torch.bfloat16 and zero_stage > 1 else None},
    }
