"""Formats results as tables of text, for the terminal and for pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from minikv_jax.evaluation.inspection import Inspection

# Columns of a table of means: each metric's heading and format.
COLUMNS = {
    "nll": ("NLL", "{:.4f}"),
    "kl_to_full": ("KL to full", "{:.4f}"),
    "top1_agreement": ("top-1 agreement", "{:.3f}"),
    "exact_match": ("exact match", "{:.3f}"),
    "score": ("score", "{:.3f}"),
    "cache_bytes": ("cache bytes", "{:,.0f}"),
}
NOT_FINITE = {"not_finite": ("not finite", "{}")}


class Table(NamedTuple):
    """A table of text. The first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Renders the table in Markdown, with the first column aligned left and the others right."""
        alignment = ["---"] + ["--:"] * (len(self.columns) - 1)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, alignment, *self.rows))


def means_table(
    means: Mapping[str, Mapping[str, Any]],
    heading: str = "method",
    columns: Mapping[str, tuple[str, str]] = COLUMNS,
) -> Table:
    """Makes a table with the means of a method or point per row. Columns without values are left out.

    Args:
      means: results of `run.means`, by the name of the row.
      heading: heading of the first column.
      columns: heading and format of each metric.
    """
    shown = {key: column for key, column in columns.items() if any(key in values for values in means.values())}
    rows = []
    for name, values in means.items():
        cells = [template.format(values[key]) if key in values else "" for key, (_, template) in shown.items()]
        share = f"{values['cache_bytes'] / values['full_cache_bytes']:.1%}" if "cache_bytes" in values else ""
        rows.append([name, *cells, share])
    return Table([heading, *(text for text, _ in shown.values()), "of full"], rows)


def inspection_table(inspections: Mapping[str, Inspection], full_bytes: int) -> Table:
    """Makes a table with an inspected method per row: means over all layers and heads, and the worst head."""
    columns = ("method", "tokens kept", "key error", "value error", "attention kept", "worst head", "cache bytes")
    rows = []
    for name, inspection in inspections.items():
        size = int(inspection.layer_bytes.sum())
        cells = [
            f"{inspection.kept.mean():.1%}",
            _percent(_finite_mean(inspection.layer_key_error)),
            _percent(_finite_mean(inspection.layer_value_error)),
            _percent(inspection.attention_kept.mean()),
            _percent(inspection.attention_kept.min()),
        ]
        rows.append([name, *cells, f"{size:,}", f"{size / full_bytes:.1%}"])
    return Table((*columns, "of full"), rows)


def layer_table(inspection: Inspection) -> Table:
    """Makes a table with a layer of an inspected method per row."""
    columns = ("layer", "tokens per head", "of these as codes", "key error", "value error")
    none = [None] * len(inspection.layer_bytes)
    layers = zip(
        inspection.kept_tokens.mean(axis=1),
        inspection.packed_tokens,
        none if inspection.layer_key_error is None else inspection.layer_key_error,
        none if inspection.layer_value_error is None else inspection.layer_value_error,
        inspection.attention_kept.mean(axis=1),
        inspection.attention_kept.min(axis=1),
        inspection.layer_bytes,
        strict=True,
    )
    rows = [
        [str(layer), f"{kept:,.0f}", f"{packed:,}", *map(_percent, (keys, values, mean, worst)), f"{size:,}"]
        for layer, (kept, packed, keys, values, mean, worst, size) in enumerate(layers)
    ]
    return Table((*columns, "attention kept", "worst head", "bytes"), rows)


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{share:.1%}"


def _finite_mean(values: np.ndarray | None) -> float | None:
    """The mean over the layers that have a value; None if none has."""
    finite = () if values is None else values[np.isfinite(values)]
    return float(np.mean(finite)) if len(finite) else None
