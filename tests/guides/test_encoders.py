"""Encoders: what goes in, what must not, and the same numbers whichever way they are called."""

import math

import jaxtyping
import pytest
import torch
from torch import nn

from pyro_aevb import ConvEncoder, MLPEncoder, SequenceEncoder, SetEncoder
from pyro_aevb.errors import DataError, SettingError

DIRECTIONS = ("forward", "backward", "both")

CASES = {
    "mlp": (lambda: MLPEncoder((3, 2), 5), (3, 2)),
    "mlp of a number": (lambda: MLPEncoder((), 5), ()),
    "linear": (lambda: MLPEncoder(4, 5, hidden_features=()), (4,)),
    "convolution": (lambda: ConvEncoder((2, 5, 8), 5, channels=(3, 4)), (2, 5, 8)),
    "set": (lambda: SetEncoder(3, 5, hidden_features=(8,)), (6, 3)),
    **{
        f"sequence {direction}": (
            lambda direction=direction: SequenceEncoder(3, 5, direction=direction, hidden_features=4),
            (6, 3),
        )
        for direction in DIRECTIONS
    },
}
MASKED = [name for name in CASES if name.startswith(("set", "sequence"))]

every_encoder = pytest.mark.parametrize("name", CASES)
every_masked_encoder = pytest.mark.parametrize("name", MASKED)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture
def unchecked():
    """Run as users do, without the run-time check of annotations, which refuses some mistakes before the encoder does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def make(name):
    build, event = CASES[name]
    return build().double(), event


def ragged(rows, steps):
    """A mask with gaps and ends of its own in each row: full, empty, and in between."""
    mask = torch.rand(rows, steps) < 0.6
    mask[0], mask[1] = True, False
    mask[2], mask[2, 1] = False, True
    return mask


class Loss(nn.Module):
    """A scalar of everything that an encoder returns, for a recording to compare."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, *inputs):
        loss = self.encoder(*inputs).square().mean()
        if isinstance(self.encoder, SequenceEncoder):
            loss = loss + self.encoder.summary(*inputs).sin().mean()
        return loss


# Every encoder


@every_encoder
def test_leading_axes_are_a_loop(name):
    encoder, event = make(name)
    x = torch.randn(2, 3, *event, dtype=torch.float64)
    looped = torch.stack([torch.stack([encoder(row) for row in rows]) for rows in x])
    torch.testing.assert_close(encoder(x), looped, rtol=1e-12, atol=1e-12)
    assert looped.shape[:2] == (2, 3)
    assert looped.shape[-1] == 5


@every_masked_encoder
def test_leading_axes_of_masks_are_a_loop_and_may_be_fewer(name):
    encoder, event = make(name)
    x, mask = torch.randn(2, 4, *event, dtype=torch.float64), ragged(4, event[0])
    looped = torch.stack([torch.stack([encoder(row, m) for row, m in zip(rows, mask, strict=True)]) for rows in x])
    torch.testing.assert_close(encoder(x, mask), looped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder(x, mask[None]), looped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder(x, mask.expand(2, 4, -1)), looped, rtol=1e-12, atol=1e-12)


@every_encoder
def test_no_rows_give_no_features(name):
    encoder, event = make(name)
    steps = event[:1] if name.startswith("sequence") else ()
    assert encoder(torch.zeros(3, 0, *event, dtype=torch.float64)).shape == (3, 0, *steps, 5)


@every_encoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_input(name, dtype):
    encoder, event = make(name)
    assert encoder.to(dtype)(torch.randn(3, *event, dtype=dtype)).dtype == dtype


@every_encoder
def test_inputs_stay_as_they_are(name):
    encoder, event = make(name)
    x = torch.randn(3, *event, dtype=torch.float64)
    mask = ragged(3, event[0]) if name in MASKED else None
    before = x.clone()
    encoder(x, *([] if mask is None else [mask]))
    assert torch.equal(x, before)


@every_encoder
def test_gradients_reach_every_parameter_and_every_input(name):
    encoder, event = make(name)
    x = torch.randn(3, *event, dtype=torch.float64, requires_grad=True)
    encoder(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 1e-8 for parameter in encoder.parameters())
    assert (x.grad != 0).all()


