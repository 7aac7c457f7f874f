"""The axes [S, K, rows] around programs of every kind give what single runs give."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_aevb import IWELBO, SGVB
from pyro_aevb.errors import ModelError, ParticleWarning
from pyro_aevb.program.importance import ImportanceProgram
from pyro_aevb.program.particles import ParticleAxes, as_draws, run_program
from pyro_aevb.testing import LinearGaussianStateSpace, NormalNormal

S, K, ROWS = 2, 3, 5


def single_runs(program, args, records, site, *, of="model"):
    """Log densities of a site, run by run without any particle axes: an oracle without reshaping."""
    structure = program.structure
    values = {name: record.value for name, record in records.items()}
    expected = []
    for s in range(S):
        for k in range(K):
            given = {}
            for name, value in values.items():
                part = value[s, min(k, value.shape[1] - 1)]
                given[name] = part.reshape(part.shape[part.dim() - structure.ranks[name] :])
            run = run_program(getattr(program, of), structure, ParticleAxes(), args, {}, values=given)
            expected.append(run[site].log_prob.reshape(-1))
    return torch.stack(expected).reshape(S, K, -1)


def read(model, guide, *args, **settings):
    program = ImportanceProgram(model, guide, args, {}, **settings)
    axes = program.axes(S, K)
    guide_records = program.sample_guide(args, {}, axes)
    values = {name: record.value for name, record in guide_records.items()}
    return program, axes, guide_records, program.score_model(args, {}, axes, values)


# Shapes


def hierarchy(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean[..., None], 1.0).expand([*mean.shape[:-1], len(x), 2]).to_event(1))
        pyro.sample("x", dist.Normal((z * weight).sum(-1), 1.0), obs=x)


def hierarchy_guide(x):
    pyro.sample("mean", dist.Normal(0.1, 1.0))
    pyro.sample("weight", dist.Normal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None].expand(-1, 2), 1.0).to_event(1))


def test_globals_have_one_importance_sample_and_locals_all():
    x = torch.randn(ROWS)
    program, axes, guide, model = read(hierarchy, hierarchy_guide, x)
    assert axes.is_vectorized
    assert guide["mean"].value.shape == (S, 1, 1)
    assert guide["weight"].value.shape == (S, 1, 1, 2)
    assert guide["z"].value.shape == (S, K, ROWS, 2)
    assert model["mean"].log_prob.shape == (S,)
    assert model["x"].log_prob.shape == (S, K, ROWS)
    torch.testing.assert_close(model["x"].log_prob, single_runs(program, (x,), guide, "x"))
    torch.testing.assert_close(model["mean"].log_prob, single_runs(program, (x,), guide, "mean")[:, 0, 0])
    assert len(guide["z"].value.unique()) == S * K * ROWS * 2  # draws of their own


def test_without_particles_shapes_are_pyros_own():
    x = torch.randn(ROWS)
    program = ImportanceProgram(hierarchy, hierarchy_guide, (x,), {})
    axes = program.axes(1, 1)
    assert axes.is_single
    guide = program.sample_guide((x,), {}, axes)
    assert guide["mean"].value.shape == ()
    assert guide["z"].value.shape == (ROWS, 2)
    assert guide["z"].log_prob.shape == (1, 1, ROWS)


def test_the_loop_gives_the_same_shapes_and_draws_of_its_own():
    x = torch.randn(ROWS)
    program, _, guide, _ = read(hierarchy, hierarchy_guide, x)
    looped = program.sample_guide((x,), {}, ParticleAxes(S, K, is_vectorized=False))
    for name, record in guide.items():
        assert looped[name].value.shape == record.value.shape
        assert looped[name].log_prob.shape == record.log_prob.shape
    assert len(looped["z"].value.unique()) == S * K * ROWS * 2
    assert len(looped["mean"].value.unique()) == S


def test_draws_are_laid_out_rows_first():
    x = torch.randn(ROWS, 3)
    for dims in ((-1, -2), (-2, -1)):
        model, guide = with_inner_plate(*dims)
        program = ImportanceProgram(model, guide, (x,), {})
        records = program.sample_guide((x,), {}, program.axes(4, 1))
        draws = as_draws(records["w"], program.structure)
        assert draws.shape == (4, ROWS, 3)
        value = records["w"].value[:, 0]
        assert torch.equal(draws, value if dims[0] == -2 else value.transpose(1, 2))
        assert as_draws(records["z"], program.structure).shape == (4, ROWS)


# Plates


def with_inner_plate(data_dim, inner_dim):
    def model(x):
        laid = x if data_dim == -2 else x.t()
        data, inner = pyro.plate("data", len(x), dim=data_dim), pyro.plate("inner", 3, dim=inner_dim)
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with inner:
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 0.5), obs=laid)

    def guide(x):
        laid = x if data_dim == -2 else x.t()
        data, inner = pyro.plate("data", len(x), dim=data_dim), pyro.plate("inner", 3, dim=inner_dim)
        with data:
            pyro.sample("z", dist.Normal(laid.mean(inner_dim, keepdim=True), 1.0))
            with inner:
                pyro.sample("w", dist.Normal(laid, 1.0))

    return model, guide


@pytest.mark.parametrize("dims", [(-1, -2), (-2, -1)], ids=["inner plate left", "inner plate right"])
def test_inner_plates_on_either_side_of_the_rows(dims):
    x = torch.randn(ROWS, 3)
    program, axes, guide, model = read(*with_inner_plate(*dims), x)
    assert axes.is_vectorized
    for name in ("z", "w", "x"):
        torch.testing.assert_close(model[name].log_prob, single_runs(program, (x,), guide, name))
    by_hand = dist.Normal(guide["w"].value, 0.5).log_prob(x if dims[0] == -2 else x.t()).sum(dims[1])
    torch.testing.assert_close(model["x"].log_prob, by_hand.reshape(S, K, ROWS))


def test_a_state_space_model_with_its_exact_guide():
    exact, x = LinearGaussianStateSpace.fixture()
    program, axes, guide, model = read(exact.model, exact.guide, x)
    assert axes.is_vectorized
    terms = program.terms(model, guide, axes)
    expected = exact.log_marginal(x).expand(S, K, -1)
    torch.testing.assert_close(terms.log_weights().local, expected, rtol=0, atol=1e-8)


def test_globals_with_their_exact_guide():
    exact, x = NormalNormal.fixture()
    program, axes, guide, model = read(exact.model, exact.guide, x)
    weights = program.terms(model, guide, axes).log_weights()
    joint = weights.global_ + weights.local.mean(1).sum(-1)
    torch.testing.assert_close(joint, exact.log_marginal(x).expand(S), rtol=0, atol=1e-8)


# Networks


class Calls(nn.Module):
    """A network with the code around its call."""

    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, z):
        return self.call(self.net, z)


def image(*layers):
    return nn.Sequential(nn.Linear(2, 16), nn.Unflatten(-1, (4, 2, 2)), *layers)


def causal(net, z):
    mask = torch.ones(4, 4).triu(1).bool()
    return net(z, z, z, attn_mask=mask, key_padding_mask=torch.zeros(ROWS, 4).bool())[0]


NETWORKS = {
    "linear": (lambda: nn.Linear(2, 3), (2,)),
    "convolution and BatchNorm": (
        lambda: image(nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 1, 2, 2)),
        (2,),
    ),
    "BatchNorm1d": (lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), (2,)),
    "other norms": (lambda: image(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([2, 2])), (2,)),
    "pooling and padding": (
        lambda: image(nn.ReflectionPad2d(1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (2,),
    ),
    "shuffle, upsample, dropout": (lambda: image(nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.Dropout2d()), (2,)),
    "Flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), (3, 2)),
    "Unflatten from the left": (lambda: nn.Sequential(nn.Linear(2, 6), nn.Unflatten(1, (3, 2))), (2,)),
    "Embedding": (lambda: Calls(nn.Embedding(2, 3), lambda net, z: net((z[..., 0] > 0).long()) + z[..., :1]), (2,)),
    "GRU": (lambda: Calls(nn.GRU(2, 3, batch_first=True), lambda net, z: net(z)[0]), (4, 2)),
    "GRU from a state": (
        lambda: Calls(nn.GRU(2, 3, batch_first=True), lambda net, z: net(z, net(z)[1])[0]),
        (4, 2),
    ),
    "GRU over inputs from a latent state": (
        lambda: Calls(nn.GRU(1, 3, batch_first=True), lambda net, z: net(torch.ones(ROWS, 4, 1), z[None])[0]),
        (3,),
    ),
    "bidirectional GRU": (
        lambda: Calls(nn.GRU(2, 3, 2, batch_first=True, bidirectional=True), lambda net, z: net(z)[0]),
        (4, 2),
    ),
    "LSTM": (lambda: Calls(nn.LSTM(2, 3, batch_first=True), lambda net, z: net(z)[0]), (4, 2)),
    "LSTM from a state": (lambda: Calls(nn.LSTM(2, 3, batch_first=True), lambda net, z: net(z, net(z)[1])[0]), (4, 2)),
    "LSTM, last state": (
        lambda: Calls(nn.LSTM(2, 3, batch_first=True), lambda net, z: net(z)[1][0].squeeze(0)),
        (4, 2),
    ),
    "GRUCell": (lambda: Calls(nn.GRUCell(2, 3), lambda net, z: net(z, net(z))), (2,)),
    "GRUCell from a constant": (lambda: Calls(nn.GRUCell(2, 3), lambda net, z: net(z, torch.ones(ROWS, 3))), (2,)),
    "LSTMCell": (lambda: Calls(nn.LSTMCell(2, 3), lambda net, z: net(z, net(z))[0]), (2,)),
    "attention": (lambda: Calls(nn.MultiheadAttention(2, 1, batch_first=True), lambda net, z: net(z, z, z)[0]), (4, 2)),
    "attention by keywords": (
        lambda: Calls(
            nn.MultiheadAttention(2, 1, batch_first=True),
            lambda net, z: net(z, key=z, value=z, need_weights=False)[0],
        ),
        (4, 2),
    ),
    "attention with masks": (lambda: Calls(nn.MultiheadAttention(2, 1, batch_first=True), causal), (4, 2)),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), (4, 2)),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), 2, enable_nested_tensor=False
        ),
        (4, 2),
    ),
}  # fmt: skip
every_network = pytest.mark.parametrize(("make", "event"), NETWORKS.values(), ids=NETWORKS.keys())


def decoding(net, event):
    """A model whose decoder is the network, and a guide that is not."""
    with torch.no_grad():
        observed = net.eval()(torch.zeros(ROWS, *event)).shape[1:]
    x = torch.randn(ROWS, *observed)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(event), 1.0).to_event(len(event)))
                pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(len(observed)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), *event), 0.5).to_event(len(event)))

    return Model(), guide, x


@every_network
def test_networks_of_fixed_rank_see_particles_as_rows(make, event):
    model, guide, x = decoding(make(), event)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParticleWarning)
        program, axes, draws, records = read(model, guide, x)
    assert axes.is_vectorized
    torch.testing.assert_close(records["x"].log_prob, single_runs(program, (x,), draws, "x"), rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["convolution and BatchNorm", "GRU from a state", "attention", "LSTM, last state"])
def test_gradients_through_networks_of_fixed_rank(name):
    make, event = NETWORKS[name]
    model, guide, x = decoding(make(), event)
    model.eval()
    program, _, draws, records = read(model, guide, x)
    parameters = list(model.parameters())
    vectorized = torch.autograd.grad(records["x"].log_prob.sum(), parameters)
    looped = torch.autograd.grad(single_runs(program, (x,), draws, "x").sum(), parameters)
    for a, b in zip(vectorized, looped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            loc, scale = self.net(x[:, None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc + mean, nn.functional.softplus(scale)))


def with_global(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 4]).to_event(1), obs=x)


def test_encoders_run_once_whatever_the_particles():
    x, guide = torch.randn(ROWS, 4), Encoder().eval()
    program, axes, draws, _ = read(with_global, guide, x)
    assert axes.is_vectorized
    torch.testing.assert_close(draws["z"].log_prob, single_runs(program, (x,), draws, "z", of="guide"))


@pytest.mark.parametrize(
    "objective",
    [
        lambda: SGVB(3),
        lambda: SGVB(gradient="stl"),
        lambda: SGVB(gradient="score"),
        lambda: IWELBO(3),
        lambda: IWELBO(3, gradient="dreg"),
    ],
)
def test_batchnorm_counts_one_update_per_step(objective):
    x, guide = torch.randn(ROWS, 4), Encoder()
    objective = objective()
    for step in range(1, 4):
        objective.differentiable_loss(with_global, guide, x).backward()
        assert int(guide.net[1].num_batches_tracked) == step
    expected = nn.BatchNorm1d(2)
    for _ in range(3):
        expected(guide.net[0](x[:, None]))
    torch.testing.assert_close(guide.net[1].running_mean, expected.running_mean)


def test_batchnorm_of_a_decoder_counts_one_update_per_step_under_dreg():
    model, guide, x = decoding(NETWORKS["BatchNorm1d"][0](), (2,))
    model.train()
    objective = IWELBO(3, gradient="dreg")
    objective.differentiable_loss(model, guide, x).backward()
    assert int(model.net[1].num_batches_tracked) == 1


def test_dropout_draws_for_every_particle():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.dropout(torch.ones_like(z)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.zeros(200)
    _, axes, _, records = read(Model(), guide, x)
    assert axes.is_vectorized
    dropped = records["x"].log_prob > -1.0
    assert not torch.equal(dropped[0, 0], dropped[0, 1])
    share = dropped.double().mean()
    assert abs(share - 0.5) < 5 * (0.25 / dropped.numel()) ** 0.5


# Programs that do not broadcast


def guide_of(event):
    def guide(x):
        loc = pyro.param("loc", torch.full(event, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x), *event), 1.0).to_event(len(event)))

    return guide


def sums_axis_1(z):
    return z.sum(1)[:, None].expand(-1, 3)


def softmax_of_axis_1(z):
    return 5 * torch.softmax(z, 1)


def views_rows(z):
    return z.view(len(z), -1)


def assigns(z):
    out = torch.zeros(z.shape[0], 3)
    out[:, 0] = z[:, 0]
    return out


STUBBORN = {
    "sum(1)": sums_axis_1,
    "softmax(dim=1)": softmax_of_axis_1,
    "view(len(x), -1)": views_rows,
    "assignment": assigns,
}


@pytest.mark.parametrize("transform", STUBBORN.values(), ids=STUBBORN.keys())
def test_programs_that_do_not_broadcast_run_in_a_loop_with_one_warning(transform):
    event = (3, 1) if transform is views_rows else (3,)

    def model(x):
        weight = pyro.param("weight", torch.ones(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(event), 1.0).to_event(len(event)))
            pyro.sample("x", dist.Normal(weight * transform(z), 0.5).to_event(1), obs=x)

    x, guide = torch.randn(ROWS, 3), guide_of(event)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program, axes, draws, records = read(model, guide, x)
        program.axes(S, K)
        program.axes(S + 1, K)
    assert ["one by one" in str(item.message) for item in caught if item.category is ParticleWarning] == [True]
    assert not axes.is_vectorized
    expected = single_runs(program, (x,), draws, "x")
    torch.testing.assert_close(records["x"].log_prob, expected)
    leaves = [pyro.param("weight").unconstrained(), pyro.param("loc").unconstrained()]
    ours = torch.autograd.grad(records["x"].log_prob.logsumexp(1).sum(), leaves)
    oracle = torch.autograd.grad(expected.logsumexp(1).sum(), leaves)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b)


def bayesian_network(x):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(nn.functional.linear(z, weight, bias), 0.5).to_event(1), obs=x)


def bayesian_guide(x):
    loc = pyro.param("loc", torch.full((4, 2), 0.1))
    pyro.sample("weight", dist.Normal(loc, 0.5).to_event(2))
    pyro.sample("bias", dist.Normal(loc[:, 0], 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))


def test_a_bayesian_network_runs_in_a_loop():
    x = torch.randn(ROWS, 4)
    with pytest.warns(ParticleWarning, match=r"t\(\) expects a tensor"):
        program, axes, draws, records = read(bayesian_network, bayesian_guide, x)
    assert not axes.is_vectorized
    assert draws["weight"].value.shape == (S, 1, 1, 4, 2)
    assert draws["z"].value.shape == (S, K, ROWS, 2)
    torch.testing.assert_close(records["x"].log_prob, single_runs(program, (x,), draws, "x"))
    torch.testing.assert_close(records["weight"].log_prob, single_runs(program, (x,), draws, "weight")[:, 0, 0])
    assert not torch.equal(draws["weight"].value[0], draws["weight"].value[1])


def test_wrong_densities_name_the_site():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(softmax_of_axis_1(z), 0.5).to_event(1), obs=x)

    with pytest.warns(ParticleWarning, match="site 'x' has other densities"):
        read(model, guide_of((3,)), torch.randn(ROWS, 3))


# What has no weights per row


def depends_on_locals(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.factor("total", -z.sum(-1).square().reshape(z.shape[:-1] + (1,) * (z.dim() > 1)))


def depends_on_locals_in_a_loop(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.factor("total", -z.view(len(x)).sum().square())


def plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize("model", [depends_on_locals, depends_on_locals_in_a_loop])
def test_globals_that_depend_on_locals_have_no_weights_per_row(model):
    x = torch.randn(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if model is depends_on_locals_in_a_loop else "error", ParticleWarning)
        with pytest.raises(ModelError, match="'total' lies outside the data plate") as error:
            IWELBO(K).bounds(model, plain_guide, x)
    assert error.value.site == "total"
    assert torch.isfinite(SGVB().bounds(model, plain_guide, x).total)


# Rows that a model draws by itself


def drawing_model(x):
    with pyro.plate("data", 12, subsample_size=ROWS) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def drawing_guide(x):
    with pyro.plate("data", 12, subsample_size=ROWS) as index:
        pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))


@pytest.mark.parametrize(
    "objective",
    [
        lambda: SGVB(kl="sampled"),
        lambda: SGVB(3, gradient="stl"),
        lambda: SGVB(gradient="score"),
        lambda: IWELBO(4),
        lambda: IWELBO(4, 2, gradient="dreg"),
    ],
)
def test_model_and_guide_see_the_same_rows(objective):
    x = torch.linspace(-3.0, 3.0, 12, dtype=torch.float64)
    evaluation = objective().evaluate(drawing_model, drawing_guide, x)
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    # with the exact posterior as guide every bound is the evidence of one of the rows
    distance = (evaluation.bounds.local[:, None] - evidence).abs()
    assert float(distance.min(1).values.max()) < 1e-6  # the model's prior is in float32
    assert evaluation.bounds.scale == pytest.approx(12 / ROWS)


def test_the_loop_sees_the_same_rows_in_every_run():
    x = torch.linspace(-3.0, 3.0, 12, dtype=torch.float64)
    program = ImportanceProgram(drawing_model, drawing_guide, (x,), {})
    axes = ParticleAxes(S, K, is_vectorized=False)
    guide = program.sample_guide((x,), {}, axes)
    model = program.score_model((x,), {}, axes, {name: site.value for name, site in guide.items()})
    weights = program.terms(model, guide, axes).log_weights().local
    torch.testing.assert_close(weights, weights[:1, :1].expand(S, K, -1))
