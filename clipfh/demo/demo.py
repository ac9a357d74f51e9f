"""A procedural catalogue for trying clipfh out: garments drawn from their own random attributes, in In-Shop's layout.

Everything is a pure function of its seeds. An item's attributes make a `Garment`; `draw` photographs it. All shapes are
in *body coordinates*: x runs right from the body's axis, y down from the crown of the head (0) to the soles (1). A
camera is an affine matrix from there to pixels, so that a squeeze, a close-up or a figure at full length draw the same
garment with the same code, and patterns stay crisp at any zoom.
"""

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clipfh import UserError

VIEWS = ("1_front", "2_side", "3_back", "4_full", "6_flat", "7_additional")

RGB = tuple[int, int, int]
T = TypeVar("T")

COLORS: dict[str, RGB] = {
    "black": (38, 38, 42),
    "charcoal": (84, 88, 96),
    "grey": (152, 154, 158),
    "white": (242, 242, 238),
    "cream": (240, 228, 200),
    "camel": (194, 152, 104),
    "brown": (116, 76, 50),
    "burgundy": (122, 30, 52),
    "red": (206, 44, 48),
    "coral": (242, 122, 102),
    "orange": (236, 132, 44),
    "mustard": (214, 166, 40),
    "yellow": (248, 220, 92),
    "olive": (116, 118, 62),
    "green": (48, 132, 80),
    "mint": (164, 220, 194),
    "teal": (24, 126, 132),
    "sky": (138, 192, 232),
    "blue": (48, 100, 196),
    "navy": (34, 48, 98),
    "lavender": (182, 164, 222),
    "purple": (114, 62, 148),
    "pink": (242, 166, 192),
}

SKINS: tuple[RGB, ...] = ((250, 220, 196), (236, 190, 154), (206, 152, 112), (158, 106, 74), (106, 70, 52))
HAIRS: tuple[RGB, ...] = ((36, 30, 30), (84, 54, 36), (150, 98, 52), (224, 184, 112), (168, 74, 40), (176, 176, 180))
BASICS: tuple[RGB, ...] = ((244, 244, 242), (60, 62, 68), (70, 88, 124), (178, 172, 164))


class Kind(NamedTuple):
    """What the garments of one shape have in common."""

    places: tuple[tuple[str, str], ...]  # gender and category
    torso: bool
    lower: str  # "", "skirt" or "legs"
    hem: tuple[float, float]  # y of the lower edge, from and to
    necklines: tuple[str, ...]
    sleeves: tuple[float, ...]  # share of the arm that is covered
    details: tuple[str, ...]
    materials: tuple[str, ...]


_KNITS = ("merino wool", "a cotton blend", "brushed cashmere", "chunky acrylic yarn")
_WOVEN = ("cotton twill", "washed linen", "a wool blend", "stretch denim", "fine corduroy")
_SOFT = ("cotton jersey", "a modal blend", "slub cotton", "organic cotton")
_FLUID = ("viscose crepe", "silky satin", "cotton poplin", "light chiffon")
_OPEN = ("crew", "scoop", "v", "square", "boat")

KINDS: dict[str, Kind] = {
    "dress": Kind(
        (("WOMEN", "Dresses"),),
        True, "skirt", (0.62, 0.88), _OPEN, (0.0, 0.25, 0.5, 0.95), ("belt", "buttons", "pleats", "hem band"), _FLUID,
    ),
    "skirt": Kind(
        (("WOMEN", "Skirts"),),
        False, "skirt", (0.60, 0.86), ("none",), (0.0,), ("belt", "buttons", "pleats", "hem band"), _FLUID,
    ),
    "t-shirt": Kind(
        (("MEN", "Tees_Tanks"), ("WOMEN", "Tees_Tanks"), ("WOMEN", "Graphic_Tees")),
        True, "", (0.47, 0.55), _OPEN, (0.0, 0.2, 0.3, 0.5), ("chest pocket", "logo", "cuffs", "hem band"), _SOFT,
    ),
    "shirt": Kind(
        (("MEN", "Shirts_Polos"), ("WOMEN", "Blouses_Shirts")),
        True, "", (0.49, 0.58), ("collar",), (0.3, 0.6, 0.95), ("buttons", "chest pocket", "cuffs"), _FLUID,
    ),
    "sweater": Kind(
        (("MEN", "Sweaters"), ("WOMEN", "Sweaters")),
        True, "", (0.48, 0.58), ("crew", "v", "turtle", "boat"), (0.6, 0.95), ("cuffs", "hem band", "logo"), _KNITS,
    ),
    "hoodie": Kind(
        (("MEN", "Sweatshirts_Hoodies"), ("WOMEN", "Sweatshirts_Hoodies")),
        True, "", (0.50, 0.57), ("hood",), (0.6, 0.95), ("pouch", "zip", "logo", "cuffs", "hem band"), _SOFT,
    ),
    "coat": Kind(
        (("MEN", "Jackets_Vests"), ("WOMEN", "Jackets_Coats")),
        True, "", (0.56, 0.78), ("lapel", "collar"), (0.95,), ("buttons", "belt", "side pockets", "cuffs"), _WOVEN,
    ),
    "trousers": Kind(
        (("MEN", "Pants"), ("WOMEN", "Pants")),
        False, "legs", (0.82, 0.95), ("none",), (0.0,), ("belt", "side pockets", "cuffs", "drawstring"), _WOVEN,
    ),
    "shorts": Kind(
        (("MEN", "Shorts"), ("WOMEN", "Shorts")),
        False, "legs", (0.60, 0.72), ("none",), (0.0,), ("belt", "side pockets", "cuffs", "drawstring"), _WOVEN,
    ),
    "jumpsuit": Kind(
        (("WOMEN", "Rompers_Jumpsuits"),),
        True, "legs", (0.64, 0.95), _OPEN, (0.0, 0.25, 0.5), ("belt", "buttons", "cuffs", "chest pocket"), _FLUID,
    ),
}  # fmt: skip


