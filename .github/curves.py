"""Draws loss, spread and kNN top-1 of runs over their epochs: the picture in the README.

    python .github/curves.py "with stop-gradient=runs/with-0,runs/with-1" "without=runs/without-0" \
        > .github/curves.svg

One argument a curve: its name, and the folders of its runs (one a seed). The line is the mean over seeds, the
band reaches from the least to the greatest. Needs nothing but Python.
"""

import json
import sys
from pathlib import Path

PANELS = [
    ("loss", -1.0, 0.0, "loss (minimum -1)"),
    ("spread", 0.0, 1.0, "spread of z (healthy: 1)"),
    ("knn", 0.0, 1.0, "kNN top-1"),
]
COLORS, WIDTH, HEIGHT, GAP = ["#1b6ca8", "#c8401f", "#3a8a3e"], 250, 170, 60


def main() -> None:
    curves = []
    for argument in sys.argv[1:]:
        name, folders = argument.split("=", 1)
        files = [Path(folder, "metrics.jsonl") for folder in folders.split(",")]
        runs = [[json.loads(x) for x in file.read_text().splitlines()] for file in files]
        curves.append((name, runs))
    total = len(PANELS) * (WIDTH + GAP) + 10
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{HEIGHT + 85}" '
        'font-family="sans-serif" font-size="12">'
    )
    print('<rect width="100%" height="100%" fill="white"/>')
    for i, (key, low, high, title) in enumerate(PANELS):
        left, top = 45 + i * (WIDTH + GAP), 30
        print(f'<text x="{left}" y="20" font-weight="bold">{title}</text>')
        for step in range(5):
            value, y = low + (high - low) * step / 4, top + HEIGHT * (1 - step / 4)
            print(
                f'<path d="M{left} {y}h{WIDTH}" stroke="#ddd"/>'
                f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.2f}</text>'
            )
        last = 0
        for (_, runs), color in zip(curves, COLORS):
            columns = [
                (rows[0]["epoch"], [row[key] for row in rows])
                for rows in zip(*runs)
                if rows[0][key] is not None
            ]
            if not columns:  # no kNN
                continue
            last = max(epoch for epoch, _ in columns)

            def at(epoch: float, value: float) -> str:
                x = left + WIDTH * epoch / last
                y = top + HEIGHT * (1 - (value - low) / (high - low))
                return f"{x:.1f},{y:.1f}"

            band = [at(e, max(v)) for e, v in columns] + [at(e, min(v)) for e, v in reversed(columns)]
            line = [at(e, sum(v) / len(v)) for e, v in columns]
            print(f'<polygon points="{" ".join(band)}" fill="{color}" opacity="0.2"/>')
            print(f'<polyline points="{" ".join(line)}" fill="none" stroke="{color}" stroke-width="2"/>')
        print(f'<text x="{left}" y="{top + HEIGHT + 16}">0</text>')
        print(f'<text x="{left + WIDTH}" y="{top + HEIGHT + 16}" text-anchor="end">epoch {last}</text>')
    for i, ((name, _), color) in enumerate(zip(curves, COLORS)):
        x, y = 45 + i * 260, HEIGHT + 70
        print(
            f'<path d="M{x} {y - 4}h30" stroke="{color}" stroke-width="3"/>'
            f'<text x="{x + 38}" y="{y}">{name}</text>'
        )
    print("</svg>")


if __name__ == "__main__":
    main()
