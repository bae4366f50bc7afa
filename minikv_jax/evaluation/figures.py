"""Draws sweeps and inspected caches as PNG bytes, with matplotlib (`pip install minikv_jax[evaluation]`)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from minikv_jax.plots import COLOURS, MARKERS, new_figure, panels, png

if TYPE_CHECKING:
    from minikv_jax.evaluation.inspection import Inspection

_BYTE_SHARE_TICKS = (3.125, 6.25, 12.5, 25, 50, 100)  # per cent

# Quality metrics of the Pareto figure: label, and whether more is better.
_QUALITIES = {
    "kl_to_full": ("KL to full, nats/token", False),
    "exact_match": ("exact match", True),
    "score": ("score", True),
}


def pareto(points: Mapping[str, Mapping[str, Any]], title: str) -> bytes:
    """Draws quality against allocated bytes, with one panel per quality that differs between points.

    A grey line marks the frontier. If there are more methods than colours, methods on a frontier are coloured first and
    the remaining ones are grey.

    Args:
      points: the points of `Sweep.results` by label. The points of a method form one series.
      title: the beginning of the figure's title.
    """
    qualities = [key for key in _QUALITIES if any(key in point["means"] for point in points.values())]
    if "score" in qualities and "exact_match" in qualities:
        qualities.remove("exact_match")  # the score measures the same less strictly
    differing = [key for key in qualities if len({point["means"].get(key) for point in points.values()}) > 1]
    qualities = differing or qualities[:1]
    series: dict[str, list[Mapping[str, Any]]] = {}
    for point in points.values():
        series.setdefault(point["method"], []).append(point["means"])
    spots = [
        {name: sorted(_spot(mean, quality) for mean in values if quality in mean) for name, values in series.items()}
        for quality in qualities
    ]
    frontiers = [_frontier(panel, _QUALITIES[quality][1]) for panel, quality in zip(spots, qualities, strict=True)]
    looks = styles(list(series), {name for frontier in frontiers for _, _, name in frontier})
    figure, axes = panels(len(qualities), 3.6)
    for axis, quality, panel, frontier in zip(axes, qualities, spots, frontiers, strict=True):
        _pareto_panel(axis, quality, panel, frontier, looks)
    figure.suptitle(f"{title}: quality against allocated bytes", fontsize=11)
    figure.supxlabel("allocated bytes, share of the full cache", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return png(figure)


_Spot = tuple[float, float]  # per cent of the full cache's bytes, quality


def _spot(mean: Mapping[str, Any], quality: str) -> _Spot:
    return 100 * mean["cache_bytes"] / mean["full_cache_bytes"], mean[quality]


def _frontier(spots: Mapping[str, list[_Spot]], more_is_better: bool) -> list[tuple[float, float, str]]:
    """Finds the points that no other one beats in both bytes and quality, with their methods."""
    frontier: list[tuple[float, float, str]] = []
    named = [(x, y, name) for name, values in spots.items() for x, y in values]
    for x, y, name in sorted(named, key=lambda spot: (spot[0], -spot[1] if more_is_better else spot[1])):
        if not frontier or (y > frontier[-1][1] if more_is_better else y < frontier[-1][1]):
            frontier.append((x, y, name))
    return frontier


def styles(names: list[str], leading: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns each method's keyword arguments for `Axes.plot`; `leading` methods are coloured first."""
    coloured = names
    if len(names) > len(COLOURS):
        first = sorted(names, key=lambda name: name not in leading)[: len(COLOURS) - 1]
        coloured = [name for name in names if name in first]
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in coloured:
            index = coloured.index(name)
            looks[name] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5.5, "label": name}
        else:
            looks[name] = {"color": "0.6", "marker": ".", "markersize": 4, "zorder": 1}
    return looks


def _pareto_panel(
    axis: Axes,
    quality: str,
    spots: Mapping[str, list[_Spot]],
    frontier: list[tuple[float, float, str]],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    label, more_is_better = _QUALITIES[quality]
    for name, values in spots.items():
        axis.plot([x for x, _ in values], [y for _, y in values], linewidth=1, **looks[name])
    if any("label" not in look for look in looks.values()):
        axis.plot([], [], linewidth=1, color="0.6", marker=".", markersize=4, label="other methods")
    xs, ys = [x for x, _, _ in frontier], [y for _, y, _ in frontier]
    axis.step(xs, ys, where="post", color="0.85", linewidth=5, zorder=0, label="frontier")
    all_spots = [spot for values in spots.values() for spot in values]
    axis.set_xscale("log", base=2)
    low, high = min(x for x, _ in all_spots), max(x for x, _ in all_spots)
    axis.set_xlim(low / 1.15, high * 1.15)
    axis.set_xticks([tick for tick in _BYTE_SHARE_TICKS if low / 1.15 <= tick <= high * 1.15])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.xaxis.set_minor_locator(NullLocator())
    if not more_is_better and any(y > 0 for _, y in all_spots):
        smallest = min(y for _, y in all_spots if y > 0)
        bottom, top = smallest / 1.5, 1.5 * max(y for _, y in all_spots)
        ticks = _log_ticks(bottom, top)
        if any(y == 0 for _, y in all_spots):
            bottom, ticks = 0, [0.0, *ticks]
        axis.set_yscale("symlog", linthresh=smallest, linscale=0.5)
        axis.set_ylim(bottom, top)
        axis.set_yticks(ticks)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    if more_is_better:
        axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel(f"{label} ({'higher' if more_is_better else 'lower'} is better)", fontsize=9)
    axis.grid(alpha=0.3)


def _log_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 times the powers of ten between `low` and `high`, or only at the powers if they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]


