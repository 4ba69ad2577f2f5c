"""Ids that a model's trials are made of."""

import pytest

from rloo_fast.models.trial import trial_ids
from tests.support.tiny import make_model


@pytest.mark.parametrize("pad", [0, 21, 31, None])
def test_padding_is_not_among_them(pad):
    ids = trial_ids(make_model(pad_token_id=pad), 64)
    assert ids.shape == (1, 64)
    assert pad not in ids.unique().tolist()
    assert len(ids.unique()) > 20
    assert 0 <= ids.min() <= ids.max() < 32


def test_they_are_the_same_each_time():
    model = make_model()
    assert trial_ids(model, 8).tolist() == trial_ids(model, 8).tolist()
