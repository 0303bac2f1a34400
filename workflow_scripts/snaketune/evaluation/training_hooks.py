"""Hooks that evaluate the model during training: held-out loss, and answers to fixed prompts.

They do not affect training: they leave the random state unchanged, compute no gradients, and restore training
mode. When a run resumes, both files are cut back to the step it resumes from, like its metrics.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import distributed

from snaketune.chat_files.prompts import read_prompts
from snaketune.common.cli import UserError
from snaketune.common.result_paths import EVALS, GENERATIONS
from snaketune.encoding.chat_encoding import ChatEncoding
from snaketune.encoding.tokenizer import load_tokenizer
from snaketune.evaluation.generation import generate
from snaketune.evaluation.heldout import Sample, batches_by_length, load_heldout
from snaketune.evaluation.scoring import add_losses, summarise
from snaketune.settings.schema import default_of
from snaketune.training.eval_mode import eval_mode
from snaketune.training.metrics_file import cut_metrics
from snaketune.training.metrics_hook import MetricsHook
from snaketune.training.progress_line import say


class _EverySteps(Hook):
    """Runs `evaluate` before the first step, every `interval` steps, and after the last step; never if 0."""

    priority = (
        "LOW"  # after the metrics and before the checkpoint, so that every saved step has been evaluated
    )
    file: str

    def __init__(self, interval: int, tokenizer: str | None, encoding: ChatEncoding):
        self.interval, self.tokenizer_folder, self.encoding = interval, tokenizer, encoding

    def load_tokenizer(self):
        """Returns the tokenizer with training's chat template."""
        return load_tokenizer(self.tokenizer_folder).with_template(self.encoding.template)

    def before_train(self, runner) -> None:
        if self.interval > 0:
            self.load()
            if is_main_process():
                cut_metrics(Path(runner.work_dir) / self.file, runner.iter)
            if runner.iter == 0:
                self._run(runner, 0)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        step = batch_idx + 1
        if self.interval > 0 and (step % self.interval == 0 or step == runner.max_iters):
            self._run(runner, step)

    def _run(self, runner, step: int) -> None:
        with _evaluating(runner.model.model) as model:
            line = self.evaluate(runner, model, step)
        if line is not None and is_main_process():
            with open(Path(runner.work_dir) / self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}, ensure_ascii=False) + "\n")

    def load(self) -> None:
        """Loads the evaluation data."""
        raise NotImplementedError

    def evaluate(self, runner, model, step: int) -> dict | None:
        """Returns a record for the file; only rank 0 writes it."""
        raise NotImplementedError


class HeldoutLossHook(_EverySteps):
    """Writes the loss on held-out conversations to evals.jsonl, measured as in evaluate_model.py.

    The conversations are split among the ranks.

    Args:
        interval: Optimizer steps between evaluations; 0 turns them off.
        folder: Held-out conversations, `<dataset>/processed/<any>/<file>.jsonl`.
        tokenizer: Folder of the extended tokenizer.
        max_length: Maximum tokens of a conversation; longer ones are cut.
        max_samples: Maximum conversations per dataset; None for all.
        batch_tokens: Maximum tokens of a padded batch.
        **encoding: `template`, `mask` and `control_tokens` of `ChatEncoding`, as used to tokenise the data.
    """

    file = EVALS

    def __init__(
        self,
        interval: int = 0,
        folder: str | None = None,
        tokenizer: str | None = None,
        max_length: int = default_of("evaluate.max_tokens"),
        max_samples: int | None = None,
        batch_tokens: int = 2048,
        **encoding: str | None,
    ):
        super().__init__(interval, tokenizer, ChatEncoding(**encoding))
        self.folder = folder
        self.max_length, self.max_samples, self.batch_tokens = max_length, max_samples, batch_tokens

    def load(self) -> None:
        """Reads and tokenises the conversations."""
        if not self.folder or not self.tokenizer_folder:
            raise UserError("eval_steps is set, but heldout_dir is not", fix="set heldout_dir")
        tokenizer = self.load_tokenizer()
        self.vocab_size = tokenizer.vocab_size
        self.samples = load_heldout(
            Path(self.folder), tokenizer, self.encoding, self.max_length, self.max_samples
        )

    def evaluate(self, runner, model, step: int) -> dict:
        """Returns loss, perplexity and counts, overall and by dataset."""
        started = time.perf_counter()
        sums = dict.fromkeys(sorted({sample.dataset for sample in self.samples}), 0.0)
        nothing = dict(sums)
        for batch, counts in self._batches(runner):
            add_losses(sums if counts else dict(nothing), model, batch, self.vocab_size)
        total = torch.tensor(list(sums.values()), dtype=torch.float64, device=runner.model.model.device)
        distributed.all_reduce(total)
        result = summarise(dict(zip(sums, total.tolist(), strict=True)), self.samples)
        if is_main_process():
            _record(
                runner, step, {"heldout/loss": result["loss"], "heldout/perplexity": result["perplexity"]}
            )
            say(
                f"Held-out loss after step {step}: {result['loss']:.4f}, perplexity {result['perplexity']:.2f}, "
                f"{time.perf_counter() - started:.1f} s"
            )
        return {**result, "seconds": round(time.perf_counter() - started, 3)}

    def _batches(self, runner) -> Iterator[tuple[list[Sample], bool]]:
        """Yields this rank's batches, each with True if it counts.

        With ZeRO-3 each forward pass gathers weights, so all ranks need equally many; the extra batches do
        not count.
        """
        batches = batches_by_length(self.samples, self.batch_tokens)
        for start in range(0, len(batches), runner.world_size):
            mine = start + runner.rank
            if mine < len(batches):
                yield batches[mine], True
            elif _weights_are_sharded(runner.model.model):
                yield batches[-1], False


