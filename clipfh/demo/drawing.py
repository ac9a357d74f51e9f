"""Drawn photos of garments.

All shapes are in *body coordinates*: x runs right from the body's axis, y down from the crown of the head (0) to the
soles (1). A camera is an affine matrix from body coordinates to pixels. So one code draws a garment squeezed, close up
or at full length, and patterns stay crisp at any zoom.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clipfh.demo.garments import COLORS, KINDS, PATTERNS, RGB, Garment, choose, make_rng

VIEWS = ("1_front", "2_side", "3_back", "4_full", "6_flat", "7_additional")

SKINS: tuple[RGB, ...] = ((250, 220, 196), (236, 190, 154), (206, 152, 112), (158, 106, 74), (106, 70, 52))
HAIRS: tuple[RGB, ...] = ((36, 30, 30), (84, 54, 36), (150, 98, 52), (224, 184, 112), (168, 74, 40), (176, 176, 180))
BASICS: tuple[RGB, ...] = ((244, 244, 242), (60, 62, 68), (70, 88, 124), (178, 172, 164))


# --- shapes, in body coordinates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """A person in a pose. Arms are (shoulder, elbow, wrist), legs are (hip, knee, ankle), left then right."""

    arms: tuple[np.ndarray, ...]
    legs: tuple[np.ndarray, ...]
    skin: RGB
    hair: RGB
    style: str
    basics: RGB


def _chain(start: tuple[float, float], lengths: Sequence[float], degrees: Sequence[float], side: int) -> np.ndarray:
    """Return the joints of a limb: from `start` along segments whose `degrees` count outwards from straight down."""
    turn = np.radians(degrees)
    steps = np.array(lengths)[:, None] * np.stack([np.sin(turn), np.cos(turn)], 1)
    return np.concatenate([[start], start + np.cumsum(steps, 0)]) * [side, 1]


def _person(shoot: np.random.Generator, rng: np.random.Generator, flat: bool) -> Person:
    """Choose a person by `shoot`, and the person's pose by `rng`."""
    arms, legs = [], []
    for side in (-1, 1):
        spread = rng.uniform(30, 50) if flat else rng.uniform(6, 34)
        bend = 0.0 if flat else float(choose(rng, (-75, -10, 0, 10, 30)))
        arms.append(_chain((0.103, 0.238), (0.15, 0.14), (spread, spread + bend), side))
        stand = 9.0 if flat else rng.uniform(0, 9)
        legs.append(_chain((0.055, 0.50), (0.23, 0.215), (stand, stand + (0 if flat else rng.uniform(-6, 2))), side))
    style = choose(shoot, ("short", "long", "bun"))
    return Person(tuple(arms), tuple(legs), choose(shoot, SKINS), choose(shoot, HAIRS), style, choose(shoot, BASICS))


