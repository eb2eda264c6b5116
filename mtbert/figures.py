"""Pictures of a run. The only file that knows matplotlib, which is imported when the first one is drawn.

    N examples, C classes, K tasks

Matplotlib rather than SVG by hand: TensorBoard shows pixels alone, and a report, a comparison and a page of the docs
then have the same pictures. Without pyplot nothing here is global, so nothing has to be closed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtbert.config import TaskConfig
from mtbert.errors import UserError
from mtbert.record import Curve, RunRecord, Said

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure  # others take the type from here

DOTS_PER_INCH = 100
POINTS = 2000
"""Of more points in a scatter, so many are drawn, evenly spaced in the file."""
PANELS_ACROSS = 4
SMOOTHED_OVER = 50
"""A running mean reaches over a 50th of the points to each side."""
COSINE = "gradient/cosine/"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    return figure, figure.subplots()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """(height, width, 4), red green blue and opacity."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def svg(figure: Figure) -> bytes:
    """The same picture, the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mtbert"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """For the `src` of an image: an SVG that carries all it needs, and whose ids cannot meet another picture's."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()


# ------------------------------------------------------------------------------------- one evaluation's task


def evaluation_figures(name: str, task: TaskConfig, said: Said) -> dict[str, Figure]:
    """What there is to see of a task's development set: confusion or scatter, and reliability where it has one."""
    if task.regression:
        return {"scatter": scatter(name, said.labels_N, said.predictions_N, task.range)}
    figures = {"confusion": confusion(name, said.labels_N, said.predictions_N, task.class_names)}
    if said.probabilities_NC.shape[1] and np.isfinite(said.probabilities_NC).all():
        figures["reliability"] = reliability(name, said.labels_N, said.probabilities_NC)
    return figures