class Color(NamedTuple):
    """A shade, and the name that a shop gives it."""

    name: str
    rgb: RGB


@dataclass(frozen=True)
class Garment:
    """The attributes of one item; all that its photos and its text are made from."""

    index: int
    gender: str
    category: str
    kind: str
    colors: tuple[Color, ...]  # one a variant
    accent: Color  # of pattern and trimmings, common to the variants
    pattern: str
    angle: float  # of the pattern, radians
    period: float  # of the pattern, in body heights
    duty: float  # share of the accent colour in a period
    neckline: str
    sleeve: float
    hem: float
    fit: float  # width against the body's
    flare: float  # width of the hem against the hip's
    details: tuple[str, ...]
    material: str

    @property
    def item_id(self) -> str:
        return f"id_{self.index:08d}"

    @property
    def folder(self) -> str:
        return f"img/{self.gender}/{self.category}/{self.item_id}"


def _dice(*key: int) -> np.random.Generator:
    """Chance that depends on the key alone; on its length too, since numpy takes (1, 2) and (1, 2, 0) for one."""
    return np.random.default_rng((len(key), *key))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _shade(rng: np.random.Generator, name: str) -> Color:
    """That colour as this item's maker dyes it."""
    r, g, b = (int(c) for c in np.clip(COLORS[name] + rng.normal(0, 12, 3), 0, 255))
    return Color(name, (r, g, b))


def _accent(rng: np.random.Generator, mains: Sequence[Color]) -> Color:
    """A colour that stands out from all of these as well as any can."""
    apart = {name: min(math.dist(rgb, main.rgb) for main in mains) for name, rgb in COLORS.items()}
    return _shade(rng, _pick(rng, sorted(apart, key=apart.__getitem__)[-8:]))


def garment(seed: int, item_index: int) -> Garment:
    """The item of that number in the catalogue of that seed."""
    rng = _dice(seed, item_index)
    name = _pick(rng, list(KINDS))
    kind = KINDS[name]
    gender, category = _pick(rng, kind.places)
    variants = int(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05]))
    colors = tuple(_shade(rng, str(name)) for name in rng.choice(list(COLORS), variants, replace=False))
    chosen = rng.random(len(kind.details)) < 0.45
    return Garment(
        index=item_index,
        gender=gender,
        category=category,
        kind=name,
        colors=colors,
        accent=_accent(rng, colors),
        pattern=_pick(rng, list(PATTERNS)),
        angle=float(rng.choice(np.radians([0, 30, 45, 60, 90, 135]))),
        period=float(np.exp(rng.uniform(np.log(0.035), np.log(0.11)))),
        duty=float(rng.uniform(0.3, 0.6)),
        neckline=_pick(rng, kind.necklines),
        sleeve=_pick(rng, kind.sleeves),
        hem=float(rng.uniform(*kind.hem)),
        fit=float(rng.uniform(0.95, 1.3)),
        flare=float(rng.uniform(0.9, 1.9)),
        details=tuple(d for d, wanted in zip(kind.details, chosen, strict=True) if wanted),
        material=_pick(rng, kind.materials),
    )


# --- patterns: the share of the accent colour, from coordinates s and t in periods of the pattern ---------------------


def _wave(s: np.ndarray, duty: float) -> np.ndarray:
    """Stripes across s, `duty` of a period wide, with edges a tenth of a period soft."""
    return np.clip((duty / 2 - np.abs(s - np.round(s))) * 10 + 0.5, 0, 1)


