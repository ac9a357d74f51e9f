"""Drawings by matplotlib as inline SVG. Colours are the page's CSS variables, and text stays text.

All are 380 units wide: full size on a phone, two or three side by side on a screen.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

WIDTH, HEIGHT = 380, 240
# Colours that no figure has, each for a variable of the page's style
INK, SOFT, RULE, QUIET, ACCENT, PAPER = COLOURS = tuple(f"#00000{i}" for i in range(1, 7))
VARIABLES = dict(zip(COLOURS, ("--ink", "--soft", "--rule", "--quiet", "--accent", "--paper"), strict=True))
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipfh",  # the same drawing is the same text
    "font.size": 11,
    "text.parse_math": False,  # names of categories are no formulas
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
}
styled = rc_context(STYLE)
"""decorator of functions that draw"""
LINK = "{http://www.w3.org/1999/xlink}href"
DOT, SMALL_DOT = 22, 14
"""areas of marks, in square points"""
DASHES = ("-", (0, (4, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (8, 3)), (0, (2, 4)))


def make_axes(x_title: str = "", height: float = HEIGHT) -> Axes:
    """Axes in a figure of their own. They have no title upwards: the figure's caption on the page says it."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.06))
    axes = figure.subplots()
    axes.set_xlabel(x_title)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return axes


def to_svg(axes: Axes, title: str) -> Markup:
    """The drawing as an element of the page."""
    svg = _save(axes)
    root = ElementTree.fromstring(svg)
    own = hashlib.sha256(svg.encode()).hexdigest()[:6]
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style", "}clipPath"))]:
            parent.remove(child)
    ids = {value[1:] for element in root.iter() for name, value in element.attrib.items() if name == LINK}
    for element in root.iter():
        _simplify(element, ids, own)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(re.sub(r"#00000\d", lambda colour: f"var({VARIABLES[colour[0]]})", text))


def _save(axes: Axes) -> str:
    """The drawing as matplotlib writes it, without characters that XML can't hold."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # text stays text: the reader's fonts draw it
        axes.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})  # type: ignore[union-attr]
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", file.getvalue().decode())


def _simplify(element: ElementTree.Element, ids: set[str], own: str) -> None:
    """Make matplotlib's element fit for HTML: no namespaces, ids that are the figure's own, a link's text as a tip."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {name: value for name, value in element.attrib.items() if name != "clip-path"}
    if attributes.get("id") not in ids:
        attributes.pop("id", None)
    if element.tag == "a":
        element.tag, attributes = "g", {"class": "tip", "tip": attributes[LINK]}
    for name in ("d", "x", "y", "transform"):
        if name in attributes:
            attributes[name] = re.sub(r"(\.\d\d)\d+", r"\1", attributes[name]).replace("\n", "")
    if "id" in attributes:
        attributes["id"] = f"{own}{attributes['id']}"
    if LINK in attributes:
        attributes["href"] = f"#{own}{attributes.pop(LINK)[1:]}"
    if "style" in attributes:
        attributes["style"] = re.sub(r"font-family: [^;]*(; )?", "", attributes["style"])
    if "tip" in attributes:
        tip = ElementTree.Element("title")
        tip.text = attributes.pop("tip").replace("; ", "\n")  # an attribute holds no line ends
        element.insert(0, tip)
    element.attrib = attributes
    element.tail = None
    if element.text and not element.text.strip():
        element.text = None


Mark = tuple[float, float, str]
"""x, y and a tip"""


def draw_marks(axes: Axes, marks: Sequence[Mark], name: str = "", **look: Any) -> None:  # noqa: ANN401
    """Marks of one look."""
    if marks:
        xs, ys, tips = zip(*marks, strict=True)
        axes.scatter(xs, ys, label=name, clip_on=False, **{"s": DOT, **look}).set_urls(list(tips))


def draw_line(axes: Axes, points: Sequence[tuple[float, float]], tip: str = "", **look: Any) -> None:  # noqa: ANN401
    """A curve; a mark where there is only one point."""
    if len(points) == 1:
        look |= {"marker": "o", "markersize": 3}
    (curve,) = axes.plot(*zip(*points, strict=True), **{"clip_on": False, "linewidth": 1.2, **look})
    curve.set_url(tip or None)


def draw_legend(axes: Axes, columns: int = 4) -> None:
    """The labels above the drawing; nothing where there is only one."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if len(by_label) > 1:
        where: dict[str, Any] = {"loc": "outside upper left", "ncols": columns, "fontsize": 10}
        axes.figure.legend(by_label.values(), by_label.keys(), **where)


def draw_level(axes: Axes, value: float | None, name: str = "zero-shot") -> None:
    """A dotted line across, if there is a value."""
    if value is not None:
        line = axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=name)
        line.set_url(f"{name}: {value:.3f}")


def draw_heading(axes: Axes, y: float, left: str, right: str = "") -> None:
    """A row's name, above the row, where a long name has room."""
    across = axes.get_yaxis_transform()
    left = left if len(left) <= 46 else f"{left[:45]}…"
    axes.text(0, y, left, transform=across, va="center", color=INK)
    axes.text(1, y, right, transform=across, va="center", ha="right", color=SOFT)


def label_images(axes: Axes) -> None:
    """An x axis of images seen: 600k, 1.2M."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
