"""Draw who sees whom in each layout, from the code that decides it: python docs/layout_figures.py."""

from __future__ import annotations

from pathlib import Path

from mr_reward.layouts import LAYOUTS, TokenKind, plan_row, visible

_CELL, _MARGIN = 22, 30
_PROMPT, _RESPONSES = 2, (2, 2, 2)
_COLOURS = ("#e3e8ed", "#0072b2")  # not seen, seen


def draw(layout: str) -> str:
    """The matrix as SVG: a row sees the dark columns.

    Args:
        layout: `causal`, `isolated` or `set`.

    Returns:
        The SVG.
    """
    plan = plan_row(layout, _PROMPT, _RESPONSES)
    mask = visible(layout, plan.segments[None], plan.kinds[None])[0].tolist()
    letters = {TokenKind.SUMMARY: "s", TokenKind.COMPARISON: "c"}
    labels = [
        letters.get(TokenKind(kind), str(segment) if segment else "P")
        for segment, kind in zip(plan.segments.tolist(), plan.kinds.tolist(), strict=True)
    ]
    size = _MARGIN + _CELL * len(labels) + 2
    style = 'font-family="sans-serif" font-size="12" fill="#59636e" text-anchor="middle"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" {style}>']
    lines.append(f"<title>{layout}: who sees whom</title>")
    for i, label in enumerate(labels):
        place = _MARGIN + _CELL * i + _CELL // 2
        lines.append(f'<text x="{place}" y="{_MARGIN - 9}">{label}</text>')
        lines.append(f'<text x="{_MARGIN - 13}" y="{place + 4}">{label}</text>')
    for q, row in enumerate(mask):
        for k, seen in enumerate(row):
            x, y = _MARGIN + _CELL * k, _MARGIN + _CELL * q
            lines.append(f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" fill="{_COLOURS[seen]}"/>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    for name in LAYOUTS:
        (Path(__file__).parent / "figures" / f"layout_{name}.svg").write_text(draw(name))
