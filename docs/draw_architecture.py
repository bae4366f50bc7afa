"""Draws docs/architecture.svg from the code: packages in the layers of the import contract, and imports as arrows.

    python docs/draw_architecture.py [--check]

`--check` only compares, and fails if the picture is not that of the code. Imports that others imply are left out, and
so are those of the two lowest layers, which anything may import.
"""

from __future__ import annotations

import argparse
import html
import pathlib
import sys
import tomllib

import grimp

ROOT = pathlib.Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGE = "minikv_jax"
KERNELS = ("pallas_kernels", "cuda_ffi")  # `ops` imports them by name, on first use

WIDTH, MARGIN, ROW, GAP, LINE, CHARACTER = 980, 14, 26, 40, 15, 6.4
STYLE = """
  text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; }
  .name { font-weight: 700; }
  .files { font-size: 10.5px; fill: #57606a; }
  rect { fill: #f6f8fa; stroke: #8c959f; rx: 6; }
  .kernel { fill: #fff8e6; stroke: #bf8700; }
  path { fill: none; stroke: #57606a; stroke-width: 1.1; marker-end: url(#head); }
  .lazy { stroke: #bf8700; stroke-dasharray: 4 3; }
  marker path { fill: #57606a; stroke: none; }
  .page { fill: #ffffff; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .files { fill: #9198a1; } rect { fill: #161b22; stroke: #6e7681; }
    .kernel { fill: #272115; stroke: #9e6a03; } path { stroke: #9198a1; } marker path { fill: #9198a1; }
    .lazy { stroke: #d29922; } .page { fill: #0d1117; }
  }
"""


def layers() -> list[list[str]]:
    """The packages, top layer first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    contract = next(contract for contract in contracts if contract.get("containers") == [PACKAGE])
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def imports(packages: list[str]) -> set[tuple[str, str]]:
    """Imports between packages, without those that follow from others."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    for package in packages:
        graph.squash_module(f"{PACKAGE}.{package}")
    direct = {package: graph.find_modules_directly_imported_by(f"{PACKAGE}.{package}") for package in packages}
    direct = {
        package: {name.removeprefix(f"{PACKAGE}.") for name in names} & set(packages) - {package}
        for package, names in direct.items()
    }

    def reached(package: str) -> set[str]:
        return direct[package].union(*(reached(below) for below in direct[package]))

    return {
        (package, below)
        for package in packages
        for below in direct[package]
        if not any(below in reached(other) for other in direct[package] - {below})
    }


def files(package: str) -> str:
    """The names of a package's files; empty for a package that is a file."""
    folder = ROOT / PACKAGE / package
    if not folder.is_dir():
        return ""
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return " ".join([*names, *sorted(f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").exists())])


def wrap(text: str, width: float) -> list[str]:
    """Lines of at most `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width / CHARACTER:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines


def draw() -> str:
    """The picture as SVG."""
    rows = layers()
    packages = [package for row in rows for package in row]
    boxes: dict[str, tuple[float, float, float, float]] = {}
    parts, top = [], float(MARGIN)
    for row in rows:
        names = [*row, *KERNELS] if row == ["ops"] else row
        width = (WIDTH - MARGIN * (len(names) + 1)) / len(names)
        texts = {name: wrap(files(name), width - 20) for name in names}
        height = ROW + LINE * max(map(len, texts.values()))
        for column, name in enumerate(names):
            left = MARGIN + column * (width + MARGIN)
            boxes[name] = (left, top, width, height)
            kind = ' class="kernel"' if name in KERNELS else ""
            parts.append(f'<rect{kind} x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
            title = name if name in KERNELS or not texts[name] else f"{name}/"
            parts.append(f'<text class="name" x="{left + 10:.1f}" y="{top + 17:.1f}">{html.escape(title)}</text>')
            for number, line in enumerate(texts[name]):
                y = top + ROW + 9 + LINE * number
                parts.append(f'<text class="files" x="{left + 10:.1f}" y="{y:.1f}">{html.escape(line)}</text>')
        top += height + GAP
    anyones = {*rows[-1], *rows[-2]}
    arrows = [arrow(boxes[upper], boxes[lower]) for upper, lower in sorted(imports(packages)) if lower not in anyones]
    left, y, width, height = boxes["ops"]
    for name in KERNELS:
        x = boxes[name][0]
        arrows.append(f'<path class="lazy" d="M{left + width:.1f},{y + height / 2:.1f} H{x:.1f}"/>')
    size = f'width="{WIDTH}" height="{top - GAP + MARGIN:.0f}"'
    marker = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    marker += '<path d="M0,0 L8,4 L0,8 z"/></marker>'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", f"<defs>{marker}</defs>"]
    return "\n".join([*head, f'<rect class="page" {size}/>', *arrows, *parts, "</svg>\n"])


def arrow(upper: tuple[float, float, float, float], lower: tuple[float, float, float, float]) -> str:
    """A curve from the foot of one box to the top of another."""
    x0, y0 = upper[0] + upper[2] / 2, upper[1] + upper[3]
    x1, y1 = lower[0] + lower[2] / 2, lower[1]
    middle = (y0 + y1) / 2
    return f'<path d="M{x0:.1f},{y0:.1f} C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}"/>'


def main() -> int:
    """Draws, or checks, the picture."""
    parser = argparse.ArgumentParser(description="Draws docs/architecture.svg from the code.")
    parser.add_argument("--check", action="store_true", help="only say whether the picture is that of the code")
    picture = draw()
    if parser.parse_args().check:
        if PICTURE.read_text(encoding="utf-8") == picture:
            return 0
        sys.stderr.write("docs/architecture.svg is not that of the code: run python docs/draw_architecture.py\n")
        return 1
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