_MAP_COLUMNS = 512  # at least one pixel each at a README's width


def kept_map(inspection: Inspection, title: str) -> bytes:
    """Draws the prompt tokens kept by each layer and KV head, or their share in runs of tokens of a long prompt."""
    kept = inspection.kept
    tokens = kept.shape[-1]
    size = -(-tokens // _MAP_COLUMNS)
    starts = np.arange(0, tokens, size)
    share = np.add.reduceat(kept, starts, axis=-1, dtype=np.float64) / np.diff(starts, append=tokens)
    figure, (axis,) = panels(1, 4.2)
    image = _head_rows(axis, 100 * share, 100, right=len(starts) * size)
    axis.set_xlim(0, tokens)
    axis.set_xlabel("position in the prompt, tokens", fontsize=10)
    what = "kept" if size == 1 else f"kept of {size} tokens"
    figure.colorbar(image, label=f"{what}, %", pad=0.015)
    figure.suptitle(f"{title}: which tokens each layer and head kept", fontsize=11)
    return png(figure)


def error_map(inspection: Inspection, title: str) -> bytes:
    """Draws the quantisation error of keys and values per layer, KV head and channel, relative to the head's RMS."""
    figure, axes = panels(2, 4.2)
    maps = []
    for error, rms in ((inspection.key_error, inspection.key_rms), (inspection.value_error, inspection.value_rms)):
        assert error is not None and rms is not None
        maps.append(100 * error / np.sqrt(np.mean(rms**2, axis=-1, keepdims=True)))
    limit = max(float(np.nanpercentile(x, 99.5)) for x in maps)
    images = [_head_rows(axis, x, limit) for axis, x in zip(axes, maps, strict=True)]
    for axis, name in zip(axes, ("keys", "values"), strict=True):
        axis.set_xlabel("channel", fontsize=10)
        axis.set_title(name, fontsize=10)
    figure.colorbar(images[0], ax=axes, label="RMS error, % of the head's RMS", extend="max", pad=0.015)
    figure.suptitle(f"{title}: quantisation error per channel", fontsize=11)
    return png(figure)


def budgets(inspections: Mapping[str, Inspection]) -> bytes:
    """Draws the tokens held by each layer, with one panel per method."""
    columns = min(len(inspections), 3)
    rows = -(-len(inspections) // columns)
    figure = new_figure(1.2 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in grid.flat[len(inspections) :]:
        axis.set_visible(False)
    for axis, (name, inspection) in zip(grid.flat, inspections.items(), strict=False):
        layers = np.arange(len(inspection.packed_tokens))
        kept = inspection.kept_tokens.mean(axis=1)
        axis.bar(layers, inspection.packed_tokens, width=1.0, color=COLOURS[0], label="as codes")
        axis.bar(
            layers,
            kept - inspection.packed_tokens,
            width=1.0,
            bottom=inspection.packed_tokens,
            color=COLOURS[5],
            label="in full precision",
        )
        axis.set_title(textwrap.fill(name.replace(",", ", "), 32), fontsize=9)
        axis.set_xlabel("layer", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle("What each layer holds of the prompt", fontsize=11)
    figure.supylabel("tokens per KV head", fontsize=10)
    _legend(figure, grid[0, 0])
    return png(figure)


def layer_errors(inspections: Mapping[str, Inspection]) -> bytes:
    """Draws the quantisation error of keys and values per layer, with one line per method that quantises."""
    sections = {
        "keys": {name: inspection.layer_key_error for name, inspection in inspections.items()},
        "values": {name: inspection.layer_value_error for name, inspection in inspections.items()},
    }
    return _layer_lines(sections, "Quantisation error", "RMS error, % of RMS", None)


def attention_kept(inspections: Mapping[str, Inspection]) -> bytes:
    """Draws the fraction of the next tokens' attention to the prompt that falls on kept tokens, per layer."""
    kept = {name: inspection.attention_kept for name, inspection in inspections.items()}
    sections = {
        "mean of the heads": {name: share.mean(axis=1) for name, share in kept.items()},
        "worst head": {name: share.min(axis=1) for name, share in kept.items()},
    }
    return _layer_lines(sections, "Attention of the next tokens that falls on kept tokens", "share kept, %", 100)


def _layer_lines(
    sections: Mapping[str, Mapping[str, np.ndarray | None]], title: str, label: str, limit: float | None
) -> bytes:
    """Draws shares per layer in per cent. Methods without values have no line, and others keep their colours."""
    figure = new_figure(3.6)
    axes = figure.subplots(1, len(sections), sharey=True)
    for axis, (heading, series) in zip(axes, sections.items(), strict=True):
        for index, (name, values) in enumerate(series.items()):
            if values is None:
                continue
            axis.plot(
                100 * values,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linewidth=1,
                markersize=max(7 - index, 3),  # hollow and of different sizes, because lines may coincide
                markerfacecolor="none",
                label=name,
            )
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("layer", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    if limit is not None:
        axes[0].set_ylim(top=limit + 2)
    axes[0].set_ylabel(label, fontsize=10)
    figure.suptitle(title, fontsize=11)
    _legend(figure, axes[0])
    return png(figure)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _head_rows(axis: Axes, values: np.ndarray, limit: float, right: int | None = None) -> AxesImage:
    """Draws `values [L, K, X]` as an image with a row per KV head, first layer on top; columns span 0 to `right`."""
    layers, heads, columns = values.shape
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("layer" if heads == 1 else f"layer (of {heads} KV heads, a row each)", fontsize=10)
    return axis.imshow(
        values.reshape(layers * heads, columns),
        cmap="cividis",
        vmin=0,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=(0, right or columns, layers, 0),
    )