def _repeat(radius: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray, float], np.ndarray]:
    """A motif in every cell of a brick lattice; `radius` is its outline as a function of the angle."""

    def pattern(s: np.ndarray, t: np.ndarray, duty: float) -> np.ndarray:
        row = np.round(t)
        x, y = s + row % 2 / 2, t - row
        x = x - np.round(x)
        inside = (0.2 + 0.35 * duty) * radius(np.arctan2(x, y)) - np.hypot(x, y)
        return np.clip(inside * 10 + 0.5, 0, 1)

    return pattern


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "plain": lambda s, t, duty: np.zeros_like(s),
    "stripes": lambda s, t, duty: _wave(s, duty),
    "pinstripes": lambda s, t, duty: _wave(s * 1.4, duty / 3),
    "checks": lambda s, t, duty: (_wave(s, duty) + _wave(t, duty)) / 2,
    "tartan": lambda s, t, duty: np.maximum(_wave(s, duty) * 0.5, np.maximum(_wave(t, 0.2), _wave(s + 0.5, 0.1))),
    "zigzags": lambda s, t, duty: _wave(s + 0.6 * np.abs(t / 1.5 - np.round(t / 1.5)) * 2, duty),
    "waves": lambda s, t, duty: _wave(s + 0.25 * np.sin(t * 4), duty),
    "dots": _repeat(lambda a: np.ones_like(a)),
    "flowers": _repeat(lambda a: 1 + 0.45 * np.cos(5 * a)),
    "stars": _repeat(lambda a: 0.55 + 0.9 * np.abs((a * 2.5 / np.pi) % 1 - 0.5) * 2),
    "diamonds": _repeat(lambda a: 1.3 / (np.abs(np.sin(a)) + np.abs(np.cos(a)))),
    "hearts": _repeat(lambda a: np.interp(np.abs(a), [0, 0.4, 1.2, 2.2, 2.7, np.pi], [1.2, 0.85, 0.7, 1.0, 0.9, 0.4])),
    "patches": lambda s, t, duty: np.clip(
        (np.sin(s * 2.3 + np.sin(t * 1.7)) + np.sin(t * 2.9 + 2 * np.sin(s * 1.1)) + duty - 0.7) * 4, 0, 1
    ),
    "gradient": lambda s, t, duty: np.clip(0.5 + s / 6, 0, 1),
    "color block": lambda s, t, duty: np.clip(s * 20 + 0.5, 0, 1),
}


def _cloth(item: Garment, main: RGB, uv: np.ndarray, back: bool) -> np.ndarray:
    """Colours (h, w, 3) of the cloth at body coordinates `uv` (2, h, w)."""
    x, y = (-uv[0] if back else uv[0]), uv[1] - (item.hem + 0.3) / 2
    cos, sin = math.cos(item.angle) / item.period, math.sin(item.angle) / item.period
    s, t = cos * y + sin * x, sin * y - cos * x
    share = PATTERNS[item.pattern](s, t, item.duty)[..., None]
    ground, print_ = np.array((main, item.accent.rgb), np.float32)
    return ground + (print_ - ground) * share


# --- shapes, in body coordinates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """Who wears it, and how they stand. Arms are (shoulder, elbow, wrist), legs (hip, knee, ankle), left then right."""

    arms: tuple[np.ndarray, ...]
    legs: tuple[np.ndarray, ...]
    skin: RGB
    hair: RGB
    style: str
    basics: RGB


def _chain(start: tuple[float, float], lengths: Sequence[float], degrees: Sequence[float], side: int) -> np.ndarray:
    """Joints of a limb: from `start` along segments, each so many degrees out from straight down."""
    turn = np.radians(degrees)
    steps = np.array(lengths)[:, None] * np.stack([np.sin(turn), np.cos(turn)], 1)
    return np.concatenate([[start], start + np.cumsum(steps, 0)]) * [side, 1]


def _person(shoot: np.random.Generator, rng: np.random.Generator, flat: bool) -> Person:
    """Somebody in a pose: who it is comes from `shoot`, how they stand from `rng`."""
    arms, legs = [], []
    for side in (-1, 1):
        out = rng.uniform(30, 50) if flat else rng.uniform(6, 34)
        bend = 0.0 if flat else float(_pick(rng, (-75, -10, 0, 10, 30)))
        arms.append(_chain((0.103, 0.238), (0.15, 0.14), (out, out + bend), side))
        stand = 9.0 if flat else rng.uniform(0, 9)
        legs.append(_chain((0.055, 0.50), (0.23, 0.215), (stand, stand + (0 if flat else rng.uniform(-6, 2))), side))
    style = _pick(shoot, ("short", "long", "bun"))
    return Person(tuple(arms), tuple(legs), _pick(shoot, SKINS), _pick(shoot, HAIRS), style, _pick(shoot, BASICS))


def _mirror(half: Sequence[tuple[float, float]]) -> np.ndarray:
    """A closed symmetric outline from its right half, top to bottom."""
    right = np.array(half)
    return np.concatenate([right, right[::-1] * [-1, 1]])


def _smooth(points: np.ndarray) -> np.ndarray:
    """The closed outline with its corners cut (Chaikin)."""
    for _ in range(2):
        after = np.roll(points, -1, 0)
        points = np.stack([0.8 * points + 0.2 * after, 0.2 * points + 0.8 * after], 1).reshape(-1, 2)
    return points


def _limb(joints: np.ndarray, widths: tuple[float, float], reach: float = 1.0, start: float = 0.0) -> np.ndarray:
    """Outline of an arm, a leg, a sleeve: that part of the chain of joints, `widths` wide at its ends."""
    at = np.linspace(start, reach, 9)
    middle = np.stack([np.interp(at, np.linspace(0, 1, len(joints)), joints[:, i]) for i in (0, 1)], 1)
    along = np.gradient(middle, axis=0)
    across = along[:, ::-1] * [1, -1] / np.linalg.norm(along, axis=1, keepdims=True)
    half = across * np.linspace(widths[0], widths[1], 9)[:, None] / 2
    return np.concatenate([middle + half, (middle - half)[::-1]])


