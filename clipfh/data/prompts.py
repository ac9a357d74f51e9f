"""Descriptions to prompts: what is odd in the texts of a catalogue, and what of them fits the text tower.

A prompt belongs to an item, not to an image. `build` makes one for each by one of three strategies, `report` tells what
is wrong with the texts it starts from, and `save_prompts` writes a file that can be edited by hand and trained on.
The tokenizer comes in as `count_tokens`, which counts the start and end tokens too.
"""

import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any, Literal, get_args

import ftfy

from clipfh import UserError

Strategy = Literal["raw", "clean", "structured"]
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class ItemText:
    """The text of one item, as its catalogue gives it. Any field of text may be empty."""

    item: str
    text: str
    """Description: paragraphs, one a line."""
    color: str
    category: str
    gender: str
    num_variants: int
    """Colour variants with images: the one colour of the text holds only where there is one."""
    num_views: int
    """Images of the item."""


def item_texts(rows: Iterable[Mapping[str, Any]]) -> list[ItemText]:
    """The texts of the items of a catalogue, from its rows: an ItemText for each text and colour that an item has."""
    found: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    variants: dict[str, set[str]] = defaultdict(set)
    views: Counter[str] = Counter()
    for row in rows:
        item = row["item_id"]
        found.setdefault((item, row["text"], row["color"]), row)
        variants[item].add(row["variant"])
        views[item] += 1
    return [
        ItemText(item, text, color, row["category"], row["gender"], len(variants[item]), views[item])
        for (item, text, color), row in found.items()
    ]


def build(strategy: Strategy, items: Sequence[ItemText], count_tokens: CountTokens, limit: int = 77) -> dict[str, str]:
    """Item to prompt, never an empty one. An item given several times takes the first description it has.

    *raw*: "A clothing item in {color}. {description}" as it stands, of any length; without a colour it begins
    "A clothing item.", without a description it ends there.
    *clean*: raw with encodings and white space repaired, of any length; items with fewer than two views or without a
    description are left out.
    *structured*: at most `limit` tokens. A lead of gender, category and the colour where it holds, then the whole
    sentences that say most in few tokens: one about the material and one about the shape before any others. Where the
    colour cannot hold, sentences that name it are left out as well.
    """
    merged = _merge(items)
    count_tokens = lru_cache(maxsize=1 << 16)(count_tokens)  # "Hand wash cold." comes with many an item
    if strategy == "raw":
        return {item.item: _raw(item) for item in merged}
    repaired = [_repaired(item) for item in merged]
    if strategy == "clean":
        return {item.item: _raw(item) for item in repaired if item.num_views >= 2 and item.text}
    return {item.item: _structured(item, count_tokens, limit) for item in repaired}


def load_prompts(path: str | Path) -> dict[str, str]:
    """Item to prompt from a JSON file as `save_prompts` writes it; UserError where it is anything else."""
    try:
        pairs = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_Pairs)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one with `clipfh prompts CATALOGUE --out {path}`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a JSON file of item to prompt") from None
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


def save_prompts(path: str | Path, prompts: Mapping[str, str]) -> None:
    """Writes the prompts as UTF-8 JSON, one item a line, sorted by item; never over a file that holds other prompts."""
    if Path(path).is_file() and load_prompts(path) != prompts:
        raise UserError(f"{path}: holds other prompts, perhaps edited by hand; name another file or delete it")
    _write(path, dict(sorted(prompts.items())))


def save_report(path: str | Path, findings: Mapping[str, Any]) -> None:
    """Writes what `report` found as UTF-8 JSON."""
    _write(path, dict(findings))


