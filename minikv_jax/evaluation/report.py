"""Writes results to a directory as JSON, CSV, pictures, and self-contained HTML pages.

Only the pictures need matplotlib (`pip install minikv_jax[evaluation]`).
"""

from __future__ import annotations

import base64
import csv
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from minikv_jax import files
from minikv_jax.evaluation.run import METRICS
from minikv_jax.evaluation.tables import COLUMNS, NOT_FINITE, Table, inspection_table, layer_table, means_table

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
{% for heading, table in tables %}
<h2>{{ heading }}</h2>
<div class="wide"><table><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
<h2>What the numbers depend on</h2>
<pre>{{ details }}</pre>
</body></html>
"""

Picture = tuple[str, bytes]  # caption, PNG bytes


def page(
    title: str,
    lead: str,
    images: Sequence[Picture],
    tables: Sequence[tuple[str, Table]],
    details: Mapping[str, Any],
) -> str:
    """Renders a self-contained HTML page.

    Args:
      title: the page's title.
      lead: the sentence below the title.
      images: captions and PNG bytes.
      tables: headings and tables.
      details: values shown as JSON at the end.
    """
    encoded = [(caption, base64.b64encode(image).decode()) for caption, image in images]
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    shown = json.dumps(details, indent=1)
    return template.render(title=title, lead=lead, images=encoded, tables=tables, details=shown)


def write_sweep(directory: pathlib.Path, results: Mapping[str, Any], figures: bool = True) -> list[pathlib.Path]:
    """Writes a sweep's results.json and results.csv and, with `figures`, pareto.png and report.html.

    Args:
      directory: an existing directory.
      results: from `Sweep.results`.
      figures: draw the Pareto figure and write the report.

    Returns:
      The paths written.

    Raises:
      ImportError: `figures` without matplotlib.
    """
    as_json, as_csv = directory / "results.json", directory / "results.csv"
    files.write_json(as_json, results)
    files.write_text(as_csv, _as_csv(results["points"]))
    if not figures:
        return [as_json, as_csv]
    from minikv_jax.evaluation.figures import pareto  # matplotlib is optional

    picture, report = directory / "pareto.png", directory / "report.html"
    image = pareto(results["points"], title=results["task"])
    files.write_bytes(picture, image)
    files.write_text(report, sweep_report(results, image))
    return [as_json, as_csv, picture, report]


def _as_csv(points: Mapping[str, Mapping[str, Any]]) -> str:
    settings = sorted({key for point in points.values() for key in point["settings"]})
    columns = ["point", "method", *settings, "byte_share", "cases", "not_finite", "perplexity", *METRICS]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    for label, point in points.items():
        share = "" if point["byte_share"] is None else point["byte_share"]
        own = {"point": label, "method": point["method"], "byte_share": share}
        writer.writerow(own | point["settings"] | point["means"])
    return stream.getvalue()


def sweep_report(results: Mapping[str, Any], image: bytes) -> str:
    """Renders the page of a sweep: its figure, the means of every point, and the reasons for skipped points."""
    points = results["points"]
    means = means_table({label: point["means"] for label, point in points.items()}, "point", COLUMNS | NOT_FINITE)
    tables = [("Means", means)]
    if results["skipped"]:
        skipped = Table(("point", "why"), list(results["skipped"].items()))
        tables.append(("Points that could not be measured", skipped))
    details = {key: value for key, value in results.items() if key not in ("points", "cases", "skipped")}
    cases = len(results["cases"])
    lead = f"{len(points)} points over {cases} {'case' if cases == 1 else 'cases'} of {results['task']}."
    return page(f"Sweep: {results['task']}", lead, [("Quality against stored bytes", image)], tables, details)


def write_inspection(
    directory: pathlib.Path, inspections: Mapping[str, Inspection], full_bytes: int, details: Mapping[str, Any]
) -> list[pathlib.Path]:
    """Writes an inspection's pictures as PNG files, report.html, and arrays.npz.

    Args:
      directory: an existing directory.
      inspections: the inspections by method. arrays.npz holds their fields as `METHOD/FIELD`.
      full_bytes: bytes of the full cache.
      details: values shown as JSON at the end of the report.

    Returns:
      The paths written.

    Raises:
      ImportError: matplotlib is not installed.
    """
    pictures = _inspection_pictures(inspections)
    fields = {
        f"{name}/{field}": value
        for name, inspection in inspections.items()
        for field, value in vars(inspection).items()
        if value is not None
    }
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **fields)
    page = inspection_report(inspections, list(pictures.values()), full_bytes, details)
    contents = {f"{name}.png": image for name, (_, image) in pictures.items()}
    contents |= {"report.html": page.encode(), "arrays.npz": arrays.getvalue()}
    for name, content in contents.items():
        files.write_bytes(directory / name, content)
    return [directory / name for name in contents]


def _inspection_pictures(inspections: Mapping[str, Inspection]) -> dict[str, Picture]:
    """Draws the pictures; returns captions and PNG bytes by file name without extension."""
    from minikv_jax.evaluation import figures  # matplotlib is optional

    pictures = {
        "attention": ("Attention of the next tokens that falls on kept tokens", figures.attention_kept(inspections)),
        "budgets": ("Tokens held per layer", figures.budgets(inspections)),
    }
    if any(inspection.key_error is not None for inspection in inspections.values()):
        pictures["errors"] = ("Quantisation error per layer", figures.layer_errors(inspections))
    for name, inspection in inspections.items():
        file = re.sub(r"[^\w.,=-]+", "-", name)
        pictures[f"kept-{file}"] = (f"{name}: tokens kept per layer and head", figures.kept_map(inspection, name))
        if inspection.key_error is not None and inspection.packed_tokens.any():
            title = f"{name}: quantisation error per layer, head and channel"
            pictures[f"error-{file}"] = (title, figures.error_map(inspection, name))
    return pictures


def inspection_report(
    inspections: Mapping[str, Inspection],
    images: Sequence[Picture],
    full_bytes: int,
    details: Mapping[str, Any],
) -> str:
    """Renders the page of `minikv inspect`: every picture, all methods side by side, and each one layer by layer."""
    tables = [("Methods", inspection_table(inspections, full_bytes))]
    tables += [(f"{name}, layer by layer", layer_table(inspection)) for name, inspection in inspections.items()]
    lead = (
        f"What {len(inspections)} {'method keeps' if len(inspections) == 1 else 'methods keep'} of a prompt of "
        f"{details['prompt_tokens']:,} tokens. Errors are root mean squares over the tokens held as codes, relative to "
        "what was stored. Attention kept is, of the attention that the next tokens pay to the prompt, the share on "
        f"tokens that were kept; the full-cache model generates these, up to {details['max_new_tokens']} of them."
    )
    return page("What the cache keeps", lead, images, tables, details)