def confusion(name: str, labels_N: NDArray[Any], predictions_N: NDArray[Any], names: Sequence[str]) -> Figure:
    """How often each class was taken for each; shaded by the share of the true class.

    Args:
        names: of all classes of the task, in the order of their numbers.
    """
    from sklearn.metrics import confusion_matrix

    classes = len(names)
    counts_CC = confusion_matrix(labels_N.astype(int), predictions_N.astype(int), labels=range(classes))
    shares_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    size = 2.4 + 0.32 * min(classes, 20)
    figure, axes = _figure(size + 0.4, size)
    image = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    if classes <= 12:  # more would be unreadable
        for true, predicted in np.ndindex(classes, classes):
            dark = shares_CC[true, predicted] > 0.5
            text = f"{counts_CC[true, predicted]}"
            axes.text(predicted, true, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        shown = [_literal(name) for name in names]
        long = max(map(len, names)) > 3
        axes.set_xticks(range(classes), shown, rotation=30 if long else 0, ha="right" if long else "center")
        axes.set_yticks(range(classes), shown)
    axes.set(xlabel="predicted", ylabel="true", title=f"{name}: confusion")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def scatter(name: str, labels_N: NDArray[Any], predictions_N: NDArray[Any], span: tuple[float, float]) -> Figure:
    """Predicted against true."""
    figure, axes = _figure(4.2, 4.0)
    shown = np.unique(np.linspace(0, len(labels_N) - 1, min(POINTS, len(labels_N))).astype(int))
    # rasterised: a report with ten thousand circles would be slow to open
    axes.scatter(labels_N[shown], predictions_N[shown], s=9, alpha=0.35, linewidths=0, rasterized=True)
    axes.plot(span, span, color="gray", linewidth=1, linestyle="--")
    axes.set(xlabel="true", ylabel="predicted", title=f"{name}: predicted against true")
    return figure


def reliability(name: str, labels_N: NDArray[Any], probabilities_NC: NDArray[Any], bins: int = 10) -> Figure:
    """How often answers of each confidence are right (Guo et al. 2017, §2), and how many there are of them.

    The confidence is the probability of the predicted class. The title names the expected calibration error (ECE).
    """
    shares_B, confidences_B, counts_B = calibration(labels_N, probabilities_NC, bins)
    figure, axes = _figure(4.2, 4.0)
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--")
    axes.plot(confidences_B, shares_B, marker="o", markersize=4)
    heights_B = counts_B / counts_B.sum()
    axes.bar(confidences_B, heights_B, width=0.6 / bins, alpha=0.25, color="gray", label="share of examples")
    error = expected_calibration_error(labels_N, probabilities_NC, bins)
    lowest = 1 / probabilities_NC.shape[1]
    axes.set(
        xlabel="confidence", ylabel="share right", title=f"{name}: ECE {error:.3f}", xlim=(lowest, 1), ylim=(0, 1.02)
    )
    axes.legend(loc="upper left", fontsize=8)
    return figure


def calibration(
    labels_N: NDArray[Any], probabilities_NC: NDArray[Any], bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Of each bin of confidence that is not empty: share right, mean confidence, examples. Bins are equally wide."""
    confidences_N = probabilities_NC.max(axis=1)
    right_N = probabilities_NC.argmax(axis=1) == labels_N
    bin_N = np.minimum((confidences_N * bins).astype(int), bins - 1)
    counts_B = np.bincount(bin_N, minlength=bins)
    full_B = counts_B > 0
    sums = [np.bincount(bin_N, values_N, bins)[full_B] for values_N in (right_N, confidences_N)]
    return sums[0] / counts_B[full_B], sums[1] / counts_B[full_B], counts_B[full_B]


def expected_calibration_error(labels_N: NDArray[Any], probabilities_NC: NDArray[Any], bins: int = 10) -> float:
    """Mean distance between confidence and share right, over examples (Guo et al. 2017, equation 3)."""
    shares_B, confidences_B, counts_B = calibration(labels_N, probabilities_NC, bins)
    return float(np.average(np.abs(shares_B - confidences_B), weights=counts_B))


# --------------------------------------------------------------------------------------------- gradients


def cosine_map(names: Sequence[str], cosines: Mapping[tuple[str, str], float]) -> Figure:
    """Heat map of the cosines between tasks' gradients; pairs that never met stay white."""
    values_KK = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(values_KK, 1.0)
    for (one, other), value in cosines.items():
        k, j = names.index(one), names.index(other)
        values_KK[k, j] = values_KK[j, k] = value
    size = 2.4 + 0.4 * min(len(names), 16)
    figure, axes = _figure(size + 0.6, size)
    image = axes.imshow(values_KK, cmap="RdBu", vmin=-1, vmax=1)
    for k, j in np.ndindex(values_KK.shape):
        if k != j and np.isfinite(values_KK[k, j]):
            axes.text(j, k, f"{values_KK[k, j]:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("gradient cosines")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def conflict_curves(runs: Sequence[RunRecord], labels: Sequence[str] | None = None) -> Figure:
    """Cosine of every pair of task gradients over training, one panel per pair, one line per run.

    Below 0 two tasks conflict. The faint line is what was recorded, the strong one its running mean.

    Args:
        labels: what the legend calls each run (runs of one label share a colour); default: the name of its folder.

    Raises `UserError` where no run recorded a pair, as one task alone does.
    """
    tags = sorted({tag for run in runs for tag in run.curves if tag.startswith(COSINE)})
    if not tags:
        raise UserError(f"{runs[0].folder}: no gradient cosines were recorded; they take two tasks in one step")
    drawn = {tag.removeprefix(COSINE).replace("~", " and "): curves_of(runs, tag, labels) for tag in tags}
    return panels(drawn, zero=True, ylabel="cosine")


# ------------------------------------------------------------------------------------------------ curves

Lines = Sequence[tuple[str, Curve]]
"""What a panel holds: labels and curves."""


def curves_of(runs: Sequence[RunRecord], tag: str, labels: Sequence[str] | None = None) -> Lines:
    """A tag's curve of every run that has it, labelled with the run's name unless said otherwise."""
    named = zip(labels or [run.name for run in runs], runs, strict=True)
    return [(label, run.curves[tag]) for label, run in named if tag in run.curves]


def panels(drawn: Mapping[str, Lines], zero: bool = False, ylabel: str = "") -> Figure:
    """One panel per title, four in a row; lines with the same label share a colour.

    Args:
        zero: draw a line at 0.
    """
    from matplotlib.figure import Figure

    across = min(len(drawn), PANELS_ACROSS)
    down = -(-len(drawn) // across)
    figure = Figure(figsize=(0.4 + 3.1 * across, 0.2 + 2.5 * down), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    drawn = {title: [(_literal(label), curve) for label, curve in lines] for title, lines in drawn.items()}
    labels = list(dict.fromkeys(label for lines in drawn.values() for label, _ in lines))
    colours = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    for axes, (title, lines) in zip(grid, drawn.items(), strict=False):
        for label, curve in lines:
            _draw(axes, curve, colours[label])
        if zero:
            axes.axhline(0, color="gray", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="step", ylabel=ylabel)
        if (told := {label for label, _ in lines}) and len(labels) > 1:
            for label in labels:  # in one order everywhere
                axes.plot([], [], color=colours[label], label=label if label in told else None)
            axes.legend(fontsize=7)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    return figure


def _literal(label: str) -> str:
    """What a legend shows as this label: dollars are formulas to it, and what begins with an underscore is left out."""
    return label.replace("$", r"\$") if not label.startswith("_") else " " + label.replace("$", r"\$")


def _draw(axes: Axes, curve: Curve, colour: str) -> None:
    steps, values = curve.steps + 1, curve.values
    reach = len(values) // SMOOTHED_OVER
    if not reach:
        axes.plot(steps, values, color=colour, marker=".")
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    kernel, finite = np.ones(2 * reach + 1), np.isfinite(values)
    counts = np.convolve(finite, kernel, "same")  # fewer at both ends, where a window would reach out of the run
    sums = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    axes.plot(steps, np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0), color=colour)
