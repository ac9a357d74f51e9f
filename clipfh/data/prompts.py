"""Prompts for the text tower, made from the descriptions of a catalogue.

A prompt belongs to an item, not to an image. `build_prompts` makes one for each item by one of three strategies, and
`save_prompts` writes a file that can be edited by hand and trained on. The tokenizer comes in as `count_tokens`, which
counts the start and end tokens too.
"""

import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from clipfh import UserError
from clipfh.data.text_repair import repair
from clipfh.storage.store import Folder

Strategy = Literal["raw", "clean", "structured"]
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class ItemText:
    """The text of one item in its catalogue. Any field of text may be empty."""

    item: str
    text: str
    """Description: one paragraph a line."""
    color: str
    category: str
    gender: str
    num_variants: int
    """Number of colour variants with images. The colour of the text holds only where there is one variant."""
    num_views: int
    """Number of images of the item."""


def item_texts(rows: Iterable[Mapping[str, Any]]) -> list[ItemText]:
    """The texts of the items of a catalogue, from its rows: an ItemText for each text and colour that an item has."""
    first_rows: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    variants: dict[str, set[str]] = defaultdict(set)
    views: Counter[str] = Counter()
    for row in rows:
        item = row["item_id"]
        first_rows.setdefault((item, row["text"], row["color"]), row)
        variants[item].add(row["variant"])
        views[item] += 1
    return [
        ItemText(item, text, color, row["category"], row["gender"], len(variants[item]), views[item])
        for (item, text, color), row in first_rows.items()
    ]


def build_prompts(
    strategy: Strategy, items: Sequence[ItemText], count_tokens: CountTokens, limit: int = 77
) -> dict[str, str]:
    """Item to prompt, never an empty one. An item given several times takes the first description it has.

    *raw*: "A clothing item in {color}. {description}" as it stands, of any length; without a colour it begins
    "A clothing item.", without a description it ends there.
    *clean*: raw with encodings and white space repaired, of any length; items with fewer than two views or without a
    description are left out.
    *structured*: at most `limit` tokens. A lead of gender, category and the colour where it holds, then the whole
    sentences that say most in few tokens: one about the material and one about the shape before any others. Where the
    colour cannot hold, sentences that name it are left out as well.
    """
    merged = merge_items(items)
    count_tokens = lru_cache(maxsize=1 << 16)(count_tokens)  # "Hand wash cold." comes with many an item
    if strategy == "raw":
        return {item.item: _raw(item) for item in merged}
    repaired = [repair_item(item) for item in merged]
    if strategy == "clean":
        return {item.item: _raw(item) for item in repaired if item.num_views >= 2 and item.text}
    return {item.item: _structured(item, count_tokens, limit) for item in repaired}


def load_prompts(path: str | Path) -> dict[str, str]:
    """Item to prompt, from a JSON file as `save_prompts` writes it.

    Raises:
        UserError: the file is anything else.
    """
    try:
        pairs = json.loads(Folder(path).read_bytes().decode("utf-8-sig"), object_pairs_hook=_Pairs)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one with `clipfh prompts CATALOGUE --out {path}`") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); name a JSON file of item to prompt"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(pairs, _Pairs):
        raise UserError(f'{path}: must be one mapping of item to prompt, {{"id_00000001": "A prompt.", ...}}')
    prompts: dict[str, str] = {}
    for item, prompt in pairs:
        if item in prompts:
            raise UserError(f"{path}: item {item!r} stands there twice; keep one of the two")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{path}: the prompt of item {item!r} must be a text that is not empty")
        prompts[item] = prompt
    return prompts


def note_fit(prompts: Mapping[str, str], items: Collection[str], file: str) -> list[str]:
    """Notes on a file's prompts that are not for an item of the catalogue, and on items without a prompt.

    Raises:
        UserError: no prompt is for an item of the catalogue.
    """
    matches = prompts.keys() & set(items)
    if not matches:
        example = f"it names {next(iter(prompts), 'nothing')!r}, and an item is {next(iter(items))!r}"
        counts = f"none of its {len(prompts):,} prompts is of one of the {len(items):,} items here"
        raise UserError(f"{file}: {counts}: {_why_unlike(prompts, items) or example}: fix its names")
    strangers = sorted(prompts.keys() - matches)
    notes = [f"{file} has prompts for {len(matches):,} of {len(items):,} items"] if len(matches) < len(items) else []
    if strangers:
        notes.append(f"{len(strangers):,} names in {file} are no items here, e.g. {', '.join(strangers[:3])}")
    return notes


_LOST: dict[str, Callable[[str], str]] = {
    "have lost their leading zeros": lambda item: item.lstrip("0"),
    "differ in case, blanks or .0": lambda item: "".join(item.split()).casefold().removesuffix(".0"),
    "lack the folder": lambda item: item.rpartition("/")[2],
}
"""Ways in which names in a file of prompts may differ from items' ids, to the form that both then have in common."""


