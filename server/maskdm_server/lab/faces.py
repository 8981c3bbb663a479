"""A procedural corpus for the demonstration: small shaded portraits, drawn from a seed, with no file and no download.

The public corpus shows bare heads. Each institution sees what the others and the public do not: a clinic surgical
masks, a laboratory safety glasses, a workshop hard hats.

    python -m maskdm_server.lab.faces DOMAIN COUNT SIZE FOLDER [SEED]    draws them as PNG files, for docker-compose.yml
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.run.pictures import save_png
from maskdm.seeding import derive_seed

Domain = Literal["public", "clinic", "laboratory", "workshop"]
SITES: tuple[Domain, ...] = ("clinic", "laboratory", "workshop")

Array = NDArray[np.floating[Any]]

SKIN = np.array([[255, 219, 188], [238, 190, 150], [214, 158, 112], [168, 113, 74], [120, 76, 50], [86, 54, 38]])
HAIR = np.array([[40, 28, 22], [92, 58, 32], [150, 100, 52], [214, 176, 106], [150, 60, 36], [150, 146, 144]])
WALL = np.array([[120, 150, 190], [190, 170, 140], [140, 170, 140], [176, 150, 176], [96, 112, 128], [214, 206, 196]])
CLOTH = np.array([[60, 80, 140], [140, 50, 60], [60, 110, 90], [70, 70, 80], [200, 160, 90], [230, 230, 230]])
MASK = np.array([[150, 200, 220], [176, 214, 196], [226, 234, 240]])
HELMET = np.array([[250, 200, 40], [245, 130, 40], [240, 240, 240]])


def draw_faces(
    count: int, domain: Domain = "public", *, size: int = 32, seed: int = 0, chunk: int = 64
) -> NDArray[np.uint8]:
    """Draw portraits of one domain: uint8 (count, size, size, 3); the same seed draws the same ones."""

    def part(start: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng(derive_seed("faces", domain, seed, start))
        return _draw(min(chunk, count - start), domain, size, rng)

    with ThreadPoolExecutor() as threads:  # NumPy works outside the interpreter's lock
        return np.concatenate(list(threads.map(part, range(0, count, chunk))))


def write_faces(folder: Path, count: int, domain: Domain = "public", *, size: int = 32, seed: int = 0) -> None:
    """Draw portraits of one domain as PNG files, `00000.png` and so on; nothing is drawn where all are there."""
    if (folder / f"{count - 1:05}.png").exists():
        return
    for number, pixels in enumerate(draw_faces(count, domain, size=size, seed=seed)):
        save_png(folder / f"{number:05}.png", Image.fromarray(pixels))


def _draw(count: int, domain: Domain, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    fine = 2 * size  # drawn at twice the size, then averaged
    axis = (np.arange(fine, dtype=np.float32) + 0.5) / fine * 2 - 1
    x, y = np.broadcast_arrays(axis[None, None, :], axis[None, :, None])  # (1, F, F), −1 … 1, y downwards

    def uniform(low: float, high: float) -> Array:
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    def colour(palette: NDArray[np.int_], spread: float = 12) -> Array:
        jitter = rng.normal(0, spread, (count, 1)) + rng.normal(0, spread / 4, (count, 3))  # brightness, a little hue
        picked = palette[rng.integers(len(palette), size=count)] + jitter
        return (picked.clip(0, 255) / 255).astype(np.float32)[:, None, None, :]  # (B, 1, 1, 3)

    def inside(dx: Array, dy: Array, rx: Array | float, ry: Array | float, edge: float = 0.04) -> Array:
        """Soft ellipse: 1 inside, 0 outside."""
        distance = (np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2) - 1) * np.minimum(rx, ry)
        return (0.5 - distance / edge).clip(0, 1)

    canvas = np.empty((count, fine, fine, 3), np.float32)

    def paint(paint_colour: Array, cover: Array, shade: Array | float = 1.0) -> None:
        lit = paint_colour * np.asarray(shade)[..., None] if np.ndim(shade) else paint_colour
        canvas[:] = canvas + (lit - canvas) * np.broadcast_to(cover, (count, fine, fine))[..., None]

    # Pose: where the head is, how large, how it is turned and tilted.
    cx, cy, width = uniform(-0.12, 0.12), uniform(-0.08, 0.06), uniform(0.46, 0.56)
    height, tilt, turn = width * uniform(1.2, 1.4), uniform(-0.14, 0.14), uniform(-0.22, 0.22)
    dx, dy = x - cx, y - cy
    u, v = (dx * np.cos(tilt) + dy * np.sin(tilt)) / width, (dy * np.cos(tilt) - dx * np.sin(tilt)) / height
    light = uniform(-0.5, 0.5)
    relief = np.sqrt((1 - (u**2 + v**2).clip(0, 1)).clip(0.0, 1))  # height of a half sphere
    shade = (0.62 + 0.38 * relief + 0.24 * light * u).clip(0.3, 1.15)

    wall, skin, hair = colour(WALL), colour(SKIN), colour(HAIR)
    canvas[:] = wall * (1.0 - 0.22 * (y + 1) / 2 + 0.1 * light * x)[..., None]
    back = inside(u, v + 0.12, uniform(1.02, 1.2), uniform(1.0, 1.25))  # hair behind the head
    paint(hair * 0.75, back)
    paint(
        colour(CLOTH), inside(dx, dy - 1.28 * height, uniform(1.5, 2.0) * width, 0.62 * height), 1 - 0.25 * np.abs(dx)
    )
    paint(skin * 0.82, inside(dx, dy - 0.9 * height, 0.4 * width, 0.42 * height))  # neck
    face = inside(u, v, 1.0, 1.0)
    paint(skin, face, shade)
    fringe = face * (0.5 - (v + uniform(0.45, 0.72) + 0.25 * uniform(-1, 1) * u) / 0.08).clip(0, 1)
    paint(hair, fringe, shade)

    ex, ey, gap = turn, uniform(-0.16, -0.04), uniform(0.34, 0.42)
    gaze, brow = uniform(-0.05, 0.05), uniform(0.2, 0.26)
    iris = colour(np.array([[60, 40, 30], [50, 90, 120], [60, 100, 60], [20, 20, 24]]), 6)
    white, dark = np.full((count, 1, 1, 3), 0.96, np.float32), np.full((count, 1, 1, 3), 0.08, np.float32)
    for side in (-1, 1):
        eu, ev = u - ex - side * gap, v - ey
        paint(white, inside(eu, ev, 0.2, 0.12))
        paint(iris, inside(eu - gaze, ev, 0.1, 0.11))
        paint(hair * 0.7, inside(eu, ev + brow + 0.1 * side * uniform(-0.3, 0.3) * eu, 0.22, 0.045))
    paint(skin * 0.72, inside(u - 1.25 * ex - 0.06 * np.sign(light), v - 0.22, 0.09, 0.14) * 0.6)  # nose
    smile, mv = uniform(-0.25, 0.7), v - uniform(0.48, 0.56)
    mouth = uniform(0.24, 0.36)
    curve = mv + smile * (((u - ex) / mouth) ** 2 - 0.5) * 0.16
    paint(
        np.array([0.66, 0.24, 0.24], np.float32) * (0.5 + 0.5 * skin), inside(u - ex, curve, mouth, uniform(0.05, 0.1))
    )

    if domain == "clinic":
        cover = inside(u - 0.6 * ex, v - 0.58, 0.86, 0.42, 0.08) * face
        folds = 1 - 0.1 * (np.sin(v * 26) > 0.6)
        for side in (-1, 1):
            paint(white, inside(u - side * 0.86, v - 0.3, 0.2, 0.03) * face)
        paint(colour(MASK, 6), cover, shade * folds)
    elif domain == "laboratory":
        lens = colour(np.array([[170, 220, 250], [250, 220, 150], [200, 250, 200]]), 6)
        for side in (-1, 1):
            eu, ev = u - ex - side * gap * 1.05, v - ey
            outer, inner = inside(eu, ev, 0.37, 0.27), inside(eu, ev, 0.28, 0.2)
            paint(lens, inner * 0.35)
            paint(dark, (outer - inner).clip(0, 1))
        paint(dark, inside(u - ex, v - ey, 0.12, 0.04))
    elif domain == "workshop":
        helmet = colour(HELMET, 6)
        dome = inside(u, v + 0.5, 1.12, 0.82) * (0.5 - (v + 0.42) / 0.05).clip(0, 1)
        paint(helmet, dome, (shade * 1.1).clip(0.6, 1.2))
        paint(helmet * 0.8, inside(u - 0.5 * turn, v + 0.42, 1.28, 0.1))
    canvas += rng.normal(0, 0.012, canvas.shape).astype(np.float32)
    small = canvas.reshape(count, size, 2, size, 2, 3).mean(axis=(2, 4))
    pixels: NDArray[np.uint8] = (small.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


if __name__ == "__main__":
    name, number, side, path, *rest = sys.argv[1:]
    kind = {str(known): known for known in get_args(Domain)}[name]
    write_faces(Path(path), int(number), kind, size=int(side), seed=int(rest[0]) if rest else 0)