def _disc(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A rectangle hanging from the middle of its upper edge."""
    return np.array([(x - width / 2, y), (x + width / 2, y), (x + width / 2, y + height), (x - width / 2, y + height)])


def _hem_width(item: Garment) -> float:
    """Half the width of the lower edge of the trunk."""
    if KINDS[item.kind].lower == "skirt":
        return 0.108 * item.fit * (1 + (item.flare - 1) * (item.hem - 0.45) / 0.4)
    return 0.105 * item.fit * (0.9 + 0.12 * item.flare)


def _trunk(item: Garment) -> np.ndarray:
    """Outline of the garment without sleeves and legs."""
    kind, half = KINDS[item.kind], []
    if kind.torso:
        shoulder = 0.132 if item.sleeve else 0.092
        half += [(0.045, 0.192), (shoulder, 0.214), (shoulder, 0.25), (0.106 * item.fit, 0.30)]
    waist = 0.084 * (item.fit if kind.lower == "" else 1.04)
    half += [(waist, 0.405)]
    if kind.lower == "legs":
        half += [(0.116 * item.fit, 0.49), (0.112 * item.fit, 0.56), (0.02, 0.575)]
    else:
        half += [(0.108 * item.fit, 0.475)] if kind.lower == "skirt" else []
        half += [(_hem_width(item), item.hem), (_hem_width(item) / 2, item.hem + 0.012)]
    return _smooth(_mirror(half))


def _sleeves(item: Garment, body: Person, start: float = 0.0) -> list[np.ndarray]:
    """Outlines of the sleeves, from that share of their length on."""
    wide = 0.062 * item.fit
    arms = body.arms if item.sleeve else ()
    return [_smooth(_limb(arm, (wide, wide * 0.8), item.sleeve, item.sleeve * start)) for arm in arms]


def _trousers(item: Garment, body: Person, start: float = 0.0) -> list[np.ndarray]:
    """Outlines of the trouser legs, from that share of their length on."""
    reach, wide = (item.hem - 0.5) / 0.445, 0.112 * item.fit
    end = wide * (0.35 + 0.35 * item.flare)
    legs = body.legs if KINDS[item.kind].lower == "legs" else ()
    return [_limb(leg, (wide + (end - wide) * start, end), reach, reach * start) for leg in legs]


# --- drawing ---------------------------------------------------------------------------------------------------------


def _tint(rgb: Sequence[float] | np.ndarray, factor: float = 1) -> RGB:
    """The colour darker (below 1) or lighter (above)."""
    r, g, b = (int(min(255, c * factor)) for c in rgb)
    return r, g, b


class Canvas:
    """An image and the camera (2, 3) that takes body coordinates to its pixels."""

    def __init__(self, image: Image.Image, camera: np.ndarray) -> None:
        self.image, self.camera = image, camera
        self.scale = float(np.sqrt(abs(np.linalg.det(camera[:, :2]))))
        self._pen = ImageDraw.Draw(image)

    def pixels(self, points: np.ndarray) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in points @ self.camera[:, :2].T + self.camera[:, 2]]

    def coordinates(self) -> np.ndarray:
        """Body coordinates (2, h, w) of every pixel."""
        y, x = np.indices((self.image.height, self.image.width), np.float32)
        x, y = x - float(self.camera[0, 2]), y - float(self.camera[1, 2])
        return np.stack([a * x + b * y for a, b in np.linalg.inv(self.camera[:, :2]).tolist()])

    def fill(self, points: np.ndarray, rgb: RGB) -> None:
        self._pen.polygon(self.pixels(points), fill=rgb)

    def stroke(self, points: Sequence[tuple[float, float]], rgb: RGB, width: float = 0.005) -> None:
        self._pen.line(self.pixels(np.array(points)), fill=rgb, width=max(1, round(width * self.scale)), joint="curve")

    def mask(self, outlines: Sequence[np.ndarray]) -> Image.Image:
        mask = Image.new("L", self.image.size)
        pen = ImageDraw.Draw(mask)
        for points in outlines:
            pen.polygon(self.pixels(points), fill=255)
        return mask

    def drape(self, outlines: Sequence[np.ndarray], cloth: np.ndarray) -> None:
        """Fill the outlines with cloth (h, w, 3), darker towards their common edge, as round things are."""
        mask = self.mask(outlines)
        small = mask.reduce(4).filter(ImageFilter.GaussianBlur(0.0055 * self.scale))
        depth = np.asarray(small.resize(mask.size, Image.Resampling.BILINEAR), np.float32)[..., None]
        shaded = cloth * (0.42 + 0.66 / 255 * depth)
        self.image.paste(Image.fromarray(np.minimum(shaded, 255).astype(np.uint8)), mask=mask)


def _pastel(rng: np.random.Generator) -> RGB:
    return _tint(0.2 * np.array(_pick(rng, list(COLORS.values()))) + 180)


def _background(rng: np.random.Generator, n: int) -> Image.Image:
    """A studio (mostly) or a coloured wall, both with a floor, or a clutter of blocks or of lights."""
    style = _pick(rng, ("studio",) * 5 + ("wall", "blocks", "lights"))
    base = _tint(np.full(3, rng.uniform(222, 240))) if style == "studio" else _pastel(rng)
    image = Image.new("RGB", (n, n), base)
    pen = ImageDraw.Draw(image)
    if style in ("studio", "wall"):
        pen.rectangle((0, n * rng.uniform(0.75, 0.95), n, n), fill=_tint(base, rng.uniform(0.86, 0.96)))
        return image
    for _ in range(7):
        x, y, w, h = rng.uniform((-0.2, -0.2, 0.15, 0.15), (0.9, 0.9, 0.6, 0.6)) * n
        if style == "blocks":
            pen.rectangle((x, y, x + w, y + h), fill=_pastel(rng))
        else:
            pen.ellipse((x, y, x + w, y + w), fill=_pastel(rng))
    return image.filter(ImageFilter.BoxBlur(n * (0.004 if style == "blocks" else 0.04)))


def _figure(canvas: Canvas, item: Garment, body: Person, back: bool) -> None:
    """The person, in plain clothes where the garment leaves off."""
    kind = KINDS[item.kind]
    if body.style == "long" and not back:
        canvas.fill(_mirror([(0.03, 0.02), (0.072, 0.08), (0.075, 0.23)]), body.hair)
    for leg in body.legs:
        canvas.fill(_disc(leg[2, 0] * 1.1, 0.965, 0.034, 0.02), _tint(body.basics, 0.6))
        canvas.fill(_limb(leg, (0.085, 0.042)), body.skin if kind.lower else body.basics)
    hips = _mirror([(0.08, 0.38), (0.105, 0.49), (0.1, 0.54), (0.0, 0.56)])
    chest = _mirror([(0.05, 0.195), (0.118, 0.215), (0.1, 0.3), (0.08, 0.41)])
    canvas.fill(_smooth(hips), body.skin if kind.lower else body.basics)
    canvas.fill(_smooth(chest), body.skin if kind.torso else body.basics)
    for arm in body.arms:
        canvas.fill(_limb(arm, (0.05, 0.034)), body.skin)
        canvas.fill(_disc(float(arm[2, 0]), float(arm[2, 1]), 0.021, 0.021), body.skin)
    canvas.fill(_limb(np.array([(0, 0.1), (0, 0.215)]), (0.055, 0.06)), _tint(body.skin, 0.92))


def _head(canvas: Canvas, body: Person, back: bool) -> None:
    canvas.fill(_disc(0, 0.09, 0.056, 0.068), body.skin)
    if body.style == "bun":
        canvas.fill(_disc(0, 0.012, 0.03, 0.026), body.hair)
    if back:
        canvas.fill(_disc(0, 0.082, 0.062, 0.068), body.hair)
        if body.style == "long":
            canvas.fill(_mirror([(0.06, 0.07), (0.066, 0.2), (0.03, 0.25)]), body.hair)
        return
    canvas.fill(_mirror([(0.02, 0.012), (0.05, 0.035), (0.063, 0.09), (0.05, 0.065), (0.02, 0.048)]), body.hair)
    for side in (-1, 1):
        canvas.fill(_disc(side * 0.021, 0.095, 0.0055, 0.007), (50, 40, 40))
    canvas.stroke([(-0.014, 0.122), (0, 0.128), (0.014, 0.122)], (170, 70, 70), 0.005)


NECKS: dict[str, list[tuple[float, float]]] = {
    "crew": [(0.045, 0.185), (0.036, 0.213), (0.015, 0.226)],
    "scoop": [(0.056, 0.185), (0.053, 0.225), (0.03, 0.262), (0.012, 0.27)],
    "v": [(0.046, 0.185), (0.042, 0.205), (0.004, 0.285)],
    "square": [(0.058, 0.185), (0.058, 0.25), (0.05, 0.254)],
    "boat": [(0.088, 0.185), (0.08, 0.206), (0.03, 0.22)],
}


def _neckline(canvas: Canvas, item: Garment, main: RGB, inside: RGB, back: bool) -> None:
    """The opening at the neck and what surrounds it; `inside` is what shows through."""
    edge, main = _tint(main, 0.68), _tint(main, 0.86)
    if item.neckline in NECKS:
        half = NECKS["crew"] if back else NECKS[item.neckline]
        canvas.fill(_mirror(half), inside)
        canvas.stroke([*half, *((-x, y) for x, y in half[::-1])], edge, 0.009)
    elif item.neckline == "turtle":
        canvas.fill(_mirror([(0.04, 0.155), (0.046, 0.21), (0.03, 0.222)]), main)
        canvas.stroke([(-0.04, 0.182), (0, 0.186), (0.04, 0.182)], edge, 0.004)
    elif item.neckline == "hood" and back:
        canvas.fill(_smooth(_mirror([(0.055, 0.15), (0.085, 0.2), (0.05, 0.3)])), main)
    elif back:
        canvas.fill(_mirror([(0.044, 0.178), (0.06, 0.21), (0.03, 0.216)]), main)
    else:
        deep = {"hood": 0.25, "collar": 0.235, "lapel": 0.33}[item.neckline]
        wide = {"hood": 0.082, "collar": 0.062, "lapel": 0.072}[item.neckline]
        canvas.fill(_mirror([(0.045, 0.175), (0.045, 0.2), (0.002, deep - 0.01)]), inside)
        for side in (-1, 1):
            flap = np.array([(0.038, 0.172), (wide, 0.212), (wide * 0.8, deep - 0.02), (0.0, deep), (0.032, 0.205)])
            canvas.fill(flap * [side, 1], main)
            canvas.stroke([(side * x, y) for x, y in flap[1:]], edge, 0.004)


def _trimmings(canvas: Canvas, item: Garment, main: RGB, body: Person) -> None:
    """Those of the garment's details that go all the way round."""
    wide = _hem_width(item) * 0.99
    if "cuffs" in item.details:
        for cuff in _trousers(item, body, start=0.86):
            canvas.fill(cuff, item.accent.rgb)
    if "hem band" in item.details:
        band = [(wide * 0.985, item.hem - 0.026), (wide, item.hem), (wide / 2, item.hem + 0.01)]
        canvas.fill(_mirror(band), item.accent.rgb)
    if "pleats" in item.details:
        for k in np.linspace(-0.8, 0.8, 7):
            canvas.stroke([(k * 0.08, 0.43), (k * wide, item.hem)], _tint(main, 0.62), 0.004)
    if "belt" in item.details:
        canvas.fill(_box(0, 0.396, 0.18 if KINDS[item.kind].lower else 0.18 * item.fit, 0.022), item.accent.rgb)


def _details(canvas: Canvas, item: Garment, main: RGB) -> None:
    """Those of the garment's details that sit at the front."""
    kind, dark, bright = KINDS[item.kind], _tint(main, 0.62), item.accent.rgb
    top, bottom = (0.25 if kind.torso else 0.42), (0.5 if kind.lower == "legs" else item.hem)
    if "zip" in item.details:
        canvas.stroke([(0, top), (0, bottom)], dark, 0.011)
    if "buttons" in item.details:
        canvas.stroke([(0, top), (0, bottom)], dark, 0.004)
        for y in np.arange(top + 0.03, bottom - 0.01, 0.045):
            canvas.fill(_disc(0, y, 0.009, 0.009), bright)
    if "belt" in item.details:
        canvas.fill(_box(0, 0.393, 0.03, 0.028), (226, 200, 120))
    if "chest pocket" in item.details:
        canvas.fill(_box(0.05, 0.285, 0.05, 0.052), _tint(main, 0.8))
        canvas.stroke([(0.025, 0.287), (0.075, 0.287)], bright, 0.008)
    if "side pockets" in item.details:
        y = 0.48 if kind.torso else 0.44
        for side in (-1, 1):
            canvas.stroke([(side * 0.055, y), (side * 0.09, y + 0.05)], dark, 0.01)
    if "pouch" in item.details:
        canvas.fill(_mirror([(0.05, item.hem - 0.12), (0.075, item.hem - 0.04), (0.075, item.hem - 0.03)]), dark)
    if "logo" in item.details:
        canvas.fill(_disc(0, 0.32, 0.042, 0.042), bright)
        turn, radius = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.015, 0.034)
        canvas.fill(np.stack([radius * np.sin(turn), 0.32 - radius * np.cos(turn)], 1), main)
    if "drawstring" in item.details:
        for side in (-1, 1):
            canvas.stroke([(side * 0.008, 0.415), (side * 0.02, 0.47)], bright, 0.007)


