"""Pictures of sweeps and of single caches, as PNG bytes (matplotlib: `pip install minikv_jax[evaluation]`).

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every series also has its own marker.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
MARKERS = "osD^vPX*<>ph"
_WIDTH = 9.0  # inches; with _DPI about the width of a README column, twice over
_DPI = 160

_TICKS = (3.125, 6.25, 12.5, 25, 50, 100)  # per cent

# Metrics that can be a Pareto figure's quality: label, and whether more is better.
_QUALITIES = {
    "kl_to_full": ("KL to full, nats/token", False),
    "exact_match": ("exact match", True),
    "score": ("score", True),
}


def pareto(points: Mapping[str, Mapping[str, Any]], title: str) -> bytes:
    """Quality against stored bytes, a panel per quality that was measured; the frontier is a grey line.

    Args:
      points: of `Sweep.results`. A method's points are one series.
    """
    qualities = [key for key in _QUALITIES if any(key in point["means"] for point in points.values())]
    if "score" in qualities and "exact_match" in qualities:
        qualities.remove("exact_match")  # the score says the same, and less strictly
    series: dict[str, list[Mapping[str, Any]]] = {}
    for point in points.values():
        series.setdefault(point["method"], []).append(point["means"])
    figure, axes = panels(len(qualities), 3.6)
    for axis, quality in zip(axes, qualities, strict=True):
        _pareto_panel(axis, series, quality)
    figure.suptitle(f"{title}: quality against stored bytes", fontsize=11)
    figure.supxlabel("allocated bytes, share of the full cache", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return png(figure)


def _pareto_panel(axis: Axes, series: Mapping[str, list[Mapping[str, Any]]], quality: str) -> None:
    label, more_is_better = _QUALITIES[quality]
    found: list[tuple[float, float]] = []
    for index, (name, values) in enumerate(series.items()):
        spots = sorted(
            (100 * mean["cache_bytes"] / mean["full_cache_bytes"], mean[quality]) for mean in values if quality in mean
        )
        found += spots
        axis.plot(
            [x for x, _ in spots],
            [y for _, y in spots],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=1,
            markersize=5.5,
            label=name,
        )
    _frontier(axis, found, more_is_better)
    axis.set_xscale("log", base=2)
    low, high = min(x for x, _ in found), max(x for x, _ in found)
    axis.set_xlim(low / 1.15, high * 1.15)
    axis.set_xticks([tick for tick in _TICKS if low / 1.15 <= tick <= high * 1.15])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.xaxis.set_minor_locator(NullLocator())
    if not more_is_better and any(y > 0 for _, y in found):
        least = min(y for _, y in found if y > 0)
        axis.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(least)))
        axis.set_ylim(bottom=0 if any(y == 0 for _, y in found) else least / 1.5)
    if more_is_better:
        axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel(f"{label} ({'higher' if more_is_better else 'lower'} is better)", fontsize=9)
    axis.grid(alpha=0.3)


def _frontier(axis: Axes, spots: list[tuple[float, float]], more_is_better: bool) -> None:
    """The points that no other one beats in both, as steps."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(spots, key=lambda spot: (spot[0], -spot[1] if more_is_better else spot[1])):
        if not best or (y > best[-1][1] if more_is_better else y < best[-1][1]):
            best.append((x, y))
    xs, ys = [x for x, _ in best], [y for _, y in best]
    axis.step(xs, ys, where="post", color="0.75", linewidth=5, zorder=0, label="frontier")


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels side by side, at least one."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, max(count, 1), squeeze=False)[0])


def png(figure: Figure) -> bytes:
    """The figure as a file's bytes, the same for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
