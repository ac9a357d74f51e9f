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


HTML = {
    '<div class="rte"><p style="margin:0">Soft dress no. 3 &amp; belt.</p><ul><li>V-neck</li></ul></div>': (
        "Soft dress no. 3 & belt. V-neck"
    ),
    "Two<br/>lines&nbsp;of <b>bold</b>ness&#33;": "Two lines of boldness!",
    "&lt;p&gt;Caf&amp;eacute; racer&lt;/p&gt;": "Café racer",
    "<style>p {color: red}</style><!-- note -->Warm.<script>go()</script>": "Warm.",
    "<P>Caf\u8305 <A HREF='x'>racer</A>": "Café racer",
}


@pytest.mark.parametrize("text", HTML)
def test_html_is_stripped_and_counted_under_repaired(text):
    assert prompt_of(an_item(text), "clean") == f"A clothing item in Red. {HTML[text]}"
    assert examine_texts([an_item(text)], count_tokens)["repaired"]["id_1"][0] == "HTML"


@pytest.mark.parametrize("text", ["a < b > c", "I <3 it", "size <M>", "R&D & more", "AT&T; cut", "&copy 5", "<w> 30"])
def test_what_only_looks_like_html_stays(text):
    assert prompt_of(an_item(text), "clean") == f"A clothing item in Red. {text}"