def _camera(item: Garment, view: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Where the photographer stands for that view, and how the body turns and leans: body coordinates to pixels."""
    upper, lower = (0.17 if KINDS[item.kind].torso else 0.38), item.hem + 0.02
    middle, height = (upper + lower) / 2, max(0.44, (lower - upper) * rng.uniform(1.1, 1.3))
    if view == "4_full":
        height = max(0.74, item.hem + 0.12) * rng.uniform(1, 1.08)
        middle = 0.5 * height - 0.03
    elif view == "7_additional":
        height *= rng.uniform(0.62, 0.75)
        middle += rng.uniform(-0.5, 0.1) * height / 2
    squeeze = rng.uniform(0.58, 0.72) if view == "2_side" else rng.uniform(0.92, 1.04)
    shear = rng.normal(0, 0.1 if view == "2_side" else 0.04)
    lean = np.radians(rng.normal(0, 4))
    rotate = np.array([(np.cos(lean), -np.sin(lean)), (np.sin(lean), np.cos(lean))])
    linear = rotate @ np.array([(squeeze, shear), (0, 1)]) * n / height
    centre = n / 2 + rng.uniform(-0.04, 0.04, 2) * n
    return np.concatenate([linear, (centre - linear @ [0, middle])[:, None]], 1)


def _light(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, colour cast, a shadow across the picture, grain."""
    n = len(pixels)
    cast = rng.uniform(0.88, 1.06) * rng.normal(1, 0.02, 3)
    turn, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2)
    ramp = np.linspace(-0.5, 0.5, n)
    shadow = 1 - depth * (0.5 + np.cos(turn) * ramp[:, None] + np.sin(turn) * ramp[None])
    return pixels * cast * shadow[..., None] + rng.normal(0, 2, (n, n, 1))


