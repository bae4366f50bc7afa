"""Style of all figures, and their encoding as PNG (needs matplotlib: `pip install minikv_jax[evaluation]`).

Colours are Okabe and Ito's, which colour-blind readers can distinguish. Every series also has its own marker.
"""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
MARKERS = "osD^vPX*<>ph"
_WIDTH_INCHES = 9.0  # at _DPI, twice the width of a README column
_DPI = 160


def new_figure(height: float) -> Figure:
    """Makes an empty figure of the common width."""
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Makes a figure of `count` panels side by side, at least one."""
    figure = new_figure(height)
    return figure, list(figure.subplots(1, max(count, 1), squeeze=False)[0])


def png(figure: Figure) -> bytes:
    """Encodes a figure as PNG; equal figures give equal bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
