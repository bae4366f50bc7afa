"""Self-contained HTML pages: pictures are inside, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
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
<table><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<h2>What the numbers depend on</h2>
<pre>{{ details }}</pre>
</body></html>
"""

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # heading, columns, rows

_COLUMNS = {
    "nll": "{:.4f}",
    "kl_to_full": "{:.4f}",
    "top1_agreement": "{:.3f}",
    "exact_match": "{:.3f}",
    "score": "{:.3f}",
    "cache_bytes": "{:,.0f}",
    "not_finite": "{}",
}


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
        cells = [_COLUMNS[key].format(values[key]) if key in values else "" for key in keys]
        share = values["cache_bytes"] / values["full_cache_bytes"] if "cache_bytes" in values else None
        rows.append([label, *cells, "" if share is None else f"{share:.1%}"])
    tables: list[Table] = [("Means", ["point", *keys, "of full"], rows)]
    if results["skipped"]:
        tables.append(("Points that could not be measured", ["point", "why"], list(results["skipped"].items())))
    details = {key: value for key, value in results.items() if key not in ("points", "cases", "skipped")}
    cases = len(results["cases"])
    lead = f"{len(points)} points over {cases} {'case' if cases == 1 else 'cases'} of {results['task']}."
    return page(f"Sweep: {results['task']}", lead, [("Quality against stored bytes", image)], tables, details)
