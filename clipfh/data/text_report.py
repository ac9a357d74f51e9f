"""Oddities in the texts of a catalogue, and the numbers of tokens of their prompts: as JSON, and for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any, get_args

from clipfh.data.prompts import (
    CountTokens,
    ItemText,
    Strategy,
    build_prompts,
    is_known_color,
    merge_items,
    repair_item,
    write_json,
)
from clipfh.data.text_repair import list_repairs, repair, suspect_words


def save_findings(path: str | Path, findings: Mapping[str, Any]) -> None:
    """Write what `examine_texts` found as UTF-8 JSON."""
    write_json(path, dict(findings))


def examine_texts(items: Sequence[ItemText], count_tokens: CountTokens, limit: int = 77) -> dict[str, Any]:
    """Findings on the texts, ready for JSON; items are named by their ids, in the order given.

    An item may be given several times, with a text each. Keys: `items`; `empty`; `repaired` (item to its repairs);
    `suspect` (item to words that look broken but cannot be repaired with certainty); `shared` (a text and the items
    that share it); `several_texts` (item to its texts); `color_cannot_hold` (item to the colour it is given, where it
    has several variants); `too_few_views` (fewer than two); `limit`; `tokens` (strategy to the number of prompts, the
    median and largest number of tokens, and the share of prompts over the limit).
    """
    merged = merge_items(items)
    repaired = {item.item: repair_item(item) for item in merged}
    texts = _group((item.item, repair(item.text)) for item in items)
    owners = _group((text, name) for name, own in texts.items() for text in own if text)
    return {
        "items": len(merged),
        "empty": [name for name, item in repaired.items() if not item.text],
        "repaired": _group(
            (item.item, how) for item in items for text in (item.color, item.text) for how in list_repairs(text)
        ),
        "suspect": {
            name: words for name, item in repaired.items() if (words := suspect_words(f"{item.color} {item.text}"))
        },
        "shared": [{"text": text, "items": own} for text, own in owners.items() if len(own) > 1],
        "several_texts": {name: own for name, own in texts.items() if len(own) > 1},
        "color_cannot_hold": {
            name: item.color for name, item in repaired.items() if is_known_color(item.color) and item.num_variants != 1
        },
        "too_few_views": [name for name, item in repaired.items() if item.num_views < 2],
        "limit": limit,
        "tokens": {
            strategy: _summarize_lengths(
                build_prompts(strategy, items, count_tokens, limit).values(), count_tokens, limit
            )
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


def format_findings(findings: Mapping[str, Any], examples: int = 3) -> str:
    """The findings of `examine_texts` for a terminal: a line each with its count and the first `examples`."""
    lines = [f"Texts of {findings['items']:,} items"]
    for key, label in _FINDINGS.items():
        items = findings[key]
        samples = [_example(name, items) for name in list(items)[:examples]]
        lines.append(_finding_line(label, len(items), samples))
    owners = [group["items"] for group in findings["shared"][:examples]]
    samples = [" = ".join(own[:3] + ["..."] * (len(own) > 3)) for own in owners]
    lines.append(_finding_line("texts shared by several items", len(findings["shared"]), samples))
    lines += ["", f"Tokens, start and end included; {findings['limit']} fit"]
    lines.append(f"  {'strategy':<12}{'prompts':>9}{'median':>9}{'longest':>9}{'too long':>10}")
    for strategy, row in findings["tokens"].items():
        cells = f"{row['prompts']:>9,}{row['median']:>9g}{row['max']:>9}{row['over_limit']:>10.1%}"
        lines.append(f"  {strategy:<12}{cells}")
    return "\n".join(lines)


def _finding_line(label: str, count: int, samples: Sequence[str]) -> str:
    rest = ", ..." if count > len(samples) else ""
    return f"  {label:<36}{count:>8,}   {', '.join(samples)}{rest}".rstrip()


def _example(name: str, items: Sequence[str] | Mapping[str, Any]) -> str:
    if not isinstance(items, Mapping):
        return name
    detail = items[name] if isinstance(items[name], str) else "; ".join(items[name])
    return f"{name} ({shorten(detail, 40, placeholder=' ...')})"


def _summarize_lengths(prompts: Iterable[str], count_tokens: CountTokens, limit: int) -> dict[str, float]:
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
