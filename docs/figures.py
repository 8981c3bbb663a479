"""Draws the figures of the documentation from the library's own functions, as SVG files that follow light and dark.

    python docs/figures.py [FOLDER]     `make docs`; the default is images/ beside this script

The faces are drawn by `maskdm_server.lab.faces`; nothing is downloaded and no picture of anybody is used.
"""

import base64
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from maskdm.config import DiffusionConfig, MaskConfig, MaskKind, ModelConfig, Size
from maskdm.diffusion.forward_process import forward_process
from maskdm.networks.flops import training_flops
from maskdm.networks.layers import patchify
from maskdm.networks.masking import draw_visible, effective_ratio, visible_count
from maskdm_server.lab.faces import draw_faces

FOLDER = Path(__file__).with_name("images")

# Names of colours → light, dark. Lines keep 3:1 on their ground, text 4.5:1; the curves also differ in their dashes.
COLOURS = {
    "ground": ("#ffffff", "#161b22"),
    "edge": ("#d0d7de", "#3d444d"),
    "text": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#9198a1"),
    "hidden": ("#e4e8ec", "#2b323b"),
    "blue": ("#0969da", "#58a6ff"),
    "orange": ("#bc4c00", "#f0883e"),
    "green": ("#1a7f37", "#3fb950"),
    "purple": ("#8250df", "#bc8cff"),
    "red": ("#cf222e", "#ff7b72"),
}
BOLD = ' font-weight="600"'
DASHES = {"blue": "none", "orange": "7 3", "green": "2 3", "purple": "9 3 2 3"}

Pixels = NDArray[np.uint8]
Points = Sequence[tuple[float, float]]


def style() -> str:
    """Colours for light, and for dark where the reader prefers it, on a ground of the figure's own."""
    rules = []
    for number in (0, 1):
        tones = {name: both[number] for name, both in COLOURS.items()}
        lines = [f".fill-{name}{{fill:{tone}}}.line-{name}{{stroke:{tone};fill:none}}" for name, tone in tones.items()]
        rules.append("".join(lines))
    fonts = "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
    return f"<style>{fonts}{rules[0]}@media(prefers-color-scheme:dark){{{rules[1]}}}</style>"


def figure(width: float, height: float, title: str, content: Sequence[str]) -> str:
    """A whole SVG file; the title is what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-labelledby="title">\n<title id="title">{title}</title>\n{style()}\n'
        f'<rect class="fill-ground" width="{width:g}" height="{height:g}" rx="8"/>\n'
        + "\n".join(content)
        + "\n</svg>\n"
    )


def text(
    x: float, y: float, content: str, *, size: float = 13, colour: str = "text", anchor: str = "start", more: str = ""
) -> str:
    return (
        f'<text class="fill-{colour}" x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{more}>'
        f"{content}</text>"
    )


def picture(pixels: Pixels, x: float, y: float, width: float) -> str:
    """uint8 (H, W, 3) or (H, W, 4), each pixel a square; its height follows."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    height = width * pixels.shape[0] / pixels.shape[1]
    return (
        f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    )


def line(points: Points, colour: str, *, width: float = 1.0, dashes: str = "none", more: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline class="line-{colour}" stroke-width="{width:g}" stroke-dasharray="{dashes}" points="{path}"{more}/>'
    )


def box(x: float, y: float, width: float, height: float, *, fill: str = "ground", edge: str = "edge") -> str:
    return (
        f'<rect class="fill-{fill}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
        f'<rect class="line-{edge}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    )


class Axes:
    """A plot's frame: from numbers to places."""

    def __init__(
        self, place: tuple[float, float, float, float], x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        """Place is left, top, width and height; x and y are the ranges shown."""
        self.left, self.top, self.width, self.height = place
        self.x, self.y = x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def frame(self, across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]], x: str, y: str) -> list[str]:
        """Grid lines with their labels, and the names of both axes."""
        bottom, drawn = self.top + self.height, []
        for value, label in across:
            place = self.at(value, self.y[0])[0]
            drawn.append(line([(place, self.top), (place, bottom)], "edge"))
            drawn.append(text(place, bottom + 17, label, size=12, colour="quiet", anchor="middle"))
        for value, label in up:
            place = self.at(self.x[0], value)[1]
            drawn.append(line([(self.left, place), (self.left + self.width, place)], "edge"))
            drawn.append(text(self.left - 8, place + 4, label, size=12, colour="quiet", anchor="end"))
        drawn.append(text(self.left + self.width / 2, bottom + 38, x, anchor="middle"))
        return [*drawn, text(self.left, self.top - 12, y)]


