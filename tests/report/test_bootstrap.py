import numpy as np
import pytest

from clipfh.report import bootstrap


def test_the_interval_of_a_gain_is_that_of_a_bootstrap_of_both_models_together():
    rng = np.random.default_rng(1)
    item = rng.integers(12, size=60)
    before, after = rng.random((2, 60))
    before[7] = after[7] = np.nan  # a query without a positive
    found = bootstrap.gain(before, after, item, resamples=200, seed=5)
    gains = {code: [after[q] - before[q] for q in range(60) if item[q] == code and q != 7] for code in {*item}}
    own = [gains[code] for code in sorted(gains)]
    draws = np.random.default_rng(5).integers(len(own), size=(200, len(own)))
    means = [np.mean([gain for i in draw for gain in own[i]]) for draw in draws]
    assert found["mAP"] == pytest.approx(np.nanmean(after - before))
    assert found["interval"] == pytest.approx(np.quantile(means, (0.025, 0.975)))