@every_encoder
def test_gradients_are_finite_differences(name):
    encoder, event = make(name)
    inputs = (torch.randn(2, *event, dtype=torch.float64, requires_grad=True),)
    if name in MASKED:
        inputs += (torch.rand(2, event[0]) < 0.6,)
    assert torch.autograd.gradcheck(encoder, inputs)


@every_encoder
@pytest.mark.filterwarnings("error")
def test_a_recording_gives_the_same_numbers_and_gradients(name):
    encoder, event = make(name)
    module = Loss(encoder)
    inputs = (torch.randn(4, *event, dtype=torch.float64),)
    if name in MASKED:
        inputs += (ragged(4, event[0]),)
    graph = torch.export.export(module, inputs, strict=False).module()
    # another batch, with other lengths
    fresh = (torch.randn_like(inputs[0]), *(item.flip(0, 1) for item in inputs[1:]))
    parameters = list(module.parameters())
    recorded, eager = graph(*fresh), module(*fresh)
    torch.testing.assert_close(recorded, eager, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(recorded, parameters), torch.autograd.grad(eager, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@every_masked_encoder
def test_no_mask_is_a_mask_of_what_is_all_there(name):
    encoder, event = make(name)
    x = torch.randn(4, *event, dtype=torch.float64)
    assert torch.equal(encoder(x), encoder(x, torch.ones(4, event[0], dtype=torch.bool)))


@every_masked_encoder
@pytest.mark.parametrize("filler", [math.nan, math.inf, 7.0])
def test_what_stands_at_masked_entries_leaks_neither_into_features_nor_gradients(name, filler):
    encoder, event = make(name)
    mask = ragged(4, event[0])
    x = torch.randn(4, *event, dtype=torch.float64).masked_fill(~mask[..., None], 0.0)
    loss = Loss(encoder)
    expected = torch.autograd.grad(loss(x, mask), list(encoder.parameters()))
    spoilt = x.masked_fill(~mask[..., None], filler).requires_grad_()
    value = loss(spoilt, mask)
    assert torch.equal(encoder(spoilt, mask), encoder(x, mask))
    gradients = torch.autograd.grad(value, [spoilt, *encoder.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients[1:], expected, strict=True))
    assert (gradients[0][~mask] == 0).all()
    assert gradients[0].isfinite().all()


# Vectors and images


def test_a_linear_map_is_found_fast_and_goes_on_beyond_the_data():
    x, weight = torch.randn(500, 8, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64) / 8**0.5
    network = nn.Sequential(MLPEncoder(8), nn.Linear(64, 3)).double()
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=150, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def error(x):
        return (network(x) - x @ weight - 1.0).square().mean().sqrt()

    def loss():
        optimizer.zero_grad()
        value = error(x).square()
        value.backward()
        return value

    optimizer.step(loss)
    assert error(x) < 1e-3
    # ten times as far from the middle of the data: 1 % of the spread, and many times more without the linear map
    assert error(10 * x) < 0.03 * (10 * x @ weight).std()


@pytest.mark.parametrize(("inputs", "width"), [(1, 64), (64, 64), (65, 128), (256, 256), (784, 512)])
def test_hidden_layers_are_sized_by_the_input(inputs, width):
    shapes = [tuple(p.shape) for p in MLPEncoder(inputs, 7).network.hidden.parameters() if p.dim() == 2]
    assert shapes == [(width, inputs), (width, width), (7, width)]


def test_an_mlp_is_its_formula():
    encoder = MLPEncoder((2, 2), 3, hidden_features=(5,)).double()
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    weight, bias, inner, inner_bias, outer = (p.detach() for p in encoder.parameters())
    flat = x.reshape(4, 4)
    hidden = flat @ inner.T + inner_bias
    expected = flat @ weight.T + bias + (hidden / (1 + torch.exp(-hidden))) @ outer.T
    torch.testing.assert_close(encoder(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (7, 9), (8, 8), (28, 28), (28, 20), (20, 28)])
@pytest.mark.parametrize("channels", [(3,), (3, 4), (3, 4, 5, 6)])
def test_images_of_every_size_are_read_to_the_last_pixel(size, channels):
    encoder = ConvEncoder((2, *size), 6, channels=channels).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    features = encoder(x)
    assert features.shape == (2, 6)
    features.sum().backward()
    assert (x.grad != 0).all()


# Sets


def test_the_order_of_items_does_not_matter():
    encoder, (items, length) = make("set")
    x, mask, order = torch.randn(4, items, length, dtype=torch.float64), ragged(4, items), torch.randperm(items)
    torch.testing.assert_close(encoder(x[:, order], mask[:, order]), encoder(x, mask), rtol=1e-12, atol=1e-12)


def test_masked_items_are_as_good_as_absent():
    encoder, (items, length) = make("set")
    x, mask = torch.randn(4, items, length, dtype=torch.float64), ragged(4, items)
    alone = torch.stack([encoder(row[present]) for row, present in zip(x, mask, strict=True)])
    torch.testing.assert_close(encoder(x, mask), alone, rtol=1e-12, atol=1e-12)
    assert alone.isfinite().all()


def test_a_set_is_its_formula():
    encoder, (items, length) = make("set")
    x = torch.randn(items, length, dtype=torch.float64)
    mean = torch.stack([encoder.phi(item) for item in x]).mean(0)
    expected = encoder.rho(torch.cat([mean, mean.new_tensor([math.log(1 + items)])]))
    torch.testing.assert_close(encoder(x), expected, rtol=1e-12, atol=1e-12)


def test_the_size_of_a_set_is_seen():
    encoder, (_, length) = make("set")
    x = torch.randn(1, length, dtype=torch.float64)
    assert (encoder(x.expand(8, -1)) - encoder(x)).abs().max() > 1e-3


# Sequences


@every_direction
@pytest.mark.parametrize("is_ragged", [False, True])
def test_features_of_a_step_see_the_steps_of_their_direction_alone(direction, is_ragged):
    encoder = SequenceEncoder(2, 3, direction=direction, hidden_features=4).double()
    steps = 6
    mask = torch.tensor([True, True, False, True, False, False]) if is_ragged else torch.ones(steps, dtype=torch.bool)
    x = torch.randn(steps, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: encoder(x, mask), x)
    sees = jacobian.abs().amax((1, 3)) > 0
    t, s = torch.meshgrid(torch.arange(steps), torch.arange(steps), indexing="ij")
    reach = {"forward": s <= t, "backward": s >= t, "both": s >= 0}[direction]
    assert torch.equal(sees, reach & mask)


@every_direction
def test_padding_changes_nothing(direction):
    encoder = SequenceEncoder(2, 3, direction=direction, hidden_features=4).double()
    x, mask = torch.randn(4, 6, 2, dtype=torch.float64), ragged(4, 6)
    longer = torch.cat([x, torch.full((4, 5, 2), math.nan, dtype=torch.float64)], 1)
    longer_mask = torch.cat([mask, torch.zeros(4, 5, dtype=torch.bool)], 1)
    torch.testing.assert_close(encoder(longer, longer_mask)[:, :6], encoder(x, mask), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder.summary(longer, longer_mask), encoder.summary(x, mask), rtol=1e-12, atol=1e-12)
    for row, present, features, summary in zip(x, mask, encoder(x, mask), encoder.summary(x, mask), strict=True):
        if present.any():
            length = int(present.nonzero().max()) + 1
            alone = encoder(row[:length], present[:length])
            torch.testing.assert_close(features[:length], alone, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(summary, encoder.summary(row[:length], present[:length]), rtol=1e-12, atol=1e-12)


def test_behind_the_end_a_backward_reading_has_nothing_to_tell():
    encoder = SequenceEncoder(2, 3, hidden_features=4).double()
    x, mask = torch.randn(2, 6, 2, dtype=torch.float64), torch.arange(6) < torch.tensor([[3], [0]])
    features = encoder(x, mask)
    (bias,) = [p for name, p in encoder.named_parameters() if name.endswith("project.bias")]
    torch.testing.assert_close(features[0, 3:], bias.expand(3, 3))
    torch.testing.assert_close(features[1], bias.expand(6, 3))


def gru(reader, x):
    """The recurrence of Cho et al. as torch documents it, step by step."""
    weights = reader.gru
    h = x.new_zeros(weights.hidden_size)
    states = []
    for step in x:
        r, u, n = (weights.weight_ih_l0 @ step + weights.bias_ih_l0).chunk(3)
        hr, hu, hn = (weights.weight_hh_l0 @ h + weights.bias_hh_l0).chunk(3)
        u = torch.sigmoid(u + hu)
        h = (1 - u) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + u * h
        states.append(h)
    return torch.stack(states)


def part(reader, states, x):
    return torch.cat([states, x], -1) @ reader.project.weight.T + reader.project.bias


def test_sequences_are_their_formula():
    encoder = SequenceEncoder(2, 3, direction="both", hidden_features=4).double()
    ahead, back = encoder.readers
    x = torch.randn(5, 2, dtype=torch.float64)
    forward, backward = part(ahead, gru(ahead, x), x), part(back, gru(back, x.flip(0)).flip(0), x)
    torch.testing.assert_close(encoder(x), forward + backward, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder.summary(x), forward[-1] + backward[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("direction", "step"), [("forward", 3), ("backward", 0)])
def test_a_summary_is_the_features_of_the_step_read_last(direction, step):
    encoder = SequenceEncoder(2, 3, direction=direction, hidden_features=4).double()
    x, mask = torch.randn(2, 6, 2, dtype=torch.float64), torch.tensor([False, True, False, True, False, False])
    torch.testing.assert_close(encoder.summary(x, mask), encoder(x, mask)[:, step])


# Mistakes

WRONG_SETTINGS = {
    "no events": lambda: MLPEncoder((3, 0)),
    "a length that is no integer": lambda: MLPEncoder(2.5),
    "no features": lambda: MLPEncoder(3, 0),
    "a hidden layer of nothing": lambda: MLPEncoder(3, hidden_features=(8, 0)),
    "an image without channels": lambda: ConvEncoder((28, 28)),
    "a small image": lambda: ConvEncoder((1, 3, 28)),
    "no convolution": lambda: ConvEncoder((1, 28, 28), channels=()),
    "no image channel": lambda: ConvEncoder((0, 28, 28)),
    "items of nothing": lambda: SetEncoder(0),
    "a set of no features": lambda: SetEncoder(3, -1),
    "steps of nothing": lambda: SequenceEncoder(0),
    "no state": lambda: SequenceEncoder(3, hidden_features=0),
    "an unknown direction": lambda: SequenceEncoder(3, direction="sideways"),
}

WRONG_INPUTS = {
    "another event": (lambda: MLPEncoder((2, 3))(torch.zeros(5, 3, 2)), r"\[\.\.\., 2, 3\].*\[5, 3, 2\]"),
    "too few axes": (lambda: MLPEncoder((2, 3))(torch.zeros(3)), r"\[\.\.\., 2, 3\].*\[3\]"),
    "another image": (lambda: ConvEncoder((1, 8, 8))(torch.zeros(5, 8, 8)), r"\[\.\.\., 1, 8, 8\].*\[5, 8, 8\]"),
    "other items": (lambda: SetEncoder(3)(torch.zeros(4, 2)), r"\[\.\.\., items, 3\].*\[4, 2\]"),
    "an item alone": (lambda: SetEncoder(3)(torch.zeros(3)), r"\[\.\.\., items, 3\].*\[3\]"),
    "other steps": (lambda: SequenceEncoder(3)(torch.zeros(4, 2)), r"\[\.\.\., steps, 3\].*\[4, 2\]"),
    "no steps": (lambda: SequenceEncoder(3).summary(torch.zeros(4, 0, 3)), r"one step.*\[4, 0, 3\]"),
    "a mask of other items": (
        lambda: SetEncoder(3)(torch.zeros(5, 4, 3), torch.ones(5, 3, dtype=torch.bool)),
        r"\[5, 4\].*bool \[5, 3\]",
    ),
    "a mask of more axes": (
        lambda: SequenceEncoder(3)(torch.zeros(4, 3), torch.ones(5, 4, dtype=torch.bool)),
        r"\[4\].*\[5, 4\]",
    ),
    "one mask for all items": (
        lambda: SetEncoder(3)(torch.zeros(5, 4, 3), torch.ones(5, 1, dtype=torch.bool)),
        r"\[5, 4\].*bool \[5, 1\]",
    ),
    "a mask of no axes": (lambda: SetEncoder(3)(torch.zeros(4, 3), torch.tensor(True)), r"\[4\].*bool \[\]"),
    "a mask of numbers": (lambda: SetEncoder(3)(torch.zeros(4, 3), torch.ones(4)), r"boolean.*float32"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_settings_that_make_no_network_are_refused(name):
    with pytest.raises(SettingError, match="got"):
        WRONG_SETTINGS[name]()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_of_another_shape_are_refused(name):
    call, message = WRONG_INPUTS[name]
    with pytest.raises(DataError, match=message):
        call()