def _mirror(half: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return the closed symmetric outline with this right half, given from top to bottom."""
    right = np.array(half)
    return np.concatenate([right, right[::-1] * [-1, 1]])


def _smooth(points: np.ndarray) -> np.ndarray:
    """Cut the corners of a closed outline (Chaikin)."""
    for _ in range(2):
        after = np.roll(points, -1, 0)
        points = np.stack([0.8 * points + 0.2 * after, 0.2 * points + 0.8 * after], 1).reshape(-1, 2)
    return points


def _limb(joints: np.ndarray, widths: tuple[float, float], reach: float = 1.0, start: float = 0.0) -> np.ndarray:
    """Return the outline of a limb, or of its share from `start` to `reach`, which is `widths` wide at its two ends."""
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
    """Return a rectangle, given the middle of its upper edge."""
    return np.array([(x - width / 2, y), (x + width / 2, y), (x + width / 2, y + height), (x - width / 2, y + height)])


def _hem_width(item: Garment) -> float:
    """Return half the width of the lower edge of the trunk."""
    if KINDS[item.kind].lower == "skirt":
        return 0.108 * item.fit * (1 + (item.flare - 1) * (item.hem - 0.45) / 0.4)
    return 0.105 * item.fit * (0.9 + 0.12 * item.flare)


def _trunk(item: Garment) -> np.ndarray:
    """Return the outline of the garment without sleeves and legs."""
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
    """Return the outlines of the sleeves, from the share `start` of their length on."""
    wide = 0.062 * item.fit
    arms = body.arms if item.sleeve else ()
    return [_smooth(_limb(arm, (wide, wide * 0.8), item.sleeve, item.sleeve * start)) for arm in arms]


def _trousers(item: Garment, body: Person, start: float = 0.0) -> list[np.ndarray]:
    """Return the outlines of the trouser legs, from the share `start` of their length on."""
    reach, wide = (item.hem - 0.5) / 0.445, 0.112 * item.fit
    end = wide * (0.35 + 0.35 * item.flare)
    legs = body.legs if KINDS[item.kind].lower == "legs" else ()
    return [_limb(leg, (wide + (end - wide) * start, end), reach, reach * start) for leg in legs]


# --- drawing ---------------------------------------------------------------------------------------------------------


def _tint(rgb: Sequence[float] | np.ndarray, factor: float = 1) -> RGB:
    """Return the colour, darker by a factor below 1, or lighter by a factor above 1."""
    r, g, b = (int(min(255, c * factor)) for c in rgb)
    return r, g, b


class Canvas:
    """An image, and the camera, a matrix (2, 3), that takes body coordinates to the image's pixels."""

    def __init__(self, image: Image.Image, camera: np.ndarray) -> None:
        self.image, self.camera = image, camera
        self.scale = float(np.sqrt(abs(np.linalg.det(camera[:, :2]))))
        self._pen = ImageDraw.Draw(image)

    def pixels(self, points: np.ndarray) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in points @ self.camera[:, :2].T + self.camera[:, 2]]

    def coordinates(self) -> np.ndarray:
        """Return the body coordinates (2, h, w) of every pixel."""
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
        """Fill the outlines with cloth (h, w, 3), darker towards their common edge, as on a round body."""
        mask = self.mask(outlines)
        small = mask.reduce(4).filter(ImageFilter.GaussianBlur(0.0055 * self.scale))
        depth = np.asarray(small.resize(mask.size, Image.Resampling.BILINEAR), np.float32)[..., None]
        colors = cloth * (0.42 + 0.66 / 255 * depth)
        self.image.paste(Image.fromarray(np.minimum(colors, 255).astype(np.uint8)), mask=mask)


def _pastel(rng: np.random.Generator) -> RGB:
    return _tint(0.2 * np.array(choose(rng, list(COLORS.values()))) + 180)


def _background(rng: np.random.Generator, n: int) -> Image.Image:
    """Draw a background: mostly a studio, else a coloured wall (both have a floor), or many blocks or lights."""
    style = choose(rng, ("studio",) * 5 + ("wall", "blocks", "lights"))
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
    """Draw the person, in plain clothes where the garment covers nothing."""
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
    """Draw the opening at the neck and the cloth around it; `inside` is the colour in the opening."""
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
    """Draw the details of the garment that go all the way round."""
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
    """Draw the details of the garment that are at the front."""
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
    """Return the camera (2, 3) of a view, with a random zoom and place, and a random turn and lean of the body."""
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
    """Apply brightness, a colour cast, a shadow across the picture, and grain."""
    n = len(pixels)
    cast = rng.uniform(0.88, 1.06) * rng.normal(1, 0.02, 3)
    turn, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2)
    ramp = np.linspace(-0.5, 0.5, n)
    shadow = 1 - depth * (0.5 + np.cos(turn) * ramp[:, None] + np.sin(turn) * ramp[None])
    return pixels * cast * shadow[..., None] + rng.normal(0, 2, (n, n, 1))


def _cloth(item: Garment, main: RGB, uv: np.ndarray, back: bool) -> np.ndarray:
    """Return the colours (h, w, 3) of the cloth at body coordinates `uv` (2, h, w)."""
    x, y = (-uv[0] if back else uv[0]), uv[1] - (item.hem + 0.3) / 2
    cos, sin = math.cos(item.angle) / item.period, math.sin(item.angle) / item.period
    s, t = cos * y + sin * x, sin * y - cos * x
    share = PATTERNS[item.pattern](s, t, item.duty)[..., None]
    ground, print_ = np.array((main, item.accent.rgb), np.float32)
    return ground + (print_ - ground) * share


def _dress(canvas: Canvas, item: Garment, main: RGB, body: Person, rng: np.random.Generator, back: bool) -> None:
    """Draw the garment itself, cloth first; `rng` decides where the folds are."""
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
    """Return one photo, `size` pixels square, of the item in the colour of `variant` (from 0), as `view` in `VIEWS`.

    One person wears the variant in all its photos; pose, light and background differ from photo to photo."""
    shoot, rng = make_rng(seed, item.index, variant), make_rng(seed, item.index, variant, VIEWS.index(view))
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
    pixels = _light(np.asarray(canvas.image.reduce(2), np.float32), rng)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
