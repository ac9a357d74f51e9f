"""Texts of a catalogue set right: HTML, characters that were read in the wrong encoding, and white space."""

import html
import re
from difflib import SequenceMatcher

import ftfy

_HANZI = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]+")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_LOST = re.compile("[\ufffd鈥鈩]")  # what is left of a character, or of a sign like ’ or ™, that lost a byte

# What a run of hanzi may stand for
_PUNCTUATION = re.compile(r"[’‘“”–—•™][\x20-\x7e]")  # the last byte of three swallowed the next character
_LETTERS = re.compile(r"[À-ÖØ-öø-ſ]+")
_MARKS = re.compile(r"[À-ÖØ-öø-ſ]*[®©]")
_NUMERALS = re.compile(r"[°¼½¾]")


_BLOCKS = """p div ul ol li br hr h1 h2 h3 h4 h5 h6 table tr tbody thead tfoot dl dt dd section article header footer
    blockquote pre figure figcaption main nav"""
_INLINE = """a abbr b big center code em font i iframe img input label mark meta link s small span strike strong sub sup
    svg path td th u video source picture button form html body o:p tt wbr"""
_DROPPED = re.compile(
    r"<(script|style|head)\b.*?</\1\s*>|<!--.*?-->|<!doctype[^>]*>|<!\[CDATA\[|\]\]>", re.DOTALL | re.I
)
_BLOCK = re.compile(rf"</?(?:{'|'.join(_BLOCKS.split())})(?:\s[^<>]*|\s*/)?>", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{'|'.join(_INLINE.split())})(?:\s[^<>]*|\s*/)?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]\w{1,30});", re.IGNORECASE)


def repair(text: str) -> str:
    """Repair encodings and white space, and strip HTML. Lines stay lines, but a carriage return becomes a blank."""
    lines = (" ".join(line.split()) for line in _lines(_decode(_strip_html(text))))
    return "\n".join(line for line in lines if line)


def _strip_html(text: str) -> str:
    """The text without the tags and entities of HTML, also where they were escaped. A block becomes lines of its own.

    Only HTML's own tags and whole entities are stripped: "a < b", "<3" and "R&D" stay.
    """
    for _ in range(3):  # HTML that was escaped, perhaps twice, is HTML again
        stripped = _TAG.sub("", _BLOCK.sub("\n", _DROPPED.sub("", text))) if "<" in text else text
        stripped = _ENTITY.sub(lambda entity: html.unescape(entity[0]), stripped) if "&" in stripped else stripped
        if stripped == text:
            break
        text = stripped
    return text


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
    """The text whose UTF-8 bytes read as this run of hanzi in GBK; empty if there is none."""
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


def list_repairs(text: str) -> list[str]:
    """The repairs that `repair` makes in a text, in words."""
    plain = _strip_html(text)
    repairs = ["HTML"] if plain != text else []
    text, old, new = plain, plain.split(), _decode(plain).split()
    changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if old != new else []
    repairs += [f"{' '.join(old[a:b])} → {' '.join(new[c:d])}" for kind, a, b, c, d in changes if kind != "equal"]
    repairs += ["carriage return"] if "\r" in text else []
    return repairs + (["white space"] if any(line.strip() != " ".join(line.split()) for line in _lines(text)) else [])


def suspect_words(text: str) -> list[str]:
    """Words of a repaired text that may still be broken: characters lost, or hanzi that could be Latin letters."""
    signs = (_PUNCTUATION, _LETTERS, _MARKS, _NUMERALS)
    return [
        word
        for word in text.split()
        if _LOST.search(word) or any(sign.fullmatch(_from_gbk(run)) for run in _HANZI.findall(word) for sign in signs)
    ]
