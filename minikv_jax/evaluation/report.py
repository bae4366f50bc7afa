"""Self-contained HTML pages: pictures are inside, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from minikv_jax.cli.evaluate import COLUMNS

if TYPE_CHECKING:
    from minikv_jax.evaluation.inspection import Inspection

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
.wide { overflow-x: auto }
figure { margin: 1.5rem 0 }
img { max-width: 100% }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 12px }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
{% for caption, image in images %}
<figure><img src="data:image/png;base64,{{ image }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% for heading, columns, rows in tables %}
<h2>{{ heading }}</h2>
<div class="wide"><table><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
<h2>What the numbers depend on</h2>
<pre>{{ details }}</pre>
</body></html>
"""

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # heading, columns, rows

_COLUMNS = COLUMNS | {"not_finite": ("not finite", "{}")}


def page(
    title: str, lead: str, images: Sequence[tuple[str, bytes]], tables: Sequence[Table], details: Mapping[str, Any]
) -> str:
    """An HTML page; `images` are captions with PNG bytes, `details` is shown as JSON."""
    encoded = [(caption, base64.b64encode(image).decode()) for caption, image in images]
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    shown = json.dumps(details, indent=1)
    return template.render(title=title, lead=lead, images=encoded, tables=tables, details=shown)


def sweep_report(results: Mapping[str, Any], image: bytes) -> str:
    """The page of a sweep: its figure, every point's means, what was skipped and why."""
    points = results["points"]
    keys = [key for key in _COLUMNS if any(key in point["means"] for point in points.values())]
    rows = []
    for label, point in points.items():
        values = point["means"]
        cells = [_COLUMNS[key][1].format(values[key]) if key in values else "" for key in keys]
        share = values["cache_bytes"] / values["full_cache_bytes"] if "cache_bytes" in values else None
        rows.append([label, *cells, "" if share is None else f"{share:.1%}"])
    tables: list[Table] = [("Means", ["point", *(_COLUMNS[key][0] for key in keys), "of full"], rows)]
    if results["skipped"]:
        tables.append(("Points that could not be measured", ["point", "why"], list(results["skipped"].items())))
    details = {key: value for key, value in results.items() if key not in ("points", "cases", "skipped")}
    cases = len(results["cases"])
    lead = f"{len(points)} points over {cases} {'case' if cases == 1 else 'cases'} of {results['task']}."
    return page(f"Sweep: {results['task']}", lead, [("Quality against stored bytes", image)], tables, details)


INSPECTION_COLUMNS = (
    "method",
    "tokens kept",
    "key error",
    "value error",
    "attention kept",
    "worst head",
    "cache bytes",
    "of full",
)


def inspection_rows(inspections: Mapping[str, Inspection], full_bytes: int) -> list[list[str]]:
    """`INSPECTION_COLUMNS` of each method: over all layers, or the worst head of any."""
    rows = []
    for name, found in inspections.items():
        size = int(found.layer_bytes.sum())
        cells = [
            f"{found.kept.mean():.1%}",
            *(
                _percent(None if x is None else _finite_mean(x))
                for x in (found.layer_key_error, found.layer_value_error)
            ),
            _percent(found.attention_kept.mean()),
            _percent(found.attention_kept.min()),
        ]
        rows.append([name, *cells, f"{size:,}", f"{size / full_bytes:.1%}"])
    return rows


def inspection_report(
    inspections: Mapping[str, Inspection],
    images: Sequence[tuple[str, bytes]],
    full_bytes: int,
    details: Mapping[str, Any],
) -> str:
    """The page of `minikv inspect`: every picture, the methods side by side, and each method layer by layer."""
    tables: list[Table] = [("Methods", INSPECTION_COLUMNS, inspection_rows(inspections, full_bytes))]
    columns = ("layer", "tokens per head", "of these as codes", "key error", "value error")
    columns = (*columns, "attention kept", "worst head", "bytes")
    for name, found in inspections.items():
        none = [None] * len(found.layer_bytes)
        errors = found.layer_key_error, found.layer_value_error
        rows = [
            [str(layer), f"{kept:,.0f}", f"{packed:,}", *map(_percent, (keys, values, mean, least)), f"{size:,}"]
            for layer, (kept, packed, keys, values, mean, least, size) in enumerate(
                zip(
                    found.kept_tokens.mean(axis=1),
                    found.packed_tokens,
                    *(none if error is None else error for error in errors),
                    found.attention_kept.mean(axis=1),
                    found.attention_kept.min(axis=1),
                    found.layer_bytes,
                    strict=True,
                )
            )
        ]
        tables.append((f"{name}, layer by layer", columns, rows))
    lead = (
        f"What {len(inspections)} {'method keeps' if len(inspections) == 1 else 'methods keep'} of a prompt of "
        f"{details['prompt_tokens']:,} tokens. Errors are root mean squares over the tokens held as codes, relative to "
        "what was stored. Attention kept is, of the attention that the next tokens pay to the prompt, the share on "
        f"tokens that were kept; the full-cache model generates these, up to {details['max_new_tokens']} of them."
    )
    return page("What the cache keeps", lead, images, tables, details)


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{share:.1%}"


def _finite_mean(values: np.ndarray) -> float:
    """The mean over the layers that have a value; NaN where none has."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan
