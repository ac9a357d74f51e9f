"""Warnings about a report's metrics, in words: a loss that has collapsed or is at its floor, a model no better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

ALIKE = 0.99
"""Mean cosine of images of different items above which all embeddings count as alike."""

NEAR = 0.02
"""Share of the way from collapse value to floor within which a loss counts as being at either end."""

FAIR_TRIAL = 1000
"""Number of steps after which a model should be better than at the start."""


def find_warnings(report: Mapping[str, float], terms: list[str]) -> list[str]:
    """Return the warnings about a report from after the warm-up; an empty list where all is well.

    Args:
        report: `loss_TERM` of each term; `floor_TERM` and `collapse_TERM` of each term with bounds; `image_cosine`,
            the mean cosine of images of different items; `val_mAP`, `start_val_mAP`, `step`.
        terms: names of the active terms.
    """
    return [
        *_embeddings_alike(report, terms),
        *(w for term in terms for w in _term_at_an_end(report, term)),
        *_not_better(report),
    ]


def _embeddings_alike(report: Mapping[str, float], terms: list[str]) -> Iterator[str]:
    if report["image_cosine"] > ALIKE:
        other = "" if "supcon" in terms else ", or loss.supcon, which pushes items apart"
        yield (
            f"{' + '.join(terms)} has collapsed: all embeddings alike (images of different items have a mean cosine of "
            f"{report['image_cosine']:.3f}); try a lower optimizer.lr{other}"
        )


def _term_at_an_end(report: Mapping[str, float], term: str) -> Iterator[str]:
    if f"floor_{term}" not in report:
        return
    loss, floor, collapse = (report[f"{name}_{term}"] for name in ("loss", "floor", "collapse"))
    way = (collapse - loss) / max(collapse - floor, 1e-9)
    if abs(way) < NEAR and report["image_cosine"] <= ALIKE:
        yield (
            f"{term} is {loss:.3f}, no better than with equal embeddings ({collapse:.3f}): this term has taught "
            "nothing so far; try another optimizer.lr, or a longer budget"
        )
    if way > 1 - NEAR:
        yield (
            f"{term} is {loss:.3f}, at its floor ({floor:.3f}): these batches teach nothing more; "
            "try larger ones (batch.items), or harder ones (batch.categories 4)"
        )


def _not_better(report: Mapping[str, float]) -> Iterator[str]:
    if report["step"] >= FAIR_TRIAL and "val_mAP" in report and report["val_mAP"] <= report["start_val_mAP"]:
        yield (
            f"val mAP {report['val_mAP']:.3f} is not above the {report['start_val_mAP']:.3f} that training started "
            f"from, after {report['step']:,} steps; try a lower optimizer.lr"
        )
