"""Tables and pictures of end-to-end measurements: `minikv bench figures RESULT.json ... --out DIRECTORY`.

They show what figures 7 and 8 of MiniKV's paper (arXiv 2411.18077) show: the seconds of a generation against the
prompt's length, and tokens per second and peak memory against the batch.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from minikv_jax.cli.shared import Parser, output_directory
from minikv_jax.evaluation.figures import COLOURS, MARKERS, panels, png

Row = Mapping[str, Any]


def latency(rows: Sequence[Row], title: str) -> bytes:
    """Seconds to generate, prefill included, and prefill alone, against the prompt; rows alike in batch and output."""
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
    """Generated tokens per second, and peak memory, against the batch."""
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
    """Seconds of prefill and of all decode steps, at the steps' measured mean."""
    return row["prefill_s"] + row["max_new_tokens"] * row["decode_ms"] / 1e3


def _lines(axis: Axes, rows: Sequence[Row], x: str, y: Callable[[Row], float | None]) -> None:
    """One line per method, in its own colour and marker."""
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
    axis.set_xticks(_apart(sorted({row[x] for row in rows})))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def _apart(sizes: Sequence[int]) -> list[int]:
    """The sizes whose labels do not run into the one before."""
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
    "decode, ms a step": lambda row: f"{row['decode_ms']:.2f}",
    "x floor": lambda row: "" if row["times_floor"] is None else f"{row['times_floor']:.2f}",
    "tokens/s": lambda row: f"{row['decode_tokens_per_s']:,.0f}",
    "peak, GB": lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
    "cache, GB": lambda row: f"{row['cache_bytes'] / 1e9:.2f}",
    "compile, s": lambda row: f"{sum(row['compile_s'].values()):.0f}",
}


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown; what failed says why."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "--:|" * (len(_COLUMNS) - 1)]
    for row in rows:
        names = list(_COLUMNS)[:3] if "error" in row else _COLUMNS
        cells = [_COLUMNS[name](row) for name in names] + ([row["error"].split(":")[0]] if "error" in row else [])
        lines.append("| " + " | ".join(cells) + " |" + " |" * (len(_COLUMNS) - len(cells)))
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], device: str) -> dict[str, bytes]:
    """The pictures that there are at least two sizes for, by file name."""
    pictures = {}
    for model in dict.fromkeys(_model(row) for row in rows):
        of_model = [row for row in rows if _model(row) == model]
        for name, picture, fixed, varied in (
            ("latency", latency, "batch", "prompt_len"),
            ("batches", batches, "prompt_len", "batch"),
        ):
            if series := _series(of_model, fixed, varied):
                stem = pathlib.Path(model).name.removesuffix(".json")
                pictures[f"{stem}-{name}.png"] = picture(series, f"{model}, {device}")
    return pictures


def _model(row: Row) -> str:
    return row.get("shape") or row["model"]


def _series(rows: Sequence[Row], fixed: str, varied: str) -> list[Row]:
    """The rows of one `fixed` and one output length that have the most values of `varied`; none where that is one."""
    sizes = [(row[fixed], row["max_new_tokens"]) for row in rows]
    found = [[row for row, size in zip(rows, sizes, strict=True) if size == one] for one in sorted(set(sizes))]
    best = max(found, key=lambda series: len({row[varied] for row in series}))
    return best if len({row[varied] for row in best}) > 1 else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the results as Markdown, and writes the pictures that they have at least two sizes for."""
    parser = Parser(prog="minikv bench figures", description="Shows what `bench generate` measured.")
    parser.add_argument("results", nargs="+", type=pathlib.Path, metavar="RESULT.json", help="of one device")
    parser.add_argument("--out", type=output_directory, required=True, metavar="DIRECTORY", help="where the PNGs go")
    options = parser.parse_args(arguments)
    reports = [_read(file) for file in options.results]
    devices = sorted({report["device"] for report in reports})
    if len(devices) > 1:
        raise ValueError(f"results of {', '.join(devices)}: expected one device")
    rows = [row for report in reports for row in report["results"]]
    print(table(rows))
    pictures = draw([row for row in rows if "error" not in row], devices[0])
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (options.out / name).write_bytes(content)
        print(options.out / name)
    if not pictures:
        print("minikv: no picture: one takes two prompt lengths, or two batches, of a model", file=sys.stderr)
    return 0


def _read(file: pathlib.Path) -> dict[str, Any]:
    """A report of `bench generate`; ValueError names a file that is none."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(report, dict) or not {"device", "results"} <= report.keys():
        raise ValueError(f"{file}: expected what `minikv bench generate --output` writes")
    return report