def _why_unlike(prompts: Iterable[str], items: Iterable[str]) -> str:
    """Why names that are meant as items' ids match none; empty where that can't be told."""
    for what, common in _LOST.items():
        items_by_form = {common(item): item for item in items}
        if match := next((name for name in prompts if common(name) in items_by_form), None):
            return f"its names {what}: {match!r} is {items_by_form[common(match)]!r} here"
    return ""


def tell_apart(prompt_of: Mapping[Any, Any], kind_of: Mapping[Any, Any]) -> Literal["items", "kinds", "nothing"]:
    """What the prompts of items tell apart.

    Args:
        prompt_of: item to prompt.
        kind_of: item to its category and gender.

    Returns:
        "nothing" where all items have the same prompt, "kinds" where items of one kind do.
    """
    distinct = set(prompt_of.values())
    if len(prompt_of) > 1 and len(distinct) == 1:
        return "nothing"
    pairs = {(kind_of[item], prompt) for item, prompt in prompt_of.items()}
    is_of_kind = len(pairs) == len({kind for kind, _ in pairs}) < len(prompt_of)
    return "kinds" if is_of_kind else "items"


def save_prompts(path: str | Path, prompts: Mapping[str, str]) -> None:
    """Write the prompts as UTF-8 JSON, one item a line, sorted by item.

    Raises:
        UserError: the file can't be written, or holds other prompts.
    """
    if Folder(path).is_file() and load_prompts(path) != prompts:
        raise UserError(f"{path}: holds other prompts, perhaps edited by hand; name another file or delete it")
    write_json(path, dict(sorted(prompts.items())))


