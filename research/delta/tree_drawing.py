"""The tree of a tuned model as HTML and as SVG: self-contained, all names escaped."""

from __future__ import annotations

from html import escape

from .tree import Line, ModelTree, Node, cells

COLOURS = {"frozen": "#8a929c", "tuned": "#0a6aa6", "added": "#b3470e", "fixed": "#7a5ea8"}
LINE, CHARACTER, SIZE = 18, 7.4, 12  # heights and widths in pixels; a monospaced character is 0.6 of its size

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #1d2127; background: #fff; }
details, .array { margin-left: 1.3rem; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; }
.shape, .count { color: #5d6570; margin-left: 1em; }
.status { margin-left: 1em; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e8eb; background: #15181c; } .shape, .count { color: #a3abb5; }
}
""".strip()


def to_html(tree: ModelTree, title: str = "Tuned model") -> str:
    """A page on which modules fold; those that are all frozen start folded."""
    legend = " · ".join(f'<span style="color: {colour}">■ {name}</span>' for name, colour in COLOURS.items())
    body = "\n".join(_element(child) for child in tree.root.children)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{escape(tree.totals())}</p>\n<p>{legend}</p>\n{body}\n</body>\n</html>\n"
    )


def to_svg(tree: ModelTree, brief: bool = True) -> str:
    """A drawing of the text, with a square in the colour of each line's status."""
    lines = list(tree.lines(brief))
    rows = [cells(line) for line in lines]
    widths = [max(map(len, column)) * CHARACTER + 20 for column in zip(*rows)]
    starts = [24 + sum(widths[:column]) for column in range(len(widths))]
    width, height = max(24 + sum(widths), len(tree.totals()) * CHARACTER + 24), (len(rows) + 2) * LINE + 8
    drawn = [_drawn(line, row, starts, index) for index, (line, row) in enumerate(zip(lines, rows))]
    total = f'<text x="6" y="{(len(rows) + 1.5) * LINE:g}" font-weight="600">{escape(tree.totals())}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-size="{SIZE}" fill="#1d2127" '
        f"font-family=\"ui-monospace, 'DejaVu Sans Mono', monospace\">\n"
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join([*drawn, total]) + "\n</svg>\n"
    )


def _colour(node: Node) -> str:
    """That of the node's status; of a module the one that says most."""
    found = [status for status in ("added", "tuned", "fixed", "frozen") if node.numbers[status]]
    return COLOURS[node.status or next(iter(found), "frozen")]


def _element(node: Node) -> str:
    """One node of the page with everything below it."""
    name, shape, count, size, label = map(escape, cells(Line("", node)))
    colour = _colour(node)
    text = (
        f'<span style="color: {colour}">■</span> {name}'
        + (f'<span class="shape">{shape}</span>' if shape else "")
        + f'<span class="count">{count} · {size}</span>'
        + f'<span class="status" style="color: {colour}">{label}</span>'
    )
    if not node.children:
        return f'<div class="array">{text}</div>'
    below = "\n".join(_element(child) for child in node.children)
    state = "" if node.label == "frozen" else " open"
    return f"<details{state}><summary>{text}</summary>\n{below}\n</details>"


def _drawn(line: Line, row: tuple[str, ...], starts: list[float], index: int) -> str:
    """One line of the drawing."""
    y, colour = (index + 1) * LINE, _colour(line.node)
    branch = line.branch.replace(" ", "\u00a0")
    name = escape(row[0][len(line.branch) :])
    parts = [
        f'<rect x="6" y="{y - 9}" width="9" height="9" rx="2" fill="{colour}"/>',
        f'<text x="{starts[0]:g}" y="{y}"><tspan fill="#b4b9c0">{branch}</tspan>{name}</text>',
    ]
    for column in (1, 2, 3, 4):
        fill = colour if column == 4 else "#5d6570"
        right = column in (2, 3)
        x = starts[column + 1] - 20 if right else starts[column]
        anchor = ' text-anchor="end"' if right else ""
        parts.append(f'<text x="{x:g}" y="{y}" fill="{fill}"{anchor}>{escape(row[column])}</text>')
    return "".join(parts)
