"""Shows training progress: one updating line on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from datetime import timedelta

from tqdm import tqdm


class ProgressLine:
    """Shows optimizer steps.

    Args:
        done: Steps already done.
        total: Steps of the whole run.
        interval: Steps between lines in a log.
    """

    def __init__(self, done: int, total: int, interval: int = 1):
        self._total, self._interval = total, interval
        self._bar = None
        if sys.stdout.isatty():
            layout = "Step {n_fmt}/{total_fmt} |{bar:16}| {desc}"
            self._bar = tqdm(
                total=total, initial=done, bar_format=layout, file=sys.stdout, dynamic_ncols=True
            )

    def show(self, step: int, text: str, eta_seconds: float) -> None:
        """Shows that `step` is done.

        Args:
            step: Steps done.
            text: Metrics of the step.
            eta_seconds: Estimated time left.
        """
        text += f"  ETA {timedelta(seconds=round(eta_seconds))}"
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        elif step % self._interval == 0 or step in (1, self._total):
            print(f"Step {step}/{self._total}  {text}", flush=True)

    def close(self) -> None:
        """Closes the progress line and leaves its last state on screen."""
        if self._bar is not None:
            self._bar.close()


def say(text: str) -> None:
    """Prints a line above the progress line."""
    tqdm.write(text)
    sys.stdout.flush()
