"""The report's plots as inline SVG. Colours come from the page's CSS, for both light and dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from snaketune.reporting.report_words import translated_labels

# Placeholder colours for matplotlib; `_svg` replaces them with CSS variables of the page.
_INK, _GRID, _SERIES, _FAINT = "#010203", "#010204", "#010205", "#010206"
_CSS = {_INK: "var(--muted)", _GRID: "var(--line)", _SERIES: "var(--series)", _FAINT: "var(--faint)"}
_RUNS = [f"#0102{place:02x}" for place in range(16, 24)]
_CSS |= {colour: f"var(--run{place})" for place, colour in enumerate(_RUNS)}
_DASHES = ("-", "--", ":")
_MAX_POINTS = 2000


def loss_curve(metrics: list[dict], evals: Sequence[dict] = ()) -> str:
    """Returns an `<svg>` of the training loss by step, with the learning rate below.

    Args:
        metrics: One record per optimizer step, with `step`, `loss` (None if not finite), `lr` and optionally
            `attempt` (restarts are marked where it changes).
        evals: Records with `step` and `loss` of the held-out evaluations during training.
    """
    metrics = [record for record in metrics if record["loss"] is not None]
    steps, losses, rates = (_thin(_column(metrics, key)) for key in ("step", "loss", "lr"))
    figure = _figure(6.6, 3.5)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    smooth = len(steps) >= 20
    loss.plot(steps, losses, color=_FAINT if smooth else _SERIES, linewidth=1 if smooth else 1.8)
    if smooth:
        loss.plot(steps, _smoothed(losses), color=_SERIES, linewidth=1.8)
    if evals:
        points = [(record["step"], record["loss"]) for record in evals]
        loss.plot(*zip(*points, strict=True), "o:", color=_INK, markersize=4, linewidth=1, label="held-out")
        loss.legend(frameon=False, fontsize=9, labelcolor=_INK)
    rate.plot(steps, rates, color=_SERIES, linewidth=1.4)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    loss.set_ylabel("loss (nats per token)")
    rate.set_ylabel("learning rate")
    first = min([metrics[0]["step"], *(record["step"] for record in evals)]) if metrics else 0
    _share_steps(metrics, first, (loss, rate))
    return _svg(figure, (loss, rate), "Training loss and learning rate by optimizer step")


def run_curves(runs: Sequence[list[dict]], key: str) -> str:
    """Returns an `<svg>` of the smoothed training losses of several runs, overlaid.

    Args:
        runs: Records of each run's `metrics.jsonl`, in the order of their colours.
        key: The x axis: `step`, or `tokens` for the tokens seen so far.
    """
    from matplotlib.ticker import EngFormatter

    figure = _figure(5, 3)
    axes = figure.subplots()
    for place, metrics in reversed(list(enumerate(runs))):  # draws the first run on top
        seen, points = 0, []
        for record in metrics:
            seen += record["tokens"]
            if record["loss"] is not None:
                points.append((seen if key == "tokens" else record["step"], record["loss"]))
        if not points:
            continue
        below, losses = (_thin(list(column)) for column in zip(*points, strict=True))
        axes.plot(
            below,
            _smoothed(losses) if len(losses) >= 20 else losses,
            color=_RUNS[place % len(_RUNS)],
            linestyle=_DASHES[place // len(_RUNS) % len(_DASHES)],
            linewidth=1.6,
        )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("optimizer step" if key == "step" else "tokens")
    axes.set_ylabel("loss (nats per token)")
    return _svg(figure, (axes,), f"Training loss of all runs by {key}")


def speed_curve(metrics: list[dict]) -> str:
    """Returns an `<svg>` of the gradient norm by step, with the tokens per second below.

    Args:
        metrics: As for `loss_curve`, with `grad_norm` (None if not finite) and `tokens_per_second`.
    """
    steps, norms, speeds = (
        _thin(_column(metrics, key)) for key in ("step", "grad_norm", "tokens_per_second")
    )
    figure = _figure(6.6, 3.2)
    norm, speed = figure.subplots(2, 1, sharex=True)
    norm.plot(steps, norms, color=_SERIES, linewidth=1.2)
    speed.plot(steps, speeds, color=_SERIES, linewidth=1.2)
    for axes in (norm, speed):
        axes.set_ylim(bottom=0)
    norm.set_ylabel("gradient norm")
    speed.set_ylabel("tokens per second")
    _share_steps(metrics, metrics[0]["step"], (norm, speed))
    return _svg(figure, (norm, speed), "Gradient norm and tokens per second by optimizer step")


def checkpoint_plot(steps: Sequence[int], figures: Sequence[dict], best: int, label: str) -> str:
    """Returns an `<svg>` of a figure of the evaluated checkpoints by optimizer step, with 95% intervals.

    Args:
        steps: Ascending; 0 is the base model.
        figures: {value, low, high} at each step; None if undefined.
        best: The step to mark.
        label: Label of the figure.
    """
    points = [(step, each) for step, each in zip(steps, figures, strict=True) if each["value"] is not None]
    figure = _figure(6.6, 2.4)
    axes = figure.subplots()
    bounds = [(step, each["low"], each["high"]) for step, each in points if each["low"] is not None]
    if bounds:
        axes.fill_between(*zip(*bounds, strict=True), color=_FAINT, alpha=0.35, linewidth=0)
    axes.plot(
        [step for step, _ in points], [each["value"] for _, each in points], "o-", color=_SERIES, markersize=4
    )
    for step, each in points:
        if step == best:
            axes.plot([step], [each["value"]], "o", color=_INK, markersize=9, fillstyle="none", label="best")
            axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    return _svg(figure, (axes,), f"{label} of the evaluated checkpoints by optimizer step")


def length_histogram(edges: list[int], counts: list[int]) -> str:
    """Returns an `<svg>` histogram of conversations by length in tokens.

    Args:
        edges: Ascending edges, one more than `counts`; bar i covers `edges[i] <= tokens < edges[i + 1]`.
        counts: Conversations per bar.
    """
    from matplotlib.ticker import MaxNLocator

    filled = [i for i, count in enumerate(counts) if count] or [0]
    first, last = max(0, filled[0] - 1), min(len(counts), filled[-1] + 2)
    figure = _figure(4.6, 2.2)
    axes = figure.subplots()
    places = range(last - first)
    bars = axes.bar(places, counts[first:last], width=0.86, color=_SERIES)
    axes.bar_label(
        bars, labels=[str(n) if n else "" for n in counts[first:last]], fontsize=8, color=_INK, padding=1
    )
    # Ticks at the edges, between the bars.
    axes.set_xticks(
        [place - 0.5 for place in range(last - first + 1)], [_short(e) for e in edges[first : last + 1]]
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.margins(y=0.15)
    axes.set_xlabel("tokens")
    axes.set_ylabel("conversations")
    return _svg(figure, (axes,), "Conversations by length in tokens")


def attempts(metrics: list[dict]) -> list[int]:
    """Returns the steps at which a new attempt resumed."""
    pairs = zip(metrics, metrics[1:], strict=False)
    return [after["step"] for before, after in pairs if after.get("attempt") != before.get("attempt")]


def _column(metrics: list[dict], key: str) -> list[float]:
    return [math.nan if record[key] is None else record[key] for record in metrics]


def _share_steps(metrics: list[dict], first: int, all_axes) -> None:
    """Marks the attempts in stacked plots and labels the steps of the bottom one, starting at `first`."""
    from matplotlib.ticker import MaxNLocator

    for restart in attempts(metrics):
        for axes in all_axes:
            axes.axvline(restart, color=_INK, linewidth=0.8, linestyle=":")
    last = all_axes[-1]
    last.set_xlabel("optimizer step")
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(metrics) > 1:
        last.set_xlim(first, metrics[-1]["step"])


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure, all_axes, label: str) -> str:
    import matplotlib

    for axes in all_axes:
        axes.set_facecolor("none")
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, labelsize=9, length=0)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
            text.set_color(_INK)
            text.set_fontsize(9)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    # Keep text as text. Fixed salt and no date, so that equal data gives equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for colour, variable in _CSS.items():
        drawing = drawing.replace(colour, variable)
    drawing = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", drawing)
    return translated_labels(drawing).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _thin(values: list[float]) -> list[float]:
    """Averages over equal pieces if there are too many values to plot."""
    if len(values) <= _MAX_POINTS:
        return values
    width = -(-len(values) // _MAX_POINTS)
    pieces = [values[start : start + width] for start in range(0, len(values), width)]
    return [sum(piece) / len(piece) for piece in pieces]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a fifteenth of the run."""
    keep = 1 - 1 / max(2.0, len(values) / 15)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)
