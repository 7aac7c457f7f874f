"""Networks of a guide: what they may not depend on, shapes, marks, users' encoders."""

import pytest
import torch
from torch import nn

from pyro_aevb.errors import DataError, GuideError
from pyro_aevb.guides.encoders import ConvEncoder, MLPEncoder, SequenceEncoder, SetEncoder
from pyro_aevb.guides.inputs import Input, Observation, Scale
from pyro_aevb.guides.networks import CustomEncoder, Encoder, Head, Mark, Pooling, SeriesEncoder, concatenate

ROWS, LINES, COLUMNS = 5, 3, 4


def source(*shape, mask=None):
    """Return the input of a source, and what a batch says there."""
    x = torch.randn(shape)
    observation = Observation(x, mask)
    own = Input("x", observation, Scale(), tuple(shape[3:]))
    return own, own(observation)


def encoder(own, *, vector=None, items=(), order=None, num_sampled=0):
    return Encoder([own], num_sampled, Pooling(vector or {}, tuple(items), order))


def test_concatenation_broadcasts_all_but_the_last_axis():
    first, second = torch.randn(5, 1, 4, 2), torch.randn(7, 5, 3, 1, 6)
    joined = concatenate([first, second])
    assert joined.shape == (7, 5, 3, 4, 8)
    assert torch.equal(joined[2, 1, 2, 3], torch.cat([first[1, 0, 3], second[2, 1, 2, 0]]))


# Reading one instance, sets, sequences, vectors.


def test_an_instance_is_read_for_itself():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    network = encoder(own)
    features = network([said], [], 3)
    assert features.shape == (ROWS, LINES, COLUMNS, network.num_features)
    alone = network([Observation(said.value[2:3, 1:2, 3:4], None)], [], 3)
    torch.testing.assert_close(features[2, 1, 3], alone[0, 0, 0])
    assert network.label == "MLPEncoder"


@pytest.mark.parametrize("axis", [1, 2])
def test_a_set_is_read_in_any_order_and_keeps_the_other_plates(axis):
    own, said = source(ROWS, LINES, COLUMNS, 2)
    network = encoder(own, items=[axis])
    features = network([said], [], 3)
    shape = [ROWS, LINES, COLUMNS, network.num_features]
    shape[axis] = 1
    assert list(features.shape) == shape
    shuffled = network([Observation(said.value.flip(axis), None)], [], 3)
    torch.testing.assert_close(shuffled, features)
    other = network([Observation(said.value.flip(3 - axis), None)], [], 3)
    torch.testing.assert_close(other, features.flip(3 - axis))
    assert network.label == "SetEncoder"


def test_a_set_over_two_plates_is_a_set_of_all_their_instances():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    network = encoder(own, items=[1, 2])
    features = network([said], [], 3)
    assert features.shape == (ROWS, 1, 1, network.num_features)
    index = torch.randperm(LINES * COLUMNS)
    shuffled = said.value.flatten(1, 2)[:, index].unflatten(1, (LINES, COLUMNS))
    torch.testing.assert_close(network([Observation(shuffled, None)], [], 3), features)


def test_items_of_which_nothing_is_known_are_none():
    mask = torch.ones(ROWS, LINES, COLUMNS, 2, dtype=torch.bool)
    mask[:, :, 2:] = False
    own, said = source(ROWS, LINES, COLUMNS, 2, mask=mask)
    network = encoder(own, items=[2])
    features = network([said], [], 3)
    short = network([Observation(said.value[:, :, :2], said.mask[:, :, :2])], [], 3)
    torch.testing.assert_close(features, short)


def test_an_item_that_is_known_in_part_is_one():
    mask = torch.ones(ROWS, LINES, COLUMNS, 2, dtype=torch.bool)
    own, said = source(ROWS, LINES, COLUMNS, 2, mask=mask)
    network = encoder(own, items=[2])
    half = said.mask.clone()
    half[:, :, 3, 0] = False
    absent = half.clone()
    absent[:, :, 3] = False
    features = [network([Observation(said.value, known)], [], 3) for known in (said.mask, half, absent)]
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert (features[1] - features[2]).abs().max() > 1e-3


def test_a_plate_in_order_is_read_in_order():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    steps, summary = encoder(own, items=[2], order="step"), encoder(own, items=[2], order="summary")
    assert steps([said], [], 3).shape == (ROWS, LINES, COLUMNS, steps.num_features)
    assert summary([said], [], 3).shape == (ROWS, LINES, 1, summary.num_features)
    backward = summary([Observation(said.value.flip(2), None)], [], 3)
    assert (backward - summary([said], [], 3)).abs().max() > 1e-3
    moved = said.value.clone()
    moved[:, :, 0] += 1  # every step hears of the first: it is read both ways
    assert ((steps([Observation(moved, None)], [], 3) - steps([said], [], 3)).abs().amax(-1) > 1e-6).all()
    assert steps.label == "SequenceEncoder"


