import json
import re

import inshop
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import IN_SHOP, an_item, count_tokens, prompt_of

from clipfh import UserError
from clipfh.cli import main
from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.data.prompts import (
    _OWED,
    ItemText,
    _telling,
    build_prompts,
    item_texts,
    load_prompts,
    note_fit,
    save_prompts,
    tell_apart,
)
from clipfh.data.splits import SPLITS
from clipfh.data.text_report import examine_texts
from clipfh.model.architecture import find
from clipfh.model.clip import load_tokenizer
from clipfh.model.prompts import load_prompts_for


def words_of(text: str) -> set[str]:
    return {word.strip(".,;:!?'\"") for word in text.lower().split()} - {""}


PLAIN = ["soft", "cotton", "knit", "boxy", "weekend", "v-neck", "you'll", "pleated", "the", "print", "pocket", "of"]


BROKEN = [("appliqu茅d", "appliquéd"), ("Lycra庐", "Lycra®"), ("30掳", "30°"), ("cafÃ©", "café"), ("it鈥檚", "it’s")]


GAPS = [(" ", " "), ("  ", " "), ("\r\n", " "), (" \t", " ")]


COLORS = ["Black", "Black-cream", "Heather grey/black", "Off-white"]


words = st.one_of(
    st.sampled_from([(word, word) for word in PLAIN]),
    st.sampled_from([(color, color) for color in ("black", "cream")]),
    st.sampled_from(BROKEN),
    st.just(("uncharacteristically" * 20,) * 2),
)


@st.composite
def sentences(draw):
    drawn = draw(st.lists(st.tuples(words, st.sampled_from(["", ",", ";"]), st.sampled_from(GAPS)), max_size=120))
    stop = draw(st.sampled_from([".", "!", ""]))
    source = "".join(word[0] + comma + gap[0] for word, comma, gap in drawn)
    right = "".join(word[1] + comma + gap[1] for word, comma, gap in drawn)
    return "Here " + source.strip() + stop, "Here " + right.strip() + stop


@st.composite
def odd_items(draw):
    """An item and its text as it should read."""
    drawn = draw(st.lists(sentences(), max_size=6))
    glue = draw(st.sampled_from([" ", "\n", " \n\n"]))
    item = an_item(
        glue.join(source for source, _ in drawn),
        color=draw(st.sampled_from(COLORS)),
        category=draw(st.sampled_from(["Tees_Tanks", "Dresses", "Jackets_Coats"])),
        num_variants=draw(st.sampled_from([1, 2, 42])),
    )
    return item, " ".join(right for _, right in drawn)


@settings(max_examples=100, deadline=None)
@given(odd_items(), st.sampled_from([77, 40]))
def test_a_structured_prompt_fits_and_keeps_whole_words_and_what_matters(odd, limit):
    item, right = odd
    prompt = prompt_of(item, limit=limit)
    lead = f"Women's {item.category.replace('_', ' ').lower()}" + (f" in {item.color}" * (item.num_variants == 1))
    assert count_tokens(prompt) <= limit
    assert prompt.startswith(f"{lead}.")
    assert words_of(prompt) <= words_of(right) | words_of(lead)
    if item.num_variants > 1:
        names = [name for name in ("heather grey", "black", "cream", "off-white") if name in item.color.lower()]
        assert not any(re.search(rf"\b{name}\b", prompt.lower()) for name in names)


