"""Random garments: their attributes, their patterns, and the texts that a shop writes about them.

Everything is a pure function of seed and item number. `drawing.draw` draws a photo of a `Garment`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

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


class Kind(NamedTuple):
    """The attributes that garments of one kind have in common, and the values that they choose from."""

    places: tuple[tuple[str, str], ...]
    """pairs of gender and category"""
    torso: bool
    lower: str
    """"skirt", "legs" or an empty string"""
    hem: tuple[float, float]
    """smallest and largest y of the lower edge, in body coordinates"""
    necklines: tuple[str, ...]
    sleeves: tuple[float, ...]
    """shares of the arm that are covered"""
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
    """The attributes of one item, which determine its photos and its text."""

    index: int
    gender: str
    category: str
    kind: str
    colors: tuple[Color, ...]
    """main colour of each variant"""
    accent: Color
    """colour of pattern and trimmings, the same in all variants"""
    pattern: str
    angle: float
    """direction of the pattern, radians"""
    period: float
    """length of a repeat of the pattern, in body heights"""
    duty: float
    """share of the accent colour in a period"""
    neckline: str
    sleeve: float
    hem: float
    fit: float
    """width, as a multiple of the body's"""
    flare: float
    """width of the hem, as a multiple of the hip's"""
    details: tuple[str, ...]
    material: str

    @property
    def item_id(self) -> str:
        return f"id_{self.index:08d}"

    @property
    def folder(self) -> str:
        return f"img/{self.gender}/{self.category}/{self.item_id}"


def make_rng(*key: int) -> np.random.Generator:
    """Return the generator of a key. The key's length counts too: numpy takes (1, 2) and (1, 2, 0) for one seed."""
    return np.random.default_rng((len(key), *key))


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _shade(rng: np.random.Generator, name: str) -> Color:
    """Draw a shade near the named colour."""
    r, g, b = (int(c) for c in np.clip(COLORS[name] + rng.normal(0, 12, 3), 0, 255))
    return Color(name, (r, g, b))


def _accent(rng: np.random.Generator, mains: Sequence[Color]) -> Color:
    """Choose a colour among the eight that stand out most from all main colours."""
    apart = {name: min(math.dist(rgb, main.rgb) for main in mains) for name, rgb in COLORS.items()}
    return _shade(rng, choose(rng, sorted(apart, key=apart.__getitem__)[-8:]))


def make_garment(seed: int, item_index: int) -> Garment:
    """Draw the attributes of an item from its seed and number."""
    rng = make_rng(seed, item_index)
    name = choose(rng, list(KINDS))
    kind = KINDS[name]
    gender, category = choose(rng, kind.places)
    variants = int(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05]))
    colors = tuple(_shade(rng, str(name)) for name in rng.choice(list(COLORS), variants, replace=False))
    has_detail = rng.random(len(kind.details)) < 0.45
    return Garment(
        index=item_index,
        gender=gender,
        category=category,
        kind=name,
        colors=colors,
        accent=_accent(rng, colors),
        pattern=choose(rng, list(PATTERNS)),
        angle=float(rng.choice(np.radians([0, 30, 45, 60, 90, 135]))),
        period=float(np.exp(rng.uniform(np.log(0.035), np.log(0.11)))),
        duty=float(rng.uniform(0.3, 0.6)),
        neckline=choose(rng, kind.necklines),
        sleeve=choose(rng, kind.sleeves),
        hem=float(rng.uniform(*kind.hem)),
        fit=float(rng.uniform(0.95, 1.3)),
        flare=float(rng.uniform(0.9, 1.9)),
        details=tuple(d for d, has in zip(kind.details, has_detail, strict=True) if has),
        material=choose(rng, kind.materials),
    )


# --- patterns: the share of the accent colour, from coordinates s and t in periods of the pattern ---------------------


def _wave(s: np.ndarray, duty: float) -> np.ndarray:
    """Return stripes across s, `duty` of a period wide, with soft edges, a tenth of a period wide."""
    return np.clip((duty / 2 - np.abs(s - np.round(s))) * 10 + 0.5, 0, 1)


def _repeat(radius: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray, float], np.ndarray]:
    """Return the pattern with a motif in every cell of a brick lattice; `radius` gives the motif's outline by angle."""

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
    """Describe neckline, sleeves and where on the body the garment ends."""
    hem = next(words for least, words in HEMS if item.hem >= least)
    if not KINDS[item.kind].torso:
        return f"sits high on the waist and falls to a hem {hem}"
    sleeves = next(words for least, words in SLEEVES if item.sleeve >= least)
    return f"has {WORDS[item.neckline]}, {sleeves} and a hem {hem}"


def describe(item: Garment) -> list[str]:
    """Return paragraphs about the item in the style of In-Shop: prose, then lines on details and care.

    As in In-Shop, an item has one text, which names the colour of its first variant."""
    fit = "slim" if item.fit < 1.05 else "relaxed" if item.fit > 1.2 else "regular"
    noun = f"pair of {item.kind}" if item.kind.endswith("s") and item.kind != "dress" else item.kind
    gender = {"MEN": "men's", "WOMEN": "women's"}[item.gender]
    prose = (
        f"{OPENINGS[item.index % len(OPENINGS)]} This {fit}-fit {gender} {noun} in {item.colors[0].name} is cut from "
        f"{item.material}, {_pattern_words(item)}. It {_cut_words(item)}. {CLOSINGS[item.index // 3 % len(CLOSINGS)]}"
    )
    details = [f"- {WORDS[name].capitalize()}" for name in item.details]
    return [prose, *details, "- Machine wash cold, hang to dry", "Shown here in size small"]