def _write(path: str | Path, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists") from None


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its repeated keys, which a dict would swallow."""


# What the texts are like


def report(items: Sequence[ItemText], count_tokens: CountTokens, limit: int = 77) -> dict[str, Any]:
    """Findings on the texts, ready for JSON; items are named by their ids, in the order given.

    An item may be given several times, with a text each. Keys: `items`; `empty`; `repaired` (item to its repairs);
    `suspect` (item to words that look broken but cannot be repaired with certainty); `shared` (a text and the items
    that share it); `several_texts` (item to its texts); `color_cannot_hold` (item to the colour it is given, where it
    has several variants); `too_few_views` (fewer than two); `limit`; `tokens` (strategy to the number of prompts, the
    median and largest number of tokens, and the share of prompts over the limit).
    """
    merged = _merge(items)
    repaired = {item.item: _repaired(item) for item in merged}
    texts = _group((item.item, _repair(item.text)) for item in items)
    owners = _group((text, name) for name, own in texts.items() for text in own if text)
    return {
        "items": len(merged),
        "empty": [name for name, item in repaired.items() if not item.text],
        "repaired": _group(
            (item.item, how) for item in items for text in (item.color, item.text) for how in _repairs(text)
        ),
        "suspect": {
            name: words for name, item in repaired.items() if (words := _suspects(f"{item.color} {item.text}"))
        },
        "shared": [{"text": text, "items": own} for text, own in owners.items() if len(own) > 1],
        "several_texts": {name: own for name, own in texts.items() if len(own) > 1},
        "color_cannot_hold": {
            name: item.color for name, item in repaired.items() if _is_known(item.color) and item.num_variants != 1
        },
        "too_few_views": [name for name, item in repaired.items() if item.num_views < 2],
        "limit": limit,
        "tokens": {
            strategy: _lengths(build(strategy, items, count_tokens, limit).values(), count_tokens, limit)
            for strategy in get_args(Strategy)
        },
    }


_FINDINGS = {
    "empty": "without a description",
    "repaired": "repaired in clean and structured",
    "suspect": "suspect words, left as they are",
    "several_texts": "with several texts",
    "color_cannot_hold": "colour cannot hold for all variants",
    "too_few_views": "with fewer than two views",
}


def format_report(findings: Mapping[str, Any], examples: int = 3) -> str:
    """The findings of `report` for a terminal: a line each with its count and the first `examples`."""
    lines = [f"Texts of {findings['items']:,} items"]
    for key, label in _FINDINGS.items():
        found = findings[key]
        shown = [_example(name, found) for name in list(found)[:examples]]
        lines.append(_finding(label, len(found), shown))
    owners = [group["items"] for group in findings["shared"][:examples]]
    shown = [" = ".join(own[:3] + ["..."] * (len(own) > 3)) for own in owners]
    lines.append(_finding("texts shared by several items", len(findings["shared"]), shown))
    lines += ["", f"Tokens, start and end included; {findings['limit']} fit"]
    lines.append(f"  {'strategy':<12}{'prompts':>9}{'median':>9}{'longest':>9}{'too long':>10}")
    for strategy, row in findings["tokens"].items():
        cells = f"{row['prompts']:>9,}{row['median']:>9g}{row['max']:>9}{row['over_limit']:>10.1%}"
        lines.append(f"  {strategy:<12}{cells}")
    return "\n".join(lines)


def _finding(label: str, count: int, shown: Sequence[str]) -> str:
    rest = ", ..." if count > len(shown) else ""
    return f"  {label:<36}{count:>8,}   {', '.join(shown)}{rest}".rstrip()


def _example(name: str, found: Sequence[str] | Mapping[str, Any]) -> str:
    if not isinstance(found, Mapping):
        return name
    detail = found[name] if isinstance(found[name], str) else "; ".join(found[name])
    return f"{name} ({shorten(detail, 40, placeholder=' ...')})"


def _lengths(prompts: Iterable[str], count_tokens: CountTokens, limit: int) -> dict[str, float]:
    lengths = [count_tokens(prompt) for prompt in prompts]
    return {
        "prompts": len(lengths),
        "median": median(lengths) if lengths else 0,
        "max": max(lengths, default=0),
        "over_limit": sum(length > limit for length in lengths) / max(len(lengths), 1),
    }


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Key to its distinct values, both in the order of first sight."""
    groups: dict[str, dict[str, None]] = {}
    for key, value in pairs:
        groups.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in groups.items()}


def _merge(items: Iterable[ItemText]) -> list[ItemText]:
    """One ItemText an item: its first with a description; several colours count as so many variants."""
    rows: dict[str, list[ItemText]] = {}
    for item in items:
        rows.setdefault(item.item, []).append(item)
    merged = []
    for same in rows.values():
        first = next((item for item in same if item.text.strip()), same[0])
        num_colors = len({_repair(item.color).lower() for item in same if item.color.strip()})
        variants = max(*(item.num_variants for item in same), num_colors)
        merged.append(replace(first, num_variants=variants, num_views=max(item.num_views for item in same)))
    return merged


# Repair

_HANZI = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]+")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_LOST = re.compile("[\ufffd鈥鈩]")  # what is left of a character, or of a sign like ’ or ™, that lost a byte

# What a run of hanzi may stand for
_PUNCTUATION = re.compile(r"[’‘“”–—•™][\x20-\x7e]")  # the last byte of three swallowed the next character
_LETTERS = re.compile(r"[À-ÖØ-öø-ſ]+")
_MARKS = re.compile(r"[À-ÖØ-öø-ſ]*[®©]")
_NUMERALS = re.compile(r"[°¼½¾]")


def _repaired(item: ItemText) -> ItemText:
    color, category, gender = (_repair(text).replace("\n", " ") for text in (item.color, item.category, item.gender))
    return replace(item, text=_repair(item.text), color=color, category=category, gender=gender)