def _dress(canvas: Canvas, item: Garment, main: RGB, body: Person, rng: np.random.Generator, back: bool) -> None:
    """Draw the garment itself, cloth first; `rng` lays the folds."""
    uv = canvas.coordinates()
    folds = np.sin(70 * uv[0] + 2 * np.sin(11 * uv[1] + rng.uniform(0, 6)) + rng.uniform(0, 6))
    cloth = _cloth(item, main, uv, back) * (1 + 0.06 * folds[..., None])
    for sleeve in _sleeves(item, body):
        canvas.drape([sleeve], cloth)
    if "cuffs" in item.details:
        for cuff in _sleeves(item, body, start=0.84):
            canvas.fill(cuff, item.accent.rgb)
    canvas.drape([_trunk(item), *_trousers(item, body)], cloth)
    _trimmings(canvas, item, main, body)
    if not back:
        _details(canvas, item, main)


def draw(item: Garment, variant: int, view: str, seed: int, size: int) -> Image.Image:
    """One photo, `size` pixels square: the item in the colour of `variant` (from 0), seen as `view` (one of `VIEWS`).

    A variant is worn by one person; pose, light and background are the photo's own."""
    shoot, rng = _dice(seed, item.index, variant), _dice(seed, item.index, variant, VIEWS.index(view))
    n, main, back, flat = size * 2, item.colors[variant].rgb, view == "3_back", view == "6_flat"
    body = _person(shoot, rng, flat)
    canvas = Canvas(_background(rng, n), _camera(item, view, rng, n))
    outlines = [_trunk(item), *_trousers(item, body), *_sleeves(item, body)]
    shadow = canvas.mask(outlines).filter(ImageFilter.BoxBlur(n * 0.03)).point(lambda p: p * 0.35)
    canvas.image.paste((30, 30, 36), (int(rng.uniform(-0.05, 0.05) * n), int(rng.uniform(0.01, 0.05) * n)), shadow)
    if not flat:
        _figure(canvas, item, body, back)
    _dress(canvas, item, main, body, rng, back)
    if KINDS[item.kind].torso:
        _neckline(canvas, item, main, _tint(main, 0.5) if flat else body.skin, back)
    if not flat:
        _head(canvas, body, back)
    lit = _light(np.asarray(canvas.image.reduce(2), np.float32), rng)
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