def test_a_plate_along_the_first_axis_is_read_step_by_step_too():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    steps = encoder(own, items=[1], order="step")
    features = steps([said], [], 3)
    assert features.shape == (ROWS, LINES, COLUMNS, steps.num_features)
    column = steps([Observation(said.value[:, :, 1:2], None)], [], 3)
    torch.testing.assert_close(features[:, :, 1:2], column)


def test_indices_that_are_not_alike_are_one_vector():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    network = encoder(own, vector={2: COLUMNS})
    features = network([said], [], 3)
    assert features.shape == (ROWS, LINES, 1, network.num_features)
    plain = network.reader(said.value.flatten(2))
    torch.testing.assert_close(features[:, :, 0], plain)
    assert (network([Observation(said.value.flip(2), None)], [], 3) - features).abs().max() > 1e-3


def test_a_vector_along_one_plate_and_a_set_along_another():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    network = encoder(own, vector={2: COLUMNS}, items=[1])
    features = network([said], [], 3)
    assert features.shape == (ROWS, 1, 1, network.num_features)
    torch.testing.assert_close(network([Observation(said.value.flip(1), None)], [], 3), features)
    assert (network([Observation(said.value.flip(2), None)], [], 3) - features).abs().max() > 1e-3


def test_a_vector_of_another_length_is_refused():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    network = encoder(own, vector={2: COLUMNS})
    with pytest.raises(DataError, match=r"plate of 4 indices.*has 3 in this batch.*mask"):
        network([Observation(said.value[:, :, :3], None)], [], 3)


def test_sampled_latents_are_read_with_their_particles():
    own, said = source(ROWS, LINES, COLUMNS, 2)
    network = encoder(own, items=[2], num_sampled=3)
    z = torch.randn(7, ROWS, LINES, COLUMNS, 3)
    features = network([said], [z], 3)
    assert features.shape == (7, ROWS, LINES, 1, network.num_features)
    torch.testing.assert_close(features[4], network([said], [z[4]], 3))


def test_images_go_through_convolutions_alone_or_beside_vectors():
    own, said = source(ROWS, 1, 1, 2, 8, 8)
    image = encoder(own)
    assert image.label == "ConvEncoder"
    assert image([said], [], 3).shape == (ROWS, 1, 1, image.num_features)
    label, told = source(ROWS, 1, 1, 3)
    both = Encoder([own, label], 0, Pooling({}, (), None))
    assert both.label == "ConvEncoder + MLPEncoder"
    assert (both([said, told], [], 3) - both([said, told._replace(value=told.value + 1)], [], 3)).abs().max() > 1e-3
    assert (both([said, told], [], 3) - both([said._replace(value=said.value + 1), told], [], 3)).abs().max() > 1e-3


def test_the_mask_of_an_image_is_channels_and_of_a_vector_inputs():
    for shape in ((2, 8, 8), (3,)):
        mask = torch.ones(ROWS, 1, 1, *shape, dtype=torch.bool)
        own, said = source(ROWS, 1, 1, *shape, mask=mask)
        network = encoder(own)
        other = said.mask.clone()
        other[..., 0] = False
        assert (network([said], [], 3) - network([Observation(said.value, other)], [], 3)).abs().max() > 1e-4


# Series.


def test_steps_of_a_series_are_read_in_its_direction():
    x = torch.randn(ROWS, 1, 1, 6, 2)
    own = Input("x", Observation(x, None), Scale(), (2,))
    said = own(Observation(x, None))
    moved = said.value.clone()
    moved[..., 3, :] += 1
    for direction, hears in (("backward", range(4)), ("forward", range(3, 6)), ("both", range(6))):
        network = SeriesEncoder([own], direction)
        change = network([Observation(moved, None)]) - network([said])
        assert change.shape == (ROWS, 1, 1, 6, network.num_features)
        assert [step for step in range(6) if change[..., step, :].abs().max() > 1e-6] == list(hears)


def test_padding_of_a_series_is_not_read():
    x, mask = torch.randn(ROWS, 1, 1, 6, 2), torch.ones(ROWS, 1, 1, 6, 2, dtype=torch.bool)
    mask[..., 4:, :] = False
    own = Input("x", Observation(x, mask), Scale(), (2,))
    network = SeriesEncoder([own], "backward")
    long, short = own(Observation(x, mask)), own(Observation(x[..., :4, :], mask[..., :4, :]))
    torch.testing.assert_close(network([long])[..., :4, :], network([short]))


# Marks and heads.


def test_marks_tell_indices_and_steps_apart():
    plate, series = Mark(4, 2), Mark(30, None)
    assert plate(0, 3).shape == (1, 1, 4, 4)
    assert series(7, 3).shape == (1, 1, 1, 16)
    assert torch.equal(plate(0, 3)[0, 0], plate.vectors)
    assert torch.equal(series(7, 3)[0, 0, 0], series.vectors[7])
    assert len(torch.unique(series.vectors, dim=0)) == 30


