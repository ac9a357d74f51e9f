"""Whitening by how views of one item differ."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from clipfh.learn.whitening import SHRINKAGE, WithinItemCovariance


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), batches=st.integers(1, 3), views=st.integers(2, 4), dim=st.integers(2, 6))
def test_whitening_is_the_inverse_root_of_the_shrunk_covariance_within_items(seed, batches, views, dim):
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(batches, 3 * views, dim)))
    covariance = WithinItemCovariance(dim)
    slow = torch.zeros(dim, dim, dtype=torch.float64)
    for batch in features:
        covariance.add(batch, views)
        for item in F.normalize(batch).split(views):
            for view in item:
                difference = view - item.mean(0)
                slow += torch.outer(difference, difference)
    expected = torch.linalg.inv(slow / slow.trace() * dim + SHRINKAGE * torch.eye(dim))
    whitening = covariance.whitening()
    assert_close(whitening, whitening.T)
    assert_close(whitening @ whitening, expected)


def test_views_that_never_differ_are_left_as_they_are():
    covariance = WithinItemCovariance(3)
    covariance.add(torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0), 2)
    assert_close(covariance.whitening(), SHRINKAGE**-0.5 * torch.eye(3, dtype=torch.float64))