class GenerateHook(_EverySteps):
    """Writes greedy answers to fixed prompts to generations.jsonl, like XTuner's EvaluateChatHook.

    Only rank 0 generates. With ZeRO-3 all ranks generate the same answers, slowly: each token gathers all
    weights.

    Args:
        interval: Optimizer steps between generations; 0 turns them off.
        prompts: JSON file with a list of conversations without the answer.
        tokenizer: Folder of the extended tokenizer.
        max_new_tokens: Maximum tokens of an answer.
        **encoding: As for `HeldoutLossHook`.
    """

    file = GENERATIONS

    def __init__(
        self,
        interval: int = 0,
        prompts: str | None = None,
        tokenizer: str | None = None,
        max_new_tokens: int = default_of("evaluate.max_new_tokens"),
        **encoding: str | None,
    ):
        super().__init__(interval, tokenizer, ChatEncoding(**encoding))
        self.prompts_file, self.max_new_tokens = prompts, max_new_tokens

    def load(self) -> None:
        """Reads the prompts."""
        if not self.prompts_file or not self.tokenizer_folder:
            raise UserError("generate_steps is set, but prompts is not", fix="set prompts to a JSON file")
        self.prompts = read_prompts(Path(self.prompts_file))
        self.tokenizer = self.load_tokenizer()

    def evaluate(self, runner, model, step: int) -> dict | None:
        """Returns the answers; None on a rank that does not generate."""
        if not is_main_process() and not _weights_are_sharded(runner.model.model):
            return None
        answers = generate(
            model, self.prompts, self.tokenizer, self.encoding, self.max_new_tokens, show_progress=False
        )
        if is_main_process():
            for number, answer in enumerate(answers, 1):
                say(f"Answer {number} after step {step}: {answer['text']!r}")
            _record_texts(runner, step, {f"answer/{n}": a["text"] for n, a in enumerate(answers, 1)})
        return {"answers": answers}


@contextmanager
def _evaluating(engine) -> Iterator:
    """Yields the model in eval mode; then restores training mode, generation settings and random state."""
    model = engine.module.llm
    settings = model.generation_config
    devices = [engine.device] if torch.device(engine.device).type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), eval_mode(engine.module):
            yield model
    finally:
        model.generation_config = settings


def _weights_are_sharded(engine) -> bool:
    return engine.zero_optimization_partition_weights()


def _metrics(runner) -> MetricsHook | None:
    return next((hook for hook in runner.hooks if isinstance(hook, MetricsHook)), None)


def _record(runner, step: int, values: dict) -> None:
    if (metrics := _metrics(runner)) is not None:
        metrics.record(step, values)


def _record_texts(runner, step: int, texts: dict[str, str]) -> None:
    if (metrics := _metrics(runner)) is not None:
        for name, text in texts.items():
            metrics.board.add_text(name, text, step)