# --- text ------------------------------------------------------------------------------------------------------------

OPENINGS = (
    "A wardrobe favorite with a little something extra.",
    "Made for long weekends and short mornings.",
    "Some pieces do the talking for you.",
    "Designed to be worn on repeat, season after season.",
    "Equal parts easy and polished, this one goes everywhere.",
    "If you only add one new thing this year, let it be this.",
)
CLOSINGS = (
    "Dress it up with ankle boots or keep it casual with canvas sneakers.",
    "It layers well under a jacket when the evening turns cool.",
    "Wear it to the office, to brunch, or nowhere in particular.",
    "Pair it with neutral basics and let it take center stage.",
)
HEMS = ((0.9, "at the ankle"), (0.78, "at mid-calf"), (0.7, "at the knee"), (0.56, "above the knee"), (0, "at the hip"))
SLEEVES = ((0.95, "long sleeves"), (0.5, "elbow-length sleeves"), (0.2, "short sleeves"), (0, "a sleeveless cut"))
WORDS = {
    "crew": "a crew neck", "scoop": "a scoop neckline", "v": "a V-neckline", "square": "a square neckline",
    "boat": "a boat neck", "turtle": "a turtleneck", "collar": "a pointed collar", "lapel": "wide lapels",
    "hood": "a roomy hood", "belt": "a contrast belt", "buttons": "a row of buttons", "pleats": "knife pleats",
    "hem band": "a contrast hem", "chest pocket": "a chest pocket", "logo": "a round star logo",
    "cuffs": "contrast cuffs", "pouch": "a kangaroo pocket", "zip": "a full-length zip",
    "side pockets": "slanted side pockets", "drawstring": "a drawstring waist",
}  # fmt: skip


def _pattern_words(item: Garment) -> str:
    if item.pattern == "plain":
        return "left beautifully plain"
    size = "fine" if item.period < 0.05 else "bold" if item.period > 0.085 else "classic"
    slant = {0: "horizontal", 90: "vertical"}.get(round(math.degrees(item.angle)), "diagonal")
    article = "a " if item.pattern in ("tartan", "gradient", "color block") else ""
    return f"finished with {article}{size} {slant} {item.accent.name} {item.pattern}"


def _cut_words(item: Garment) -> str:
    """Neckline, sleeves and where on the body the garment ends."""
    hem = next(words for least, words in HEMS if item.hem >= least)
    if not KINDS[item.kind].torso:
        return f"sits high on the waist and falls to a hem {hem}"
    sleeves = next(words for least, words in SLEEVES if item.sleeve >= least)
    return f"has {WORDS[item.neckline]}, {sleeves} and a hem {hem}"


