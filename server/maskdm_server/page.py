"""One self-contained HTML page: pictures inside, no script, no network."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskdm.runfolder import atomic_write

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --paper: #fff; --line: #c9d0dc; --before: #a8481c; --after: #1f6f5c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecf3; --paper: #161a22; --line: #3a4354; --before: #f0a070; --after: #6fd0b5 } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600; margin-bottom: .4rem }
img { width: 100%; height: auto; image-rendering: pixelated }
svg { width: 100%; height: auto } svg text { fill: var(--ink); font-size: 13px }
.axis { stroke: var(--line) } .before { stroke: var(--before); fill: none } .after { stroke: var(--after); fill: none }
svg text.before { fill: var(--before); stroke: none } svg text.after { fill: var(--after); stroke: none }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1.5rem }
dt { font-weight: 600 } dd { margin: 0 0 .5rem }
"""


@dataclass(frozen=True)
class Panel:
    """A picture with its caption and its text for those who cannot see it."""

    caption: str
    picture: Path
    alt: str


def write_page(
    path: Path, panels: Sequence[Panel], losses: Sequence[tuple[int, float, float]], facts: Mapping[str, str]
) -> Path:
    """Write the page. The last two panels stand side by side; `losses` are (round, before, after)."""
    facts_html = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    body = f"""<h1>MaskDM: one model, three institutions, no shared images</h1>
<dl>{facts_html}</dl>
<div class="pair">{"".join(_figure(panel) for panel in panels[-2:])}</div>
<figure><figcaption>Held-out denoising loss at the institutions</figcaption>{loss_chart(losses)}</figure>
{"".join(_figure(panel) for panel in panels[:-2])}"""
    document = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MaskDM demonstration</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
    atomic_write(path, document)
    return path


def loss_chart(losses: Sequence[tuple[int, float, float]], width: int = 720, height: int = 240) -> str:
    """An SVG of the loss each round: of the model that came, and after local work."""
    values = [value for _, before, after in losses for value in (before, after)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    left, bottom, top = 70, height - 34, 16

    def point(index: int, value: float) -> str:
        x = left + (width - left - 190) * index / max(1, len(losses) - 1)
        return f"{x:.1f},{bottom - (bottom - top) * (value - low) / span:.1f}"

    lines = []
    for kind, column, label in (("before", 1, "model that came"), ("after", 2, "after local work")):
        points = [point(i, row[column]) for i, row in enumerate(losses)]
        dots = "".join('<circle class="{}" cx="{}" cy="{}" r="3"/>'.format(kind, *p.split(",")) for p in points)
        x, y = points[-1].split(",")
        lines.append(f'<polyline class="{kind}" stroke-width="2" points="{" ".join(points)}"/>{dots}')
        label = f"{label} {losses[-1][column]:.4f}"
        lines.append(f'<text class="{kind}" x="{float(x) + 10:.0f}" y="{float(y) + 4:.0f}">{label}</text>')
    ticks = "".join(
        f'<text x="{point(i, low).split(",")[0]}" y="{height - 12}" text-anchor="middle">{row[0]}</text>'
        for i, row in enumerate(losses)
    )
    described = f"Held-out loss from {losses[0][1]:.4f} in round 1 to {losses[-1][2]:.4f} in round {losses[-1][0]}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{described}">'
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{width - 180}" y2="{bottom}"/>'
        f'<text x="{left - 8}" y="{top + 4}" text-anchor="end">{high:.4f}</text>'
        f'<text x="{left - 8}" y="{bottom}" text-anchor="end">{low:.4f}</text>'
        f'{ticks}<text x="{left - 8}" y="{height - 12}" text-anchor="end">round</text>{"".join(lines)}</svg>'
    )


def _figure(panel: Panel) -> str:
    data = base64.b64encode(panel.picture.read_bytes()).decode()
    return (
        f"<figure><figcaption>{html.escape(panel.caption)}</figcaption>"
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(panel.alt)}"></figure>'
    )