@pytest.mark.parametrize("is_linear", [True, False])
def test_a_head_starts_at_zero(is_linear):
    head = Head(6, 5, is_linear=is_linear)
    assert torch.equal(head(torch.randn(3, 4, 6)), torch.zeros(3, 4, 5))
    assert isinstance(head.body, nn.Identity) == is_linear


# Users' encoders.


class Features(nn.Module):
    """Records what it is called with."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        self.x = x
        rows = len(next(iter(x.values())) if isinstance(x, dict) else x)
        return torch.ones(rows, *self.shape)


def custom(module, shapes, *, plates=(), is_series=False):
    return CustomEncoder(module, shapes, plates, is_series=is_series)


def test_a_users_encoder_is_called_with_the_event_and_without_plates_of_size_one():
    value = torch.randn(ROWS, 1, 1, 2, 8, 8)
    module = Features((7,))
    features = custom(module, {"x": (2, 8, 8)})([Observation(value, None)], 3)
    assert torch.equal(module.x, value[:, 0, 0])
    assert features.shape == (ROWS, 1, 1, 7)


def test_a_users_encoder_gets_events_as_the_model_has_them():
    matrix, number = torch.randn(ROWS, 1, 1, 6), torch.randn(ROWS, 1, 1, 1)
    module = Features((7,))
    custom(module, {"x": (2, 3), "y": ()})([Observation(matrix, None), Observation(number, None)], 3)
    assert torch.equal(module.x["x"], matrix.reshape(ROWS, 2, 3))
    assert torch.equal(module.x["y"], number[:, 0, 0])


def test_a_users_encoder_keeps_the_plates_of_its_latent():
    value = torch.randn(ROWS, 1, COLUMNS, 2)
    module = Features((COLUMNS, 7))
    features = custom(module, {"x": (2,)}, plates=[2])([Observation(value, None)], 3)
    assert torch.equal(module.x, value[:, 0])
    assert features.shape == (ROWS, 1, COLUMNS, 7)


def test_a_users_encoder_of_a_series_returns_features_of_each_time():
    value = torch.randn(ROWS, 1, 1, 6, 2)
    module = Features((6, 7))
    features = custom(module, {"x": (2,)}, is_series=True)([Observation(value, None)], 3)
    assert torch.equal(module.x, value[:, 0, 0])
    assert features.shape == (ROWS, 1, 1, 6, 7)


def test_masks_are_joined_to_a_users_features():
    value, mask = torch.randn(ROWS, 1, 1, 3), torch.rand(ROWS, 1, 1, 3) < 0.5
    features = custom(Features((7,)), {"x": (3,)})([Observation(value, mask)], 3)
    assert torch.equal(features[..., 7:], mask.float())


def test_masks_of_a_plate_that_is_pooled_are_one_vector():
    value, mask = torch.randn(ROWS, LINES, COLUMNS, 2), torch.rand(ROWS, LINES, COLUMNS, 2) < 0.5
    module = Features((LINES, 7))
    features = custom(module, {"x": (2,)}, plates=[1])([Observation(value, mask)], 3)
    assert torch.equal(module.x, value)
    assert features.shape == (ROWS, LINES, 1, 7 + 2 * COLUMNS)
    assert torch.equal(features[:, :, 0, 7:], mask.float().flatten(2))


@pytest.mark.parametrize(
    ("module", "got"),
    [
        (nn.Flatten(0), r"\[5, 'features'\] of x: \[5, 3\], got \[15\]"),
        (Features(()), r"got \[5\]"),
        (nn.Unflatten(0, (1, ROWS)), r"got \[1, 5, 3\]"),
        (nn.GRU(3, 4), "got.*tuple"),
        (nn.Linear(9, 4), r"failed on x: \[5, 3\].*shapes"),
    ],
    ids=["flat", "no features", "rows lost", "tuple", "other inputs"],
)
def test_a_users_encoder_that_returns_something_else_is_told_what_is_expected(module, got):
    with pytest.raises(GuideError, match=rf"(?s)encoder {type(module).__name__} .*{got}"):
        custom(module, {"x": (3,)})([Observation(torch.randn(ROWS, 1, 1, 3), None)], 3)


def test_readers_are_the_encoders_of_the_package():
    own, _ = source(ROWS, LINES, COLUMNS, 2)
    kinds = {
        MLPEncoder: encoder(own),
        SetEncoder: encoder(own, items=[1]),
        SequenceEncoder: encoder(own, items=[1], order="step"),
    }
    assert all(isinstance(network.reader, kind) for kind, network in kinds.items())
    image, _ = source(ROWS, 1, 1, 2, 8, 8)
    assert isinstance(next(iter(encoder(image).items.images.values())), ConvEncoder)