@settings(max_examples=50, deadline=None)
@given(odd_items())
def test_clean_is_the_text_set_right_to_the_letter(odd):
    item, right = odd
    expected = {} if not right else {item.item: f"A clothing item in {item.color}. {' '.join(right.split())}"}
    assert build_prompts("clean", [item], count_tokens) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_prompts_of_texts_like_those_of_in_shop_fit_and_say_what_matters(seed):
    entries = inshop.descriptions([f"id_{number:08d}" for number in range(200)], inshop.FULL.scaled(40), seed)
    texts = {entry["item"]: "\n".join(entry["description"]) for entry in entries}
    several = {entry["item"]: 1 + number % 3 for number, entry in enumerate(entries)}
    items = [
        an_item(texts[e["item"]], item=e["item"], color=e["color"], num_variants=several[e["item"]]) for e in entries
    ]
    raw, clean, prompts = (build_prompts(strategy, items, count_tokens) for strategy in ("raw", "clean", "structured"))
    assert max(map(count_tokens, raw.values())) > 200
    for item in items:
        prompt, text = prompts[item.item], item.text.lower()
        lead = "Women's dresses" + (f" in {item.color}" if item.num_variants == 1 else "")
        assert prompt.startswith(f"{lead}.") and count_tokens(prompt) <= 77
        assert words_of(prompt) <= words_of(clean.get(item.item, "")) | words_of(lead)
        told = [
            sentence
            for sentence in re.split(r"\n|(?<=[.!]) +", text)
            if not (several[item.item] > 1 and any(name in sentence for name in re.split("[-/]", item.color.lower())))
        ]
        for owed in _OWED:  # material and shape
            assert _telling(prompt.removeprefix(lead)) & owed or not any(_telling(sentence) & owed for sentence in told)


def test_the_telling_sentences_are_chosen_and_stay_in_their_order():
    assert count_tokens(prompt_of(an_item(IN_SHOP), "raw")) > 77
    assert prompt_of(an_item(IN_SHOP)) == (
        "Women's dresses in Red. Its boxy silhouette and ultra-soft knit fabrication will have you taking on the day "
        "in breezy comfort, while a scoop back lends it some unexpected sartorial side-eye. Semi-sheer, lightweight. "
        "95% rayon, 5% spandex."
    )


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "Cotton knit. Knit cotton. A very nice lace collar.",
            "Cotton knit. A very nice lace collar.",
        ),  # nothing twice
        ("Cotton that you will want to wear with lace. Silk hem. Boxy.", "Silk hem. Boxy."),  # more said a word
        ('Love it. Hand wash cold. 9" sleeve.', "Love it."),  # small print is never worth a place
    ],
)
def test_a_place_goes_to_what_says_something_new_in_few_words(text, kept):
    assert prompt_of(an_item(text), limit=18) == f"Women's dresses in Red. {kept}"


def test_the_length_that_counts_is_that_of_the_whole_prompt():
    def dear_joins(text: str) -> int:
        return 2 + len(text.split()) + 5 * text.count(". ")

    for limit, kept in [(19, "Lace hem. Silk."), (18, "Lace hem.")]:
        prompt = build_prompts("structured", [an_item("Lace hem. Silk.")], dear_joins, limit)["id_1"]
        assert prompt == f"Women's dresses in Red. {kept}" and dear_joins(prompt) <= limit


def test_the_first_description_of_an_item_is_taken_and_one_colour_of_two_cannot_hold():
    items = [an_item(" "), an_item("Boxy."), an_item("Slim.", color="Blue")]
    assert build_prompts("clean", items, count_tokens) == {"id_1": "A clothing item in Red. Boxy."}
    assert build_prompts("structured", items, count_tokens) == {"id_1": "Women's dresses. Boxy."}


def test_sentences_are_kept_whole_and_once():
    told = [f"This is the number {n} of many things that one can say about it." for n in range(12)]
    prompt = prompt_of(an_item(" ".join(told * 2)))
    kept = re.split(r"(?<=\.) ", prompt)[1:]
    assert 2 <= len(kept) == len(set(kept))
    assert set(kept) <= set(told)


def test_a_sentence_too_long_is_cut_at_clauses_and_only_then_between_words():
    chatter = "and so on it goes with very little to see"
    clauses = prompt_of(an_item(", ".join([chatter] * 9 + ["cut from brushed cotton", chatter]) + "."))
    assert "cut from brushed cotton." in clauses
    assert count_tokens(clauses) <= 77
    no_clause = prompt_of(an_item("brushed cotton " + "very " * 200))
    assert no_clause.startswith("Women's dresses in Red. brushed cotton very very")
    assert count_tokens(no_clause) == 77  # not a word less than fits