def _repair(text: str) -> str:
    """Encodings and white space set right; lines stay lines, but a carriage return is only a blank."""
    return "\n".join(line for line in (" ".join(line.split()) for line in _lines(_decode(text))) if line)


def _lines(text: str) -> list[str]:
    return re.sub(r"\r\n?", " ", text).split("\n")


def _decode(text: str) -> str:
    """UTF-8 that was read as Latin-1 or Windows-1252 (ftfy's part) or as GBK, read as UTF-8 where that is certain."""
    text = ftfy.fix_encoding(text)
    if _KANA_OR_HANGUL.search(text) or any(
        not _from_gbk(run) and not _LOST.search(run) for run in _HANZI.findall(text)
    ):
        return text  # there is real Chinese, Japanese or Korean here: nothing is certain
    return _HANZI.sub(_decode_run, text)


def _from_gbk(run: str) -> str:
    """The UTF-8 that GBK would show as this run of hanzi; empty if there is none."""
    try:
        return run.encode("gbk").decode("utf-8")
    except UnicodeError:
        return ""


def _decode_run(match: re.Match[str]) -> str:
    """茅 is what GBK makes of é, and a word of its own too; but not in the middle of a Latin one."""
    fixed, before, after = _from_gbk(match[0]), match.string[: match.start()], match.string[match.end() :]
    certain = (
        _PUNCTUATION.fullmatch(fixed)  # three bytes that are one sign in UTF-8 are no coincidence
        or (_LETTERS.fullmatch(fixed) and (before[-1:].isalpha() or after[:1].isalpha()))
        or (_MARKS.fullmatch(fixed) and before[-1:].isalnum())
        or (_NUMERALS.fullmatch(fixed) and re.search(r"\d ?$", before))
    )
    return fixed if certain else match[0]


def _repairs(text: str) -> list[str]:
    """What `_repair` does to a text, in words."""
    old, new = text.split(), _decode(text).split()
    changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if old != new else []
    repairs = [f"{' '.join(old[a:b])} → {' '.join(new[c:d])}" for kind, a, b, c, d in changes if kind != "equal"]
    repairs += ["carriage return"] if "\r" in text else []
    return repairs + (["white space"] if any(line.strip() != " ".join(line.split()) for line in _lines(text)) else [])


def _suspects(text: str) -> list[str]:
    """Words of a repaired text that may still be broken: characters lost, or hanzi that could be Latin letters."""
    signs = (_PUNCTUATION, _LETTERS, _MARKS, _NUMERALS)
    return [
        word
        for word in text.split()
        if _LOST.search(word) or any(sign.fullmatch(_from_gbk(run)) for run in _HANZI.findall(word) for sign in signs)
    ]


# Prompts


def _raw(item: ItemText) -> str:
    description = " ".join(line for line in map(str.strip, item.text.split("\n")) if line)
    color = item.color.strip()
    return f"A clothing item{f' in {color}' if color else ''}. {description}".strip()


def _is_known(color: str) -> bool:
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
    """The lead, then sentences by how many new telling words they add a token; those chosen stay in their order.

    First comes what is owed: a sentence about the material, and one about the shape.
    """
    prompt = lead = next(lead for lead in _leads(item) if count_tokens(lead) <= limit)
    room = limit + 2 - count_tokens(lead)  # each count has its own start and end
    pool = _sentences(item, fits=lambda sentence: count_tokens(sentence) <= room)
    words = {sentence: _telling(sentence) for sentence in pool}
    left, chosen, told, owed = list(pool), set[str](), _telling(lead), set(_OWED)
    while left:
        best = max(
            left,
            key=lambda s: (
                any(words[s] & kind for kind in owed),
                len(words[s] - told) / count_tokens(s),
                len(words[s]),
            ),
        )
        left.remove(best)
        longer = " ".join([lead, *(sentence for sentence in pool if sentence in chosen or sentence == best)])
        if count_tokens(best) <= room and count_tokens(longer) <= limit:
            prompt, chosen, told = longer, chosen | {best}, told | words[best]
            owed = {kind for kind in owed if not words[best] & kind}
            room = limit + 2 - count_tokens(longer)
    return prompt


def _leads(item: ItemText) -> list[str]:
    """Opening sentences, from the fullest to one that always fits."""
    gender = {"men": "men's", "women": "women's"}.get(item.gender.lower(), item.gender.lower())
    category = item.category.replace("_", " ").strip().lower() or "clothing item"
    color = f" in {item.color}" if _is_known(item.color) and item.num_variants == 1 else ""
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
    """The names in a compound colour, less those that are materials ("Denim")."""
    names = (name.strip() for name in re.split(r"[/,&+]|(?<!\boff)-| and ", color.lower()))
    return [name for name in names if _is_known(name) and not _TELLING_WORD.fullmatch(name)]


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
