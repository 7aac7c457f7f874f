"""Seeds and generators: draws repeat where they should, and nothing else moves."""

import random

import numpy as np
import pytest
import torch

from pyro_aevb.randomness import preserved_rng, random_state, replayed_rng, seeded


def draw():
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_what_is_drawn_inside_does_not_move_the_generators():
    with preserved_rng():
        inside = draw()
    assert draw() == inside


def test_the_generators_are_restored_after_an_error():
    drawn = []

    def fail():
        with preserved_rng():
            drawn.append(draw())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert draw() == drawn[0]


def test_a_seed_repeats_its_draws_and_is_over_afterwards():
    with seeded(3):
        first = draw()
    after = draw()
    with seeded(3):
        again = draw()
    with seeded(4):
        other = draw()
    assert first == again
    assert first != other
    assert draw() != after


def test_without_a_seed_the_generators_move_on():
    with preserved_rng():
        outside = draw()
    with seeded(None):
        inside = draw()
    assert inside == outside
    assert draw() != inside


def test_replaying_draws_the_same_again_and_goes_on_where_it_was():
    state = random_state()
    first = draw()
    with preserved_rng():
        following = draw()
    with replayed_rng(state):
        again = draw()
    assert again == first
    assert draw() == following
