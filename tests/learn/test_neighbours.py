"""The table of nearest items, against a loop over pairs."""

import numpy as np
import torch

from clipfh.learn import neighbours
from clipfh.learn.neighbours import ItemNeighbours


def test_the_table_is_that_of_the_last_draws(monkeypatch):
    monkeypatch.setattr(neighbours, "NUM_SIMILARITIES", 3 * 40)  # three items at a time
    views, generator = 2, torch.Generator().manual_seed(0)
    table, latest = ItemNeighbours(40, 8), {}
    assert (table.table() == -1).all()
    for _ in range(9):
        item = torch.randperm(37, generator=generator)[:6]  # three are never drawn
        features = torch.randn(6 * views, 8, generator=generator)
        table.add(features, item.repeat_interleave(views), views)
        latest |= {int(i): features[2 * p : 2 * p + 2].mean(0) for p, i in enumerate(item)}
    table.refresh()
    for item, near in enumerate(table.table()):
        others = [other for other in latest if other != item] if item in latest else []
        cosines = {other: torch.cosine_similarity(latest[item], latest[other], 0).item() for other in others}
        expected = sorted(others, key=lambda other: -cosines[other])[: neighbours.NUM_NEAREST]
        np.testing.assert_array_equal(near, [*expected, *[-1] * (len(near) - len(expected))])
