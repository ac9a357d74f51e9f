import json

from texts import IN_SHOP, an_item, count_tokens

from clipfh.data.prompts import build_prompts
from clipfh.data.text_report import examine_texts, format_findings


def test_report_finds_what_is_planted():
    items = [
        an_item("A caf茅  racer.\r\nSoft.", item="broken"),
        an_item("Same.", item="twin 1"),
        an_item("Same. ", item="twin 2"),
        an_item("", item="silent", color="Black-cream", num_variants=42),
        an_item("Lace.", item="double", num_views=1),
        an_item("Lace hem.", item="double", num_views=1, color="Blue"),
        an_item("\ufffdt is 茅 or Pima鈩? cotton, Polartec庐 too.", item="lost", color="", num_variants=2),
        an_item(IN_SHOP, item="long", color="Unknown", num_variants=2),
    ]
    found = examine_texts(items, count_tokens)
    tokens = found.pop("tokens")
    assert found == {
        "items": 7,
        "empty": ["silent"],
        "repaired": {
            "broken": ["caf茅 → café", "carriage return", "white space"],
            "lost": ["Polartec庐 → Polartec®"],
        },
        "suspect": {"lost": ["\ufffdt", "茅", "Pima鈩?"]},
        "shared": [{"text": "Same.", "items": ["twin 1", "twin 2"]}],
        "several_texts": {"double": ["Lace.", "Lace hem."]},
        "color_cannot_hold": {"silent": "Black-cream", "double": "Red"},
        "too_few_views": ["double"],
        "limit": 77,
    }
    raw = sorted(map(count_tokens, build_prompts("raw", items, count_tokens).values()))
    assert tokens["raw"] == {"prompts": 7, "median": raw[3], "max": raw[-1], "over_limit": 1 / 7}
    assert tokens["clean"]["prompts"] == 5
    assert tokens["structured"]["over_limit"] == 0 and tokens["structured"]["max"] <= 77
    assert json.loads(json.dumps({**found, "tokens": tokens})) == {**found, "tokens": tokens}


def test_the_report_reads_well_in_a_terminal():
    items = [an_item("Same.", item=f"id_{n}", num_variants=2) for n in range(1200)] + [an_item("", item="id_x")]
    lines = format_findings(examine_texts(items, count_tokens)).splitlines()
    assert lines[0] == "Texts of 1,201 items"
    assert "  without a description                      1   id_x" in lines
    assert "  colour cannot hold for all variants    1,200   id_0 (Red), id_1 (Red), id_2 (Red), ..." in lines
    assert "  texts shared by several items              1   id_0 = id_1 = id_2 = ..." in lines
    assert lines[-1].split() == ["structured", "1,201", "8", "8", "0.0%"]
    assert len({len(line) for line in lines[-4:]}) == 1


def test_a_report_without_items_is_a_report():
    assert "Texts of 0 items" in format_findings(examine_texts([], count_tokens))