def masks() -> str:
    """A face under each kind of mask and rate, and the patches that stay, as the network gets them."""
    model = ModelConfig.preset("S", image_size=64, channels=3)
    face = draw_faces(8, size=64)[5]
    side, across, down, left, top = 128.0, 176.0, 254.0, 126.0, 24.0
    kinds: tuple[tuple[MaskKind, str], ...] = (
        ("block", "blocks of 4×4"),
        ("patch", "single patches"),
        ("crop", "a square"),
    )
    drawn = [
        picture(face, left, top, side),
        _grid_lines(left, top, side, model.grid),
        text(left + across, top + 22, "An image is 16×16 patches of 4×4 pixels."),
        text(left + across, top + 42, "What a mask hides never enters the network:"),
        text(left + across, top + 62, "under each masked image are its tokens,"),
        text(left + across, top + 82, "all that a training step computes with."),
    ]
    for column, ratio in enumerate((0.5, 0.75, 0.9)):
        x = left + column * across
        for row, (kind, name) in enumerate(kinds):
            mask = MaskConfig(kind=kind, ratio=ratio)
            y = top + side + 52 + row * down
            if column == 0:
                drawn += [
                    text(left - 14, y + side / 2, f"--mask {kind}", anchor="end"),
                    text(left - 14, y + side / 2 + 17, name, size=12, colour="quiet", anchor="end"),
                    text(left - 14, y + side + 22, "tokens", size=12, colour="quiet", anchor="end"),
                ]
            visible = draw_visible(mask, model.grid, 1, torch.Generator().manual_seed(7 + row))
            assert visible is not None
            seen, tokens = _masked(face, visible[0].numpy(), model)
            below = y + side + 12 + side * tokens.shape[0] / tokens.shape[1] + 15
            drawn += [
                text(x, y - 8, f"{ratio:.0%} asked, {effective_ratio(mask, model.grid):.1%} hidden", size=12),
                f'<rect class="fill-hidden" x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"/>',
                picture(seen, x, y, side),
                picture(tokens, x, y + side + 12, side),
                text(x, below, f"{visible_count(mask, model.grid)} of {model.grid**2}", size=12, colour="quiet"),
            ]
    title = "A drawn face under block, patch and crop masks at 50, 75 and 90 percent, and the visible patches of each."
    return figure(left + 3 * across + 8, top + side + 52 + 3 * down - 18, title, drawn)


def _grid_lines(x: float, y: float, side: float, grid: int) -> str:
    steps = [side * number / grid for number in range(grid + 1)]
    path = "".join(f"M{x + s:g} {y:g}v{side:g}M{x:g} {y + s:g}h{side:g}" for s in steps)
    return f'<path class="line-ground" stroke-width="0.5" opacity="0.5" d="{path}"/>'


def _masked(face: Pixels, visible: NDArray[np.int64], model: ModelConfig) -> tuple[Pixels, Pixels]:
    """The face with hidden patches transparent, and the visible ones packed into rows of a token grid."""
    size, grid = model.patch_size, model.grid
    shown = np.zeros((model.image_size, model.image_size, 4), np.uint8)
    rows = math.ceil(len(visible) / grid)
    packed = np.zeros((rows * (size + 1), grid * (size + 1), 4), np.uint8)  # a transparent pixel between tokens
    patches = patchify(torch.from_numpy(face).permute(2, 0, 1)[None], size)[0]  # (N, P·P·C)
    for number, token in enumerate(visible):
        patch = patches[int(token)].reshape(size, size, 3).numpy()
        for target, place, step in ((shown, int(token), size), (packed, number, size + 1)):
            y, x = place // grid * step, place % grid * step
            target[y : y + size, x : x + size, :3] = patch
            target[y : y + size, x : x + size, 3] = 255
    return shown, packed


