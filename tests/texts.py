"""Texts of items, and what counts their tokens."""

from dataclasses import replace

from open_clip.tokenizer import SimpleTokenizer

from clipfh.data.prompts import ItemText, build_prompts

TOKENIZER = SimpleTokenizer()


def count_tokens(text: str) -> int:
    return len(TOKENIZER.encode(text)) + 2


def an_item(text: str = "", **fields) -> ItemText:
    plain = ItemText("id_1", text, color="Red", category="Dresses", gender="WOMEN", num_variants=1, num_views=4)
    return replace(plain, **fields)


def prompt_of(item: ItemText, strategy: str = "structured", limit: int = 77) -> str:
    return build_prompts(strategy, [item], count_tokens, limit)[item.item]


IN_SHOP = (
    "Busy mornings and stacked calls are no match for this throw-on-and-go number! Its boxy silhouette and ultra-soft "
    "knit fabrication will have you taking on the day in breezy comfort, while a scoop back lends it some unexpected "
    "sartorial side-eye. Plus, you can just as easily take it from the desk to wherever the night is going to end.\n"
    "Semi-sheer, lightweight\n95% rayon, 5% spandex\n"
    '30.5" full length, 42" chest, 40" waist, 8" sleeve length\nMeasured from Small\nHand wash cold'
)
