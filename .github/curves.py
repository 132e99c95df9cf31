"""Draws loss, spread and kNN accuracy of runs over their epochs, as SVG: the figure in the README.

    python .github/curves.py "with stop-gradient=runs/a,runs/b" "without=runs/c" > .github/curves.svg

One argument per curve: its name, and the folders of its runs, one per seed. A line is the mean over the
seeds, and the shading spans minimum to maximum.
"""

import json
import sys
from pathlib import Path

PANELS = [
    ("loss", -1.0, 0.0, "loss (minimum -1)"),
    ("spread", 0.0, 1.0, "spread of z (healthy: 1)"),
    ("knn", 0.0, 1.0, "kNN top-1"),
]
COLORS = ["#1b6ca8", "#c8401f", "#3a8a3e"]
WIDTH, HEIGHT, TOP = 250, 170, 30  # size and top edge of a panel, in pixels


def draw_panel(left: int, key: str, low: float, high: float, title: str, curves: list) -> None:
    """Prints one panel. curves: one list of runs per curve; a run is a list of rows of metrics.jsonl."""
    bottom = TOP + HEIGHT
    print(f'<text x="{left}" y="20" font-weight="bold">{title}</text>')
    for step in range(5):
        y = bottom - HEIGHT * step / 4
        print(f'<path d="M{left} {y}h{WIDTH}" stroke="#ddd"/>')
        value = low + (high - low) * step / 4
        print(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.2f}</text>')
    for runs, color in zip(curves, COLORS):
        epochs = [rows for rows in zip(*runs) if rows[0][key] is not None]
        if not epochs:  # no kNN
            continue
        last = epochs[-1][0]["epoch"]

        def point(rows: tuple, value: float) -> str:
            x = left + WIDTH * rows[0]["epoch"] / last
            return f"{x:.1f},{bottom - HEIGHT * (value - low) / (high - low):.1f}"

        values = [[row[key] for row in rows] for rows in epochs]
        upper = [point(rows, max(v)) for rows, v in zip(epochs, values)]
        lower = [point(rows, min(v)) for rows, v in zip(epochs, values)]
        band = " ".join(upper + lower[::-1])
        line = " ".join(point(rows, sum(v) / len(v)) for rows, v in zip(epochs, values))
        print(f'<polygon points="{band}" fill="{color}" opacity="0.2"/>')
        print(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    print(f'<text x="{left}" y="{bottom + 16}">0</text>')
    print(f'<text x="{left + WIDTH}" y="{bottom + 16}" text-anchor="end">epoch {last}</text>')


def main() -> None:
    names, folders = zip(*(argument.split("=", 1) for argument in sys.argv[1:]))
    curves = []
    for group in folders:
        files = [Path(folder, "metrics.jsonl") for folder in group.split(",")]
        curves.append([[json.loads(line) for line in file.read_text().splitlines()] for file in files])
    size = f'width="{len(PANELS) * (WIDTH + 60) + 10}" height="{HEIGHT + 85}"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">')
    print('<rect width="100%" height="100%" fill="white"/>')
    for i, panel in enumerate(PANELS):
        draw_panel(45 + i * (WIDTH + 60), *panel, curves)
    for i, (name, color) in enumerate(zip(names, COLORS)):
        x, y = 45 + i * 260, HEIGHT + 70
        print(f'<path d="M{x} {y - 4}h30" stroke="{color}" stroke-width="3"/>')
        print(f'<text x="{x + 38}" y="{y}">{name}</text>')
    print("</svg>")


if __name__ == "__main__":
    main()
