"""Tables and pictures of end-to-end measurements.

The pictures are those of figures 7 and 8 in MiniKV's paper (arXiv 2411.18077): the seconds of a generation against the
prompt's length, and tokens per second and peak memory against the batch.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from pydantic import Field, model_validator

from minikv_jax import files
from minikv_jax.plots import COLOURS, MARKERS, panels, png
from minikv_jax.schemas import Schema, validate

Row = Mapping[str, Any]
_Count = Annotated[int, Field(ge=1, lt=1 << 60)]
_Positive = Annotated[float, Field(gt=0)]


def latency(rows: Sequence[Row], title: str) -> bytes:
    """Plots seconds of generation and of prefill against the prompt's length, for one batch and output length."""
    figure, axes = panels(2, 3.6)
    _lines(axes[0], rows, "prompt_len", generation_s)
    _lines(axes[1], rows, "prompt_len", lambda row: row["prefill_s"])
    axes[0].set_ylabel(f"seconds for {rows[0]['max_new_tokens']:,} tokens, prefill included", fontsize=9)
    axes[1].set_ylabel("seconds of prefill", fontsize=9)
    for axis in axes:
        axis.set_xlabel(f"prompt tokens (batch {rows[0]['batch']})", fontsize=9)
        axis.set_ylim(bottom=0)
    return _finished(figure, axes, title)


def batches(rows: Sequence[Row], title: str) -> bytes:
    """Plots generated tokens per second and peak memory against the batch."""
    figure, axes = panels(2, 3.6)
    _lines(axes[0], rows, "batch", lambda row: row["decode_tokens_per_s"])
    _lines(axes[1], rows, "batch", lambda row: row["peak_bytes"] and row["peak_bytes"] / 1e9)
    axes[0].set_ylabel("generated tokens per second", fontsize=9)
    axes[1].set_ylabel("peak memory, GB", fontsize=9)
    for axis in axes:
        axis.set_xlabel(f"batch (prompts of {rows[0]['prompt_len']:,} tokens)", fontsize=9)
        axis.set_ylim(bottom=0)
    return _finished(figure, axes, title)


def generation_s(row: Row) -> float:
    """Seconds of prefill and of all decode steps, each at the measured mean."""
    return row["prefill_s"] + row["max_new_tokens"] * row["decode_ms"] / 1e3


def _lines(axis: Axes, rows: Sequence[Row], x: str, y: Callable[[Row], float | None]) -> None:
    """Draws one line per method, each with its own colour and marker."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for index, method in enumerate(methods):
        spots = sorted((row[x], value) for row in rows if row["method"] == method and (value := y(row)) is not None)
        axis.plot(
            [spot[0] for spot in spots],
            [spot[1] for spot in spots],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=1.5,
            markersize=5.5,
            label=method,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(_readable_ticks(sorted({row[x] for row in rows})))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def _readable_ticks(sizes: Sequence[int]) -> list[int]:
    """Selects sizes whose labels do not overlap."""
    kept = list(sizes[:1])
    for size in sizes[1:]:
        if size >= 1.4 * kept[-1]:
            kept.append(size)
    return kept


def _short(size: float) -> str:
    return f"{size / 1024:g}k" if size >= 1024 else f"{size:g}"


def _finished(figure: Any, axes: Sequence[Axes], title: str) -> bytes:
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return png(figure)


_COLUMNS = {
    "method": lambda row: f"`{row['method']}`",
    "batch": lambda row: f"{row['batch']:,}",
    "prompt + new": lambda row: f"{row['prompt_len']:,} + {row['max_new_tokens']:,}",
    "prefill, s": lambda row: f"{row['prefill_s']:.3f}",
    "decode, ms per step": lambda row: f"{row['decode_ms']:.2f}",
    "times floor": lambda row: "" if row["times_floor"] is None else f"{row['times_floor']:.2f}",
    "tokens/s": lambda row: f"{row['decode_tokens_per_s']:,.0f}",
    "peak, GB": lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
    "cache, GB": lambda row: f"{row['cache_bytes'] / 1e9:.2f}",
    "compile, s": lambda row: f"{sum(row['compile_s'].values()):.0f}",
}
_SIZE_COLUMNS = ("method", "batch", "prompt + new")


def table(rows: Iterable[Row]) -> str:
    """Formats rows as a Markdown table; a failed run shows its error instead of results."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "--:|" * (len(_COLUMNS) - 1)]
    for row in rows:
        names = _SIZE_COLUMNS if "error" in row else tuple(_COLUMNS)
        cells = [_COLUMNS[name](row) for name in names]
        if "error" in row:
            cells.append(row["error"].split(":")[0])
        lines.append("| " + " | ".join(cells) + " |" + " |" * (len(_COLUMNS) - len(cells)))
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], device: str) -> dict[str, bytes]:
    """Draws the pictures that have at least two sizes to show; returns them by file name."""
    pictures = {}
    for model in dict.fromkeys(_model(row) for row in rows):
        of_model = [row for row in rows if _model(row) == model]
        for name, picture, fixed, varied in (
            ("latency", latency, "batch", "prompt_len"),
            ("batches", batches, "prompt_len", "batch"),
        ):
            if shown := series(of_model, fixed, varied):
                stem = pathlib.Path(model).name.removesuffix(".json")
                pictures[f"{stem}-{name}.png"] = picture(shown, f"{model}, {device}")
    return pictures


def _model(row: Row) -> str:
    return row.get("shape") or row["model"]


def series(rows: Sequence[Row], fixed: str, varied: str) -> list[Row]:
    """Selects the rows with equal `fixed` and output length that vary most in `varied`; none if no two differ."""
    sizes = [(row[fixed], row["max_new_tokens"]) for row in rows]
    groups = [[row for row, size in zip(rows, sizes, strict=True) if size == one] for one in sorted(set(sizes))]
    longest = max(groups, key=lambda group: len({row[varied] for row in group}))
    return longest if len({row[varied] for row in longest}) > 1 else []


class _Report(Schema, extra="ignore"):
    device: str
    results: list[dict[str, Any]]


class _Failed(Schema, extra="ignore"):
    method: str
    batch: _Count
    prompt_len: _Count
    max_new_tokens: _Count
    error: str


class _Measured(Schema, extra="ignore"):
    shape: str | None = None
    model: str | None = None
    method: str
    batch: _Count
    prompt_len: _Count
    max_new_tokens: _Count
    compile_s: dict[str, Annotated[float, Field(ge=0)]]
    prefill_s: _Positive
    decode_ms: _Positive
    decode_tokens_per_s: _Positive
    cache_bytes: _Count
    peak_bytes: _Count | None
    times_floor: _Positive | None

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if not self.shape and not self.model:
            raise ValueError("lacks shape: expected shape or model")
        return self


def read_report(file: pathlib.Path) -> dict[str, Any]:
    """Reads a report of `minikv bench generate`. Raises ValueError naming the file and what is wrong with it."""
    report = files.read_json(file)
    for number, row in enumerate(validate(_Report, report, source=file).results):
        validate(_Failed if "error" in row else _Measured, row, source=f"{file}, results[{number}]")
    return report