def noise() -> str:
    """One face on its way to noise under four processes, and how fast each gets there."""
    processes = (
        ("ddpm, cosine", "blue", DiffusionConfig(schedule="cosine")),
        ("ddpm, linear", "orange", DiffusionConfig(schedule="linear")),
        ("flow", "green", DiffusionConfig(process="flow")),
        ("edm", "purple", DiffusionConfig(process="edm")),
    )
    face = torch.from_numpy(draw_faces(8, size=32)[5].astype(np.float64)) / 127.5 - 1  # (H, W, C)
    epsilon = torch.randn(face.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares, side, left, top = (0.0, 0.2, 0.4, 0.6, 0.8, 0.999), 84.0, 122.0, 56.0
    drawn = [
        text(
            left,
            30,
            "x<tspan dy='4' font-size='10'>t</tspan><tspan dy='-4'> = α x</tspan>"
            "<tspan dy='4' font-size='10'>0</tspan><tspan dy='-4'> + σ ε, at shares of training's times</tspan>",
        )
    ]
    axes = Axes((left, top + 4 * (side + 10) + 54, 6 * side + 50, 250), (0, 1), (-16, 16))
    curves = []
    for row, (name, colour, config) in enumerate(processes):
        process, y = forward_process(config), top + row * (side + 10)
        drawn.append(text(left - 14, y + side / 2 + 4, name, anchor="end"))
        for column, share in enumerate(shares):
            alpha, sigma = process.level(process.times(torch.tensor([share], dtype=torch.float64)))
            noisy = float(alpha) * face + float(sigma) * epsilon
            shown = noisy * float((alpha**2 + sigma**2).rsqrt())  # edm's grows without bound: shown at one brightness
            pixels = ((shown.clamp(-1, 1) + 1) * 15.5).round().to(
                torch.uint8
            ).numpy() * 8  # noise in 5 bits: smaller files
            drawn.append(picture(pixels, left + column * (side + 10), y, side))
        quantiles = torch.linspace(0.0005, 0.9995, 300, dtype=torch.float64)
        alpha, sigma = process.level(process.times(quantiles))
        log_snr = (2 * (alpha.log() - sigma.log())).tolist()
        points = [axes.at(x, y) for x, y in zip(quantiles.tolist(), log_snr, strict=True) if abs(y) <= 16]
        curves.append(line(points, colour, width=2.5, dashes=DASHES[colour], more=' stroke-linejoin="round"'))
        key = left + 18 + row * 132
        curves.append(
            line(
                [(key, axes.top + axes.height - 18), (key + 30, axes.top + axes.height - 18)],
                colour,
                width=2.5,
                dashes=DASHES[colour],
            )
        )
        curves.append(text(key + 36, axes.top + axes.height - 14, name, size=12))
    across = [(share, f"{share:g}") for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    up = [(value, f"{value:+d}".replace("-", "−") if value else "0") for value in (-16, -8, 0, 8, 16)]
    drawn += axes.frame(
        across, up, "share of the times that training draws", "log-SNR = log(α²/σ²): above 0 more image than noise"
    )
    title = (
        "A face turned into noise by four forward processes, and their log signal-to-noise ratio over training's times."
    )
    return figure(left + 6 * side + 50 + 24, axes.top + axes.height + 56, title, [*drawn, *curves])


def step_cost(size: Size, image_size: int, ratio: float) -> tuple[int, int]:
    """Visible tokens of an image, and floating-point operations of a training step on it."""
    model = ModelConfig.preset(size, image_size=image_size, channels=3)
    mask = MaskConfig(kind="block" if ratio else "none", ratio=ratio)
    return visible_count(mask, model.grid), training_flops(model, mask)


def cost() -> str:
    """What a step costs as more of the image is hidden."""
    ratios = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375)
    axes = Axes((66, 56, 500, 280), (0, 1), (0, 1))
    drawn = axes.frame(
        [(s, f"{s:.0%}") for s in (0, 0.25, 0.5, 0.75, 1)],
        [(s, f"{s:.0%}") for s in (0, 0.25, 0.5, 0.75, 1)],
        "visible tokens",
        "operations of a training step, of those of a step on whole images",
    )
    drawn.append(line([axes.at(0, 0), axes.at(1, 1)], "quiet", dashes="2 4"))
    cases: tuple[tuple[Size, int, str, float], ...] = (("S", 64, "orange", 70), ("B", 256, "blue", 92))
    for size, pixels, colour, key in cases:
        counted = [step_cost(size, pixels, ratio) for ratio in ratios]
        tokens, whole = counted[0]
        points = [axes.at(seen / tokens, flops / whole) for seen, flops in counted]
        drawn.append(line(points, colour, width=2.5, dashes=DASHES[colour]))
        drawn += [f'<circle class="fill-{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        seen, flops = step_cost(size, pixels, 0.9)
        x, y = axes.left, axes.top + axes.height + key
        drawn.append(line([(x, y - 4), (x + 30, y - 4)], colour, width=2.5, dashes=DASHES[colour]))
        label = f"{size} at {pixels} px: 90 % asked, {seen:,} of {tokens:,} tokens, {whole / flops:.1f} times cheaper"
        drawn.append(text(x + 38, y, label))
    x, y = axes.at(0.42, 0.46)
    drawn.append(text(x, y, "proportional", size=12, colour="quiet", anchor="end"))
    title = "Operations of a training step against the share of visible tokens, for S at 64 and B at 256 pixels."
    return figure(600, 448, title, drawn)


def federation_round() -> str:
    """Who sends what to whom in a round."""
    drawn = [
        '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto">'
        '<path class="fill-quiet" d="M0 0L9 4.5L0 9z"/></marker></defs>'
    ]

    def arrow(points: Points) -> str:
        return line(points, "quiet", width=1.8, more=' marker-end="url(#tip)"')

    drawn.append(text(24, 34, "Coordinator", size=15, colour="blue", more=BOLD))
    steps = (
        ("journal", "the model of round n,", "written whole"),
        ("door", "known keys only,", "bounded requests"),
        ("check", "names, shapes, finite,", "not far too long"),
        ("sum", "weighted mean, or", "a robust rule"),
        ("server step", "fedavg, fedadam …", "make model n + 1"),
    )
    width, gap, top, site = 156.0, 18.0, 56.0, 262.0
    right = 24 + 5 * width + 4 * gap

    def place(
        x: float, y: float, wide: float, colour: str, name: str, about: Sequence[str], fill: str = "ground"
    ) -> None:
        drawn.extend([box(x, y, wide, 74, edge=colour, fill=fill), text(x + 12, y + 22, name, more=BOLD)])
        drawn.extend(text(x + 12, y + 43 + 17 * row, words, size=12, colour="quiet") for row, words in enumerate(about))

    for number, (name, *about) in enumerate(steps):
        x = 24 + number * (width + gap)
        place(x, top, width, "blue", name, about)
        if number > 1:
            drawn.append(arrow([(x - gap, top + 37), (x - 1, top + 37)]))
    drawn.append(arrow([(right - width / 2, top), (right - width / 2, 24), (160, 24), (160, top - 1)]))
    drawn.append(text((right - width / 2 + 160) / 2, 16, "next round", size=12, colour="quiet", anchor="middle"))
    drawn += [box(24 + offset, site - offset, right - 40, 172) for offset in (16, 8, 0)]
    wall, down, up = 204.0, 24 + width / 2, 24 + width + gap + width / 2
    drawn.append(line([(24, wall), (right, wall)], "red", width=1.5, dashes="6 4"))
    border = "the institution's border: the site opens the connection, TLS"
    drawn.append(text(right, wall - 8, border, size=12, colour="red", anchor="end"))
    drawn.append(text(430, site + 26, "Site, one of many", size=15, colour="orange", more=BOLD))
    row = site + 46
    place(40, row, 140, "orange", "measure", ("held-out loss of the", "model that came"))
    place(up - 70, row, 140, "orange", "gate", ("the site's policy;", "fails closed"))
    place(430, row, 186, "orange", "train, measure again", ("on the slice,", "nothing hidden"))
    place(694, row, right - 730, "edge", "images", ("a slice, about 10 %;", "they never leave"), "hidden")
    drawn.append(arrow([(down, top + 74), (down, row - 1)]))
    drawn.append(text(down + 10, top + 100, "model, plan", size=12))
    drawn.append(arrow([(up, row), (up, top + 75)]))
    drawn.append(text(up + 10, top + 100, "update, nine numbers", size=12))
    drawn.append(arrow([(110, row + 74), (110, row + 100), (523, row + 100), (523, row + 75)]))
    drawn.append(arrow([(694, row + 37), (617, row + 37)]))
    drawn.append(arrow([(430, row + 37), (up + 71, row + 37)]))
    drawn.append(text((430 + up + 70) / 2, row + 28, "update", size=12, colour="quiet", anchor="middle"))
    title = "Model and plan go to each site, which measures, trains on its slice and lets an update through its gate."
    return figure(right + 24, site + 196, title, drawn)


FIGURES: dict[str, Callable[[], str]] = {"masks": masks, "noise": noise, "cost": cost, "round": federation_round}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw())