def describe(item: Garment) -> list[str]:
    """Paragraphs about the item in In-Shop's manner: prose, then lines on details and care.

    As there, an item has one text, which names the colour of its first variant."""
    fit = "slim" if item.fit < 1.05 else "relaxed" if item.fit > 1.2 else "regular"
    noun = f"pair of {item.kind}" if item.kind.endswith("s") and item.kind != "dress" else item.kind
    whose = {"MEN": "men's", "WOMEN": "women's"}[item.gender]
    prose = (
        f"{OPENINGS[item.index % len(OPENINGS)]} This {fit}-fit {whose} {noun} in {item.colors[0].name} is cut from "
        f"{item.material}, {_pattern_words(item)}. It {_cut_words(item)}. {CLOSINGS[item.index // 3 % len(CLOSINGS)]}"
    )
    details = [f"- {WORDS[name].capitalize()}" for name in item.details]
    return [prose, *details, "- Machine wash cold, hang to dry", "Shown here in size small"]


# --- files -----------------------------------------------------------------------------------------------------------


def _write_photos(task: tuple[Path, int, int, int]) -> list[str]:
    """Photograph one item in every variant, from three to six sides each; the paths written, relative to the root."""
    root, seed, index, size = task
    item, paths = garment(seed, index), []
    (root / item.folder).mkdir(parents=True)
    for variant in range(len(item.colors)):
        rng = _dice(seed, index, variant, len(VIEWS))  # no view has this number
        left_out = rng.choice(len(VIEWS), rng.integers(4), replace=False)
        for view in np.delete(VIEWS, left_out):
            paths.append(f"{item.folder}/{variant + 1:02d}_{view}.jpg")
            draw(item, variant, str(view), seed, size).save(root / paths[-1], quality=int(rng.integers(75, 96)))
    return paths


def _partition(photos: list[list[str]], train_share: float, seed: int) -> list[tuple[str, str, str]]:
    """Rows of the official list. Items are train or test; of a test item's photos a third are queries."""
    rng = _dice(seed)
    train = set(rng.permutation(len(photos))[: round(len(photos) * train_share)].tolist())
    rows = []
    for i, paths in enumerate(photos):
        queries = set(rng.permutation(len(paths))[: max(1, len(paths) // 3)].tolist())
        for k, path in enumerate(paths):
            status = "train" if i in train else "query" if k in queries else "gallery"
            rows.append((path, path.split("/")[3], status))
    return rows


def write_source(out: Path, *, items: int, seed: int, size: int = 96, train_share: float = 0.75) -> None:
    """Write a catalogue of so many items under `out`, as In-Shop is distributed: `img/`, `Eval/`, `Anno/`.

    It takes its place only when whole. Raises `UserError` if `out` is there already."""
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or choose another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("Eval", "Anno"):
        (partial / folder).mkdir(parents=True)
    numbers = range(1, items + 1)
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        photos = list(pool.map(_write_photos, [(partial, seed, i, size) for i in numbers], chunksize=4))
    rows = _partition(photos, train_share, seed)
    lines = [str(len(rows)), "image_name item_id evaluation_status", *(" ".join(row) for row in rows)]
    (partial / "Eval/list_eval_partition.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    garments = [garment(seed, i) for i in numbers]
    texts = [{"item": g.item_id, "color": g.colors[0].name, "description": describe(g)} for g in garments]
    (partial / "Anno/list_description_inshop.json").write_text(json.dumps(texts, indent=1), encoding="utf-8")
    partial.rename(out)


# --- the demonstration -----------------------------------------------------------------------------------------------

SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "demo.yaml"
ITEMS, PHOTO_SIZE, SEED = 400, 96, 0


def run(out: Path, tell: Callable[[str], None] = print) -> None:
    """Draw garments, make a catalogue of them, search settings for the small model on it, export the best.

    Raises:
        UserError: `out` is in use, or the sweep file is not beside the package.
    """
    from clipfh.cluster import resources as cluster
    from clipfh.config import sweep_file
    from clipfh.data import catalogue
    from clipfh.sweep import sweep

    if not SWEEP.is_file():
        raise UserError(f"{SWEEP} is missing: the demo runs from a clone of the project")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: remove it, or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    tell(f"1. drawing {ITEMS} garments: {out}/photos")
    write_source(out / "photos", items=ITEMS, seed=SEED, size=PHOTO_SIZE)
    tell(f"2. clipfh prepare --source {out}/photos --out {out}/catalogue --image-size {PHOTO_SIZE}")
    made = catalogue.prepare(str(out / "photos"), out / "catalogue", image_size=PHOTO_SIZE, seed=SEED)
    tell(
        "   "
        + ", ".join(f"{split} {count['images']:,}" for split, count in made.manifest["counts"].items())
        + " images"
    )
    tell(f"3. clipfh sweep sweeps/demo.yaml {out}/catalogue --out {out}/sweep")
    loaded = sweep_file.load(SWEEP)
    cluster.connect(placement=loaded.placement)
    summary = sweep.run(loaded, made, out / "sweep", tell=lambda line: tell("   " + line))
    cluster.disconnect()
    tell("\n" + sweep.outcome(summary, out / "sweep"))
