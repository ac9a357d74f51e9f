"""Prompts that fit a model's text tower: the prompts of an experiment, and a review of a catalogue's texts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfh.config.experiment import Experiment, ModelSettings
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.data.prompts import CountTokens, ItemText, Strategy, build_prompts, item_texts, load_prompts, note_fit
from clipfh.data.splits import SPLITS
from clipfh.data.text_report import examine_texts
from clipfh.model import architecture as architectures
from clipfh.model.clip import load_tokenizer, make_token_counter


def load_prompts_for(catalogue: Catalogue, experiment: Experiment, tokenizer: Any, *splits: str) -> dict[str, str]:
    """Item to prompt: from the experiment's file, or made from the texts of the items of some splits.

    The model's `tokenizer` measures their lengths.
    """
    if experiment.text.file:
        return load_prompts(experiment.text.file)
    return build_prompts(experiment.text.strategy, _texts(catalogue, splits), *_tokens(tokenizer))


def notes_on_prompts(catalogue: Catalogue, experiment: Experiment) -> list[str]:
    """Notes on how the experiment's file of prompts, if it has one, fits the catalogue's items.

    Raises:
        UserError: it can't be read, or has no prompt for any of these items.
    """
    if not experiment.text.file:
        return []
    ids = [catalogue.columns(split, ["item_id"])["item_id"].unique().to_pylist() for split in SPLITS]
    items = dict.fromkeys(itertools.chain.from_iterable(ids))
    return note_fit(load_prompts(experiment.text.file), items, experiment.text.file)


@dataclass(frozen=True)
class CatalogueTexts:
    """All texts of a catalogue, with the token counter of a model."""

    texts: list[ItemText]
    tokens: tuple[CountTokens, int]
    """a function that counts the tokens of a text, and the number of tokens that the model reads"""

    def report(self) -> dict[str, Any]:
        """Findings on consistency and length, as `examine_texts` has them."""
        return examine_texts(self.texts, *self.tokens)

    def prompts(self, strategy: Strategy) -> dict[str, str]:
        """Item to prompt."""
        return build_prompts(strategy, self.texts, *self.tokens)


def read_texts(catalogue: Catalogue | str | Path, model: str) -> CatalogueTexts:
    """Read the texts of a catalogue; `model` is the name of the model whose tokenizer counts.

    Raises:
        UserError: no such catalogue or model.
    """
    tokenizer = load_tokenizer(architectures.find(ModelSettings(name=model)))
    return CatalogueTexts(_texts(open_catalogue(catalogue), SPLITS), _tokens(tokenizer))


def _texts(catalogue: Catalogue, splits: tuple[str, ...]) -> list[ItemText]:
    return item_texts(row for split in splits for row in catalogue.stream_rows(split))


def _tokens(tokenizer: Any) -> tuple[CountTokens, int]:
    """A function that counts the tokens of a text, and how many tokens the model reads."""
    return make_token_counter(tokenizer), tokenizer.context_length