def write_json(path: str | Path, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    try:
        Folder(path).write("", text + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists") from None


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its repeated keys, which a dict would swallow."""


def merge_items(items: Iterable[ItemText]) -> list[ItemText]:
    """One ItemText an item: its first with a description. Each colour counts as a variant."""
    rows: dict[str, list[ItemText]] = {}
    for item in items:
        rows.setdefault(item.item, []).append(item)
    merged = []
    for same in rows.values():
        first = next((item for item in same if item.text.strip()), same[0])
        num_colors = len({repair(item.color).lower() for item in same if item.color.strip()})
        variants = max(*(item.num_variants for item in same), num_colors)
        merged.append(replace(first, num_variants=variants, num_views=max(item.num_views for item in same)))
    return merged


def repair_item(item: ItemText) -> ItemText:
    color, category, gender = (repair(text).replace("\n", " ") for text in (item.color, item.category, item.gender))
    return replace(item, text=repair(item.text), color=color, category=category, gender=gender)


def _raw(item: ItemText) -> str:
    description = " ".join(line for line in map(str.strip, item.text.split("\n")) if line)
    color = item.color.strip()
    return f"A clothing item{f' in {color}' if color else ''}. {description}".strip()


def is_known_color(color: str) -> bool:
    return color.lower() not in {"", "unknown", "none", "n/a", "na", "-"}


# The words that tell one garment from another. A word also counts with an ending, as in "pleated" or "neckline".
_MATERIAL = """
    cotton rayon polyester spandex elastane nylon linen silk satin wool cashmere acrylic viscose modal lyocell tencel
    denim chambray leather suede fur shearling fleece velvet corduroy lace mesh chiffon crochet knit jersey terry
    ribbed tweed twill canvas poplin flannel tulle organza crepe georgette gauze sequin metallic woven
"""
_SHAPE = """
    dress gown romper jumpsuit tunic kimono poncho cape cardigan sweater sweatshirt hoodie pullover jacket blazer coat
    parka trench bomber anorak vest top tee t-shirt shirt blouse henley polo tank cami camisole bodysuit bralette
    skirt skort short pant trouser jean legging jogger chino culotte overall suit tight boot sneaker sandal hat
    maxi midi mini knee cropped crop longline hi-low high-low a-line shift bodycon peplum skater wrap boxy slouchy
    oversized fitted relaxed loose slim skinny straight flared flare bootcut wide-leg boyfriend tapered tailored
    waisted waistband high-rise mid-rise low-rise
    v-neck neck crewneck turtleneck cowl scoop halter strapless shoulder racerback backless collar collared lapel
    hood hooded sleeve sleeved sleeveless strap spaghetti dolman raglan cuff
"""
_DETAIL = """
    stripe striped plaid gingham checked checkered houndstooth floral paisley polka-dot print graphic camo leopard
    zebra tribal tie-dye ombre marled heather abstract geometric embroider embroidered bead beaded
    sheer lightweight cutout button zip zipper drawstring belt pocket fringe ruffle pleat ruched shirred tiered gathered
    asymmetrical scallop distressed faded quilted padded lined unlined studded elastic elasticized keyhole slit yoke
    panel trim hem
"""
_OWED = (frozenset(_MATERIAL.split()), frozenset(_SHAPE.split()))
_TELLING = sorted(map(re.escape, f"{_MATERIAL} {_SHAPE} {_DETAIL}".split()), key=len, reverse=True)
_TELLING_WORD = re.compile(rf"\b({'|'.join(_TELLING)})(?:s|es|ed|y|line)?\b")
_MEASURE = re.compile(r"\d[\d./]*\s*(?:[\"”″]|''|cm\b|inch(?:es)?\b)[^,;.]*")
_CARE = re.compile(r"\b(?:wash|dry clean|tumble|iron|imported|made in|measured from|usa|model (?:is|wears))\b")

_ABBREVIATIONS = ("[A-Z]", "Dr", "Mr", "Ms", "St", "No", "vs", "approx")
_SENTENCE_END = re.compile(
    r"\n|(?<=[。！？])|(?:(?<=[.!?])|(?<=[.!?][\"”’)]))"
    + "".join(rf"(?<!\b{abbreviation}\.)" for abbreviation in _ABBREVIATIONS)
    + r"\s+(?=[^\sa-z])"
)
_CLAUSE_END = re.compile(r"(?<=[,;])\s+|(?<=[，；、])(?!$)")


def _structured(item: ItemText, count_tokens: CountTokens, limit: int) -> str:
    """The lead, then the sentences with most new telling words a token, in their original order.

    One sentence about the material and one about the shape are chosen before any others.
    """
    prompt = lead = next(lead for lead in _leads(item) if count_tokens(lead) <= limit)
    room = limit + 2 - count_tokens(lead)  # each count has its own start and end
    pool = _sentences(item, fits=lambda sentence: count_tokens(sentence) <= room)
    words = {sentence: _telling(sentence) for sentence in pool}
    rest, sentences, used_words, missing_kinds = list(pool), set[str](), _telling(lead), set(_OWED)
    while rest:
        best = max(
            rest,
            key=lambda s: (
                any(words[s] & kind for kind in missing_kinds),
                len(words[s] - used_words) / count_tokens(s),
                len(words[s]),
            ),
        )
        rest.remove(best)
        longer = " ".join([lead, *(sentence for sentence in pool if sentence in sentences or sentence == best)])
        if count_tokens(best) <= room and count_tokens(longer) <= limit:
            prompt, sentences, used_words = longer, sentences | {best}, used_words | words[best]
            missing_kinds = {kind for kind in missing_kinds if not words[best] & kind}
            room = limit + 2 - count_tokens(longer)
    return prompt


def _leads(item: ItemText) -> list[str]:
    """Opening sentences, from the fullest to one that always fits."""
    gender = {"men": "men's", "women": "women's"}.get(item.gender.lower(), item.gender.lower())
    category = item.category.replace("_", " ").strip().lower() or "clothing item"
    color = f" in {item.color}" if is_known_color(item.color) and item.num_variants == 1 else ""
    leads = [f"{gender} {category}{color}", f"{category}{color}", f"{gender} {category}", category, "clothing item"]
    return [_stop(lead[:1].upper() + lead[1:]) for lead in map(str.strip, leads)]


def _sentences(item: ItemText, fits: Callable[[str], bool]) -> list[str]:
    """The distinct sentences worth a place, each of a length that fits and ending in a stop."""
    false_colors = [] if item.num_variants == 1 else _color_names(item.color)
    sentences = []
    for sentence in (piece for whole in _SENTENCE_END.split(item.text) for piece in _pieces(whole, fits)):
        misleads = any(re.search(rf"\b{re.escape(color)}\b", sentence.lower()) for color in false_colors)
        if not misleads and (_telling(sentence) or not _is_small_print(sentence)):
            sentences.append(sentence)
    return list(dict.fromkeys(sentences))


def _color_names(color: str) -> list[str]:
    """The names in a compound colour, without names of materials ("Denim")."""
    names = (name.strip() for name in re.split(r"[/,&+]|(?<!\boff)-| and ", color.lower()))
    return [name for name in names if is_known_color(name) and not _TELLING_WORD.fullmatch(name)]


def _pieces(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """A sentence; if it does not fit, its clauses; of a clause that does not fit, stretches of words that do."""
    if not re.search(r"\w", sentence):
        return []
    if fits(_stop(sentence)):
        return [_stop(sentence)]
    clauses = _CLAUSE_END.split(sentence)
    if len(clauses) > 1:
        return [piece for clause in clauses for piece in _pieces(clause, fits)]
    words = sentence.split()
    ends = range(1, len(words) + 1)
    num = bisect_right(ends, False, key=lambda end: not fits(_stop(" ".join(words[:end]))))
    stretch = [_stop(" ".join(words[:num]))] if num else []
    return stretch + _pieces(" ".join(words[max(num, 1) :]), fits)  # a word that does not fit by itself is left out


def _stop(sentence: str) -> str:
    sentence = sentence.rstrip(" ,;:，；、")
    return sentence if re.search(r"[.!?。！？][\"”’)]*$", sentence) else f"{sentence}."


def _telling(sentence: str) -> set[str]:
    return set(_TELLING_WORD.findall(_MEASURE.sub(" ", sentence.lower())))


def _is_small_print(sentence: str) -> bool:
    return bool(_MEASURE.search(sentence.lower()) or _CARE.search(sentence.lower()))
