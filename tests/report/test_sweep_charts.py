import pytest

from clipfh.config.search_range import SearchRange
from clipfh.report.sweep_charts import Scale


@pytest.mark.parametrize(
    ("range_", "low", "high"),
    [
        (SearchRange("loguniform", (1e-6, 1e-2)), 1e-6, 1e-2),
        (SearchRange("loguniform", (0.1, 2.0), 0.0), 0.1, 2.0),
        (SearchRange("loguniform", (0.11, 0.12)), 0.11, 0.12),
        (SearchRange("uniform", (0.1, 0.4), -1.0), 0.1, 0.4),
        (SearchRange("int", (2, 8)), 2, 8),
    ],
)
def test_a_scale_holds_its_range_with_a_few_round_ticks_apart_from_off(range_, low, high):
    scale = Scale(range_)
    assert scale.place(low) == scale.start and scale.place(high) == pytest.approx(1)
    places, labels = zip(*scale.ticks, strict=True)
    assert 2 <= len(places) <= 8 and len(set(labels)) == len(labels) and list(places) == sorted(places)
    if range_.off is not None:
        assert places[0] == scale.place(range_.off) == 0 and places[1] >= scale.start > 0.1


def test_a_logarithmic_scale_has_its_geometric_mean_in_the_middle():
    assert Scale(SearchRange("loguniform", (1e-6, 1e-2))).place(1e-4) == pytest.approx(0.5)


def test_choices_stand_apart():
    scale = Scale(SearchRange("choice", (2, 4, 8)))
    assert [round(place, 2) for place, _ in scale.ticks] == [0.17, 0.5, 0.83] and scale.place(8) == scale.ticks[2][0]
