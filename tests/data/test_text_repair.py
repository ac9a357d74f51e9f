import pytest
from texts import an_item, count_tokens, prompt_of

from clipfh.data.text_report import examine_texts


@pytest.mark.parametrize("letter", [chr(code) for code in range(0xC0, 0x100) if code not in (0xD7, 0xF7)])
def test_every_accented_letter_within_a_word_is_repaired(letter):
    right = f"A caf{letter} racer, {letter}lan{letter}s and 30° in Lycra®."
    for encoding in ["gbk"] if letter in "ÂÃ" else ["gbk", "latin-1"]:  # these two are also what mojibake begins with
        assert prompt_of(an_item(right.encode().decode(encoding)), "clean") == f"A clothing item in Red. {right}"


GENUINE = [
    "A café racer with appliqué, £5, ½ price, 20° off; it’s “naïve” – Ærø™",
    "中文连衣裙，纯棉",
    "茅台 red",
    "A thatched hut (茅庐) print",
    "鹿 print, 3路, Nike鹿",
    "T恤 with a caf茅 print",  # broken, but real Chinese stands beside it
    "モデル茅a",
    *(f"The sign {chr(code).encode().decode('gbk')} on it" for code in range(0xA1, 0x100)),
]


@pytest.mark.parametrize("text", GENUINE)
def test_genuine_text_is_never_touched(text):
    assert prompt_of(an_item(text), "clean") == f"A clothing item in Red. {text}"
    assert examine_texts([an_item(text)], count_tokens)["repaired"] == {}