@pytest.mark.parametrize("end", "。；")
def test_sentences_and_clauses_without_blanks_are_cut_at_their_signs(end):
    parts = [f"这是第{number}件纯棉连衣裙" for number in "一二三四五六七八九"]
    prompt = prompt_of(an_item(end.join(parts) + end))
    kept = prompt.removeprefix("Women's dresses in Red. ").replace(".", "").replace("。", "").split()
    assert kept and set(kept) < set(parts)


@pytest.mark.parametrize(
    ("fields", "lead"),
    [
        ({}, "Women's dresses in Red."),
        ({"num_variants": 2}, "Women's dresses."),
        ({"color": "Unknown"}, "Women's dresses."),
        ({"color": "Dark\nred"}, "Women's dresses in Dark red."),
        ({"gender": "UNISEX", "category": "T-Shirt", "color": "D茅j脿 blue"}, "Unisex t-shirt in Déjà blue."),
        ({"gender": "", "category": "", "color": ""}, "Clothing item."),
        ({"color": "red and " * 50}, "Women's dresses."),
        ({"category": "very_" * 100}, "Clothing item."),
    ],
)
def test_the_lead_says_what_holds_and_is_there_without_a_description(fields, lead):
    prompt = prompt_of(an_item(**fields))
    assert prompt == lead
    assert count_tokens(prompt) <= 77


@pytest.mark.parametrize("color", ["Denim/rust", "Off-rust"])
def test_where_a_colour_cannot_hold_only_sentences_that_name_it_go(color):
    item = an_item(f"An off-the-shoulder denim top. Comes in {color} lace. Trusty.", color=color, num_variants=3)
    assert prompt_of(item) == "Women's dresses. An off-the-shoulder denim top. Trusty."


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"text": " Soft  knit\nCaf茅\n\nUSA "}, "A clothing item in Red. Soft  knit Caf茅 USA"),
        ({"text": "Soft.", "color": ""}, "A clothing item. Soft."),
        ({"text": ""}, "A clothing item in Red."),
        ({"text": " ", "color": " "}, "A clothing item."),
    ],
)
def test_raw_is_the_text_as_it_stands(fields, prompt):
    assert prompt_of(an_item(**fields), "raw") == prompt


def test_clean_leaves_out_items_with_one_view_or_no_description():
    items = [an_item("Soft.", item="a"), an_item("Soft.", item="b", num_views=1), an_item(" \r\n", item="c")]
    assert list(build_prompts("clean", items, count_tokens)) == ["a"]
    assert (
        list(build_prompts("raw", items, count_tokens))
        == list(build_prompts("structured", items, count_tokens))
        == ["a", "b", "c"]
    )


def test_saved_prompts_load_again_and_can_be_edited_by_hand(tmp_path):
    path = tmp_path / "prompts.json"
    save_prompts(path, {"id_2": "Caf\u00e9 \u8fde\u8863\u88d9.", "id_1": 'A "quoted" one.'})
    assert path.read_text(encoding="utf-8").splitlines()[2] == ' "id_2": "Café 连衣裙."'
    path.write_text(path.read_text(encoding="utf-8").replace("Café", "Silk"), encoding="utf-8-sig")
    assert load_prompts(path) == {"id_1": 'A "quoted" one.', "id_2": "Silk 连衣裙."}


def test_prompts_are_not_written_over_edited_ones(tmp_path):
    path = tmp_path / "prompts.json"
    save_prompts(path, {"a": "x"})
    save_prompts(path, {"a": "x"})
    path.write_text('{"a": "mine"}')
    with pytest.raises(UserError, match="holds other prompts, perhaps edited by hand"):
        save_prompts(path, {"a": "x"})
    assert load_prompts(path) == {"a": "mine"}


def test_the_texts_of_an_item_are_all_there():
    row = {"item_id": "a", "text": "Soft.", "color": "Red", "category": "Tees", "gender": "MEN", "variant": "01"}
    items = item_texts([row, row, row | {"text": "Boxy.", "variant": "02"}, row | {"item_id": "b", "text": ""}])
    assert items == [
        ItemText("a", "Soft.", "Red", "Tees", "MEN", num_variants=2, num_views=3),
        ItemText("a", "Boxy.", "Red", "Tees", "MEN", num_variants=2, num_views=3),
        ItemText("b", "", "Red", "Tees", "MEN", num_variants=1, num_views=1),
    ]
    assert examine_texts(items, count_tokens)["several_texts"] == {"a": ["Soft.", "Boxy."]}


