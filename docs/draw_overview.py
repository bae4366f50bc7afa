"""Draws docs/figures/overview.svg: a prompt's tokens from their scores to the packed cache that decoding reads.

    python docs/draw_overview.py

Widths in the cache are to scale: 4 bits for a packed token, 16 for one in the tail.
"""

from __future__ import annotations

import pathlib

PICTURE = pathlib.Path(__file__).parent / "figures" / "overview.svg"

SCORES = [30, 12, 6, 42, 9, 15, 7, 48, 34, 10, 5, 13, 39, 8, 18, 6, 28, 11, 14, 9, 20, 7, 16, 12]
HEAVY, RECENT, TAIL = 6, 6, 4  # kept by score; kept because new; kept tokens that are not packed yet
WIDTH, HEIGHT, LEFT, PITCH, CELL = 800, 376, 124, 27, 23
BIT = 5  # pixels
RIGHT = LEFT + PITCH * (len(SCORES) - 1) + CELL
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .name { font-weight: 700; font-size: 14px; }
  rect { fill: #eaeef2; stroke: #8c959f; }
  .page { fill: #ffffff; stroke: none; }
  .bar { fill: #8c959f; stroke: none; }
  .heavy { fill: #54aeff; stroke: #0969da; }
  .recent { fill: #4ac26b; stroke: #1a7f37; }
  .dropped { fill: none; stroke-dasharray: 3 3; }
  .step { fill: #f6f8fa; }
  path { fill: none; stroke: #57606a; stroke-width: 1.4; }
  .line { stroke-width: 1; stroke: #8c959f; }
  .arrow { marker-end: url(#head); }
  marker path { fill: #57606a; stroke: none; }
  text.heavy { fill: #0969da; stroke: none; }
  text.recent { fill: #1a7f37; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } rect { fill: #21262d; stroke: #6e7681; } .page { fill: #0d1117; stroke: none; }
    .bar { fill: #6e7681; stroke: none; } .heavy { fill: #1f6feb; stroke: #79c0ff; }
    .recent { fill: #238636; stroke: #7ee787; } .dropped { fill: none; } .step { fill: #161b22; }
    path { stroke: #9198a1; } .line { stroke: #6e7681; } marker path { fill: #9198a1; }
    text.heavy { fill: #79c0ff; } text.recent { fill: #7ee787; }
  }
"""


def rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A rectangle of a class of the style sheet."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"/>'


def text(words: str, x: float, y: float, kind: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def arrow(path: str) -> str:
    """A path with a head."""
    return f'<path class="arrow" d="{path}"/>'


def kinds() -> list[str]:
    """What becomes of each token: "heavy", "recent" or "dropped"."""
    older = len(SCORES) - RECENT
    heavy = sorted(range(older), key=lambda token: -SCORES[token])[:HEAVY]
    return ["recent" if token >= older else "heavy" if token in heavy else "dropped" for token in range(len(SCORES))]


def tokens() -> list[str]:
    """The prompt, the scores, and what is kept: one column per token."""
    parts = [text("1 Prompt", 16, 34, "name"), text("2 Scores", 16, 94, "name"), text("3 Selection", 16, 128, "name")]
    parts += [text("high score", 16, 146, "heavy"), text("newest", 16, 163, "recent")]
    for token, (score, kind) in enumerate(zip(SCORES, kinds(), strict=True)):
        x = LEFT + PITCH * token
        parts += [rect("token", x, 16, CELL, 24), rect("bar", x + 4, 100 - score, CELL - 8, score)]
        parts.append(rect(kind, x, 118, CELL, 24))
    return parts


def cache() -> list[str]:
    """The kept tokens, packed or in the tail."""
    kept = [(token, kind) for token, kind in enumerate(kinds()) if kind != "dropped"]
    packed, top, height = len(kept) - TAIL, 196, 44
    parts = [text("4 Cache", 16, 222, "name")]
    for slot, (token, kind) in enumerate(kept):
        if slot < packed:
            x, width = LEFT + 4 * BIT * slot, 4 * BIT
            rows = [rect(kind, x, top + 15 * row, width, 14) for row in range(3)]
        else:
            x, width = RIGHT - 16 * BIT * (len(kept) - slot), 16 * BIT
            rows = [rect(kind, x + 2, top, width - 4, height)]
        source, target = LEFT + PITCH * token + CELL / 2, x + width / 2
        curve = f"M{source:g},142 C{source:g},172 {target:g},166 {target:g},{top}"
        parts += [f'<path class="line" d="{curve}"/>', *rows]
    left, right = LEFT + 4 * BIT * packed, RIGHT - 16 * BIT * TAIL
    parts.append(arrow(f"M{right - 8:g},232 H{left + 8:g}"))
    parts += [text("a full tail packs", (left + right) / 2, 205, anchor="middle")]
    parts += [text("its oldest block", (left + right) / 2, 222, anchor="middle")]
    parts.append(text("packed: 2 or 4 bits, in 32-bit words", LEFT, 262))
    parts.append(text("tail: the newest tokens in full precision", right + 2, 262))
    return parts


def decode() -> list[str]:
    """A step of decoding: it reads the cache and appends to the tail."""
    middle = (LEFT + RIGHT) / 2
    parts = [text("5 Decode", 16, 340, "name"), rect("step", LEFT, 316, RIGHT - LEFT, 40)]
    parts.append(text("attention over both parts gives the next token", middle, 341, anchor="middle"))
    parts += [arrow(f"M{LEFT + 80},270 V312"), arrow(f"M{RIGHT - 290},270 V312"), arrow(f"M{RIGHT - 24},316 V246")]
    parts.append(text("append the new key and value", RIGHT - 32, 298, anchor="end"))
    return parts


def draw() -> str:
    """The picture as SVG."""
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    marker = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    marker += '<path d="M0,0 L8,4 L0,8 z"/></marker>'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    head += ["<title>From a prompt to its compressed cache</title>", f"<style>{STYLE}</style>"]
    head += [f"<defs>{marker}</defs>", f'<rect class="page" {size}/>']
    return "\n".join([*head, *tokens(), *cache(), *decode(), "</svg>\n"])


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")