def test_the_command_reports_and_writes_what_can_be_edited_and_trained_on(small_catalogue, tmp_path, capsys):
    out, found = tmp_path / "prompts.json", tmp_path / "report.json"
    words = ["prompts", small_catalogue.path, "--model", SMALL_MODEL, "--out", out, "--report", found]
    assert main.main([str(word) for word in words]) == 0
    assert capsys.readouterr().out.endswith(f"40 prompts: {out}\n")
    assert json.loads(found.read_text())["items"] == 40
    made = load_prompts(out)
    settings, tokenizer = {"model.name": SMALL_MODEL}, load_tokenizer(find(ModelSettings(name=SMALL_MODEL)))
    assert load_prompts_for(small_catalogue, presets.resolve("joint", None, settings), tokenizer, *SPLITS) == made
    edited = dict(made) | {min(made): "A prompt of mine."}
    out.write_text(json.dumps(edited))
    experiment = presets.resolve("joint", None, settings | {"text.file": str(out)})
    assert load_prompts_for(small_catalogue, experiment, tokenizer, *SPLITS) == edited
    assert main.main([str(word) for word in words]) == 2
    assert "holds other prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "x",}', "not JSON at line 1"),
        (b'["a"]', "one mapping"),
        (b'[["a", "x"]]', "one mapping"),
        (b'{"a": {"b": "c"}}', "item 'a'"),
        (b'{"a": "x", "b": " "}', "item 'b'"),
        (b'{"a": "x", "a": "y"}', "twice"),
        (b'{"a": "\xe9"}', "UTF-8"),
        (None, "no such file"),
    ],
)
def test_what_is_not_a_file_of_prompts_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        load_prompts(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_place_that_cannot_be_written_or_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        save_prompts(tmp_path / "missing" / "prompts.json", {"a": "x"})
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path)


def test_prompts_of_a_file_are_compared_with_the_items_of_a_catalogue():
    items = [f"0{number}" for number in range(6)]
    assert note_fit(dict.fromkeys(items, "A hat."), items, "p.json") == []
    assert note_fit({"00": "A hat.", "01": "A hat.", "9": "A cap."}, items, "p.json") == [
        "p.json has prompts for 2 of 6 items",
        "1 names in p.json are no items here, e.g. 9",
    ]


@pytest.mark.parametrize(
    ("item", "name", "said"),
    [
        ("0108775", "108775", "its names have lost their leading zeros: '108775' is '0108775' here"),
        ("SKU 1", "sku1", "its names differ in case, blanks or .0: 'sku1' is 'SKU 1' here"),
        ("7", "7.0", "its names differ in case, blanks or .0: '7.0' is '7' here"),
        ("shoes/boot", "boot", "its names lack the folder: 'boot' is 'shoes/boot' here"),
        ("boot", "hat", "it names 'hat', and an item is 'boot'"),
    ],
)
def test_why_no_prompt_of_a_file_is_of_an_item_is_told(item, name, said):
    with pytest.raises(UserError, match=f"none of its 1 prompts is of one of the 1 items here: {re.escape(said)}"):
        note_fit({name: "A hat."}, [item], "p.json")


@pytest.mark.parametrize(
    ("prompts", "kinds", "told"),
    [
        (["Clothing item."] * 3, "xyz", "nothing"),
        (["Hat.", "Hat.", "Shoe."], "xxy", "kinds"),
        (["Hat.", "Shoe."], "xy", "items"),
        (["Red hat.", "Hat.", "Hat."], "xxx", "items"),
        (["Hat."], "x", "items"),
    ],
)
def test_what_prompts_tell_apart_is_known(prompts, kinds, told):
    assert tell_apart(dict(enumerate(prompts)), dict(enumerate(kinds))) == told
