"""The wrapper: its methods are those of the public functions, and a saved file gives the same numbers again."""

import json
import resource
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pyro_aevb import AEVB, IWELBO, SGVB, embed, log_marginal, posterior, predict, reconstruct
from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.testing import LinearGaussian, NormalNormal
from pyro_aevb.training import files
from pyro_aevb.training.files import FORMAT, Contents, read_file, write_file


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 6)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.encoder = nn.Linear(6, 4)

    def forward(self, x):
        loc, log_scale = self.encoder(self.norm(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class TypedModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 6)
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


def make_functions():
    """A model and a guide of `pyro.param` statements alone, one of them constrained."""

    def model(x):
        weight = pyro.param("my.weight", lambda: 0.1 * torch.randn(2, 6))
        scale = pyro.param("my.scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", lambda: 0.1 * torch.randn(6, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, 0.3).to_event(1))

    return model, guide


def make_modules():
    return Model(), Guide()


def make_typed():
    return TypedModel(), Guide()


def make_automatic():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return model, AutoNormal(model)


DATA = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 1.0
NEW = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
QUICK = {"num_epochs": 2, "batch_size": 20, "progress": False, "learning_rate": 0.01}


def fitted(make=make_modules, objective=None):
    vi = AEVB(*make(), objective)
    vi.fit(DATA, seed=0, **QUICK)
    return vi


@pytest.fixture(scope="module")
def vi():
    """A wrapper fitted once; tests only read it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return fitted()


def numbers(vi, x=NEW):
    """Return every kind of number that a wrapper gives, under fixed seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short fits have unreliable weights
        draws = vi.posterior(x, num_samples=4, seed=1) | vi.predict(x, num_samples=4, seed=2)
        evidence = vi.log_marginal(x, num_samples=20, seed=3, progress=False).value
    medians = {f"median of {name}": value for name, value in vi.embed(x).items()}
    means = {f"mean of {name}": value for name, value in vi.reconstruct(x).items()}
    return draws | medians | means | {"evidence": evidence}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class TestMethods:
    def test_they_are_the_public_functions(self, vi):
        model, guide = vi.model, vi.guide
        expected = posterior(model, guide, NEW, num_samples=4, seed=1)
        expected |= predict(model, guide, NEW, num_samples=4, seed=2)
        expected |= {f"median of {name}": value for name, value in embed(model, guide, NEW).items()}
        expected |= {f"mean of {name}": value for name, value in reconstruct(model, guide, NEW).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evidence = log_marginal(model, guide, NEW, num_samples=20, seed=3, progress=False)
        assert_same(numbers(vi), expected | {"evidence": evidence.value})

    def test_defaults(self, vi):
        assert vi.posterior(NEW[:1])["z"].shape == (1000, 1, 2)
        assert vi.predict(NEW[:1])["x"].shape == (100, 1, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert vi.log_marginal(NEW[:1], progress=False).num_samples == 5000

    def test_numpy_arrays_and_keywords_are_rows_too(self, vi):
        expected = vi.posterior(NEW, num_samples=3, seed=0)
        assert_same(vi.posterior(NEW.numpy(), num_samples=3, seed=0), expected)
        assert_same(vi.posterior(x=NEW, num_samples=3, seed=0), expected)
        assert_same(vi.posterior(x=NEW.numpy(), num_samples=3, seed=0), expected)

    def test_simulate_uses_the_first_batch_as_template(self, vi):
        assert vi.simulate(seed=0)["x"].shape == (20, 6)
        draws = vi.simulate(num_rows=4000, seed=0)
        assert draws["z"].shape == (4000, 2)
        error = draws["z"].mean(0) / (1 / 4000**0.5)
        assert error.abs().max() < 5
        assert_same(vi.simulate(num_rows=3, seed=0), vi.simulate(NEW.numpy(), num_rows=3, seed=0))

    def test_simulate_needs_a_template(self):
        with pytest.raises(SettingError, match="template"):
            AEVB(*make_modules()).simulate()

    def test_a_seed_leaves_the_generators(self, vi):
        before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
        first = numbers(vi)
        vi.simulate(num_rows=3, seed=0)
        assert torch.equal(before, torch.get_rng_state())
        assert np.array_equal(legacy, np.random.get_state()[1])
        assert_same(first, numbers(vi))

    @pytest.mark.parametrize("method", ["posterior", "predict", "log_marginal", "embed", "reconstruct", "simulate"])
    def test_a_method_before_fit_makes_the_parameters(self, method):
        pyro.set_rng_seed(0)
        vi = AEVB(*make_functions())
        settings = {"posterior": {"num_samples": 2}, "predict": {"num_samples": 2}}
        settings["log_marginal"] = {"num_samples": 200, "progress": False}
        getattr(vi, method)(NEW, **settings.get(method, {}))
        assert len(list(vi.module.parameters())) == 3
        assert len(pyro.get_param_store()) == 0

    def test_one_row_at_a_time_gives_the_same_embedding(self, vi):
        whole = vi.embed(NEW)["z"]
        alone = torch.cat([vi.embed(row[None])["z"] for row in NEW])
        assert torch.allclose(whole, alone, atol=1e-6)

    def test_moving_keeps_the_numbers(self):
        vi = fitted()
        before = numbers(vi)
        assert vi.to("cpu") is vi
        assert_same(before, numbers(vi))
        moved = fitted().to(torch.device("meta"))
        assert {parameter.device.type for parameter in moved.module.parameters()} == {"meta"}

    def test_an_exact_guide_weighs_to_the_closed_form(self):
        exact, x = LinearGaussian.fixture()
        vi = AEVB(exact.model, exact.guide)
        assert vi.log_marginal(x, progress=False).value.item() == pytest.approx(-12.2620864, abs=1e-6)
        assert vi.log_marginal(x, progress=False).standard_error.item() < 1e-8

    def test_a_model_without_rows(self):
        exact, x = NormalNormal.fixture()
        vi = AEVB(exact.model, exact.guide, data_plate=None)
        result = vi.log_marginal(x, num_samples=200, progress=False)
        assert result.value.item() == pytest.approx(exact.log_marginal(x).item(), abs=1e-8)


class TestPartialFit:
    def hand_written(self, steps):
        """Adam on the loss, in plain torch."""
        model, guide = make_modules()
        loss = SGVB()(model, guide).build(DATA[:20])
        loss.num_data = 50
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
        for step in range(steps):
            pyro.set_rng_seed(step)
            optimizer.zero_grad()
            loss(DATA[:20]).backward()
            optimizer.step()
        return [parameter.detach() for parameter in loss.parameters()]

    def test_it_is_a_loop_of_adam_with_its_state_kept(self):
        pyro.set_rng_seed(0)
        vi = AEVB(*make_modules(), num_data=50)
        for step in range(5):
            bound = vi.partial_fit(DATA[:20], learning_rate=0.01, seed=step)
        assert isinstance(bound, float)
        pyro.set_rng_seed(0)
        for own, other in zip(vi.module.parameters(), self.hand_written(5), strict=True):
            assert torch.allclose(own, other, atol=1e-6)

    def test_the_generators_are_left_as_they_were(self):
        vi = AEVB(*make_functions())
        before = torch.get_rng_state()
        vi.partial_fit(DATA[:20], seed=0)
        vi.partial_fit(DATA[:20], seed=1)
        assert torch.equal(before, torch.get_rng_state())

    def test_it_goes_on_after_fit(self):
        vi = fitted()
        before = [parameter.detach().clone() for parameter in vi.module.parameters()]
        vi.partial_fit(x=DATA[:20], learning_rate=0.01)
        moved = [(a - b).abs().max().item() for a, b in zip(before, vi.module.parameters(), strict=True)]
        # the first step of Adam has the length of the learning rate wherever there is a gradient
        assert max(moved) == pytest.approx(0.01, rel=1e-3)

    def test_globals_need_the_number_of_rows(self):
        exact, x = NormalNormal.fixture()
        guide = AutoNormal(exact.model)
        with pytest.raises(SettingError, match="num_data"):
            AEVB(exact.model, guide).partial_fit(x)


class TestFit:
    def test_it_gives_its_result_and_goes_on_when_called_again(self):
        vi = AEVB(*make_modules())
        first = vi.fit(DATA, seed=0, **QUICK)
        weight = vi.model.decoder.weight.detach().clone()
        second = vi.fit(DATA, seed=0, **QUICK)
        assert vi.result is second is not first
        assert second.history[0]["bound"] > first.history[0]["bound"]
        assert not torch.equal(weight, vi.model.decoder.weight)

    def test_parameters_of_functions_go_on_too(self):
        vi = AEVB(*make_functions())
        first = vi.fit(DATA, seed=0, **QUICK)
        second = vi.fit(DATA, seed=0, **QUICK)
        assert second.history[0]["bound"] > first.history[0]["bound"]
        assert torch.equal(pyro.param("my.scale"), vi.module.program.pyro_params()["my.scale"])

    def test_rows_of_another_data_set_are_counted_anew(self):
        vi = fitted()
        assert vi.module.num_data == 50
        vi.fit(DATA[:30], **QUICK)
        assert vi.module.num_data == 30
        vi = AEVB(*make_modules(), num_data=7000)
        vi.fit(DATA, **QUICK)
        assert vi.module.num_data == 7000

    @pytest.mark.parametrize("objective", [Trace_ELBO(), IWELBO(3), SGVB(kl="sampled", gradient="stl")])
    def test_any_objective(self, objective):
        vi = fitted(objective=objective)
        assert vi.objective is objective
        assert numbers(vi)["z"].shape == (4, 5, 2)

    def test_two_wrappers_with_the_same_names_do_not_collide(self):
        first = fitted(make_functions)
        before = numbers(first)
        second = AEVB(*make_functions())
        with pytest.warns(UserWarning, match="weight"):
            second.fit(-DATA, seed=1, **QUICK)
        assert_same(before, numbers(first))
        assert not torch.equal(numbers(second)["z"], before["z"])

    def test_nets_behind_a_method(self):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.generative, self.inference = make_modules()

            def model(self, x):
                return self.generative(x)

            def guide(self, x):
                return self.inference(x)

        holder = Holder()
        vi = AEVB(holder.model, holder.guide)
        before = holder.inference.encoder.weight.detach().clone()
        vi.fit(DATA, **QUICK)
        assert not torch.equal(before, holder.inference.encoder.weight)
        # the parameters of both are there once
        assert sum(p.numel() for p in vi.module.parameters()) == sum(p.numel() for p in holder.parameters())


class TestRepr:
    def test_before_and_after(self):
        vi = AEVB(*make_modules(), SGVB(num_particles=2))
        assert "not run on a batch yet" in repr(vi)
        assert "num_particles=2" in repr(vi)
        vi.embed(NEW)
        assert "data plate 'data'" in repr(vi)
        assert "latent   z: Normal [2]" in repr(vi)
        assert "observed x: Normal [6]" in repr(vi)
        vi.fit(DATA, **QUICK)
        count = 2 * 6 + 6 + 6 * 4 + 4 + 2 * 6
        assert f"{count} parameters, num_data=50" in repr(vi)
        assert "nats per row after 2 epochs" in repr(vi)


WAYS = [make_modules, make_functions, make_typed]


class TestFiles:
    @pytest.mark.parametrize("make", WAYS)
    def test_the_same_numbers_after_loading(self, make, tmp_path):
        vi = fitted(make)
        expected = numbers(vi)
        vi.save(tmp_path / "vi")
        assert_same(expected, numbers(vi))  # saving leaves the live object as it was
        pyro.clear_param_store()
        model, guide = make()
        loaded = AEVB.load(tmp_path / "vi", model, guide=guide)
        assert_same(expected, numbers(loaded))
        assert loaded.module.num_data == 50
        assert repr(loaded).splitlines()[:-1] == repr(vi).splitlines()[:-2]  # all but how the fit went

    def test_an_automatic_guide_of_pyros(self, tmp_path):
        vi = fitted(make_automatic)
        vi.save(tmp_path / "vi")
        assert vi.guide.model is not None
        model, guide = make_automatic()
        loaded = AEVB.load(tmp_path / "vi", model, guide=guide)
        assert_same(vi.embed(NEW), loaded.embed(NEW))
        assert_same(vi.posterior(NEW, num_samples=3, seed=0), loaded.posterior(NEW, num_samples=3, seed=0))

    def test_a_loaded_one_can_be_saved_and_fitted_again(self, tmp_path):
        vi = fitted(make_functions)
        vi.save(tmp_path / "first")
        pyro.clear_param_store()
        second = AEVB.load(tmp_path / "first", *make_functions()[:1], guide=make_functions()[1])
        second.save(tmp_path / "second")
        headers = []
        for name in ("first", "second"):
            with safe_open(tmp_path / name, "pt") as file:
                headers.append(json.loads(file.metadata()["pyro_aevb"]))
        assert headers[0] == headers[1]
        third = AEVB.load(tmp_path / "second", *make_functions()[:1], guide=make_functions()[1])
        assert_same(numbers(vi), numbers(third))
        third.fit(DATA, **QUICK)
        third.partial_fit(DATA[:20])

    def test_a_file_saved_before_any_run(self, tmp_path):
        vi = AEVB(*make_modules())
        vi.save(tmp_path / "vi")
        loaded = AEVB.load(tmp_path / "vi", Model(), guide=Guide())
        assert torch.equal(loaded.model.decoder.weight, vi.model.decoder.weight)

    def test_batchnorms_statistics_are_in_it(self, tmp_path):
        vi = fitted()
        vi.save(tmp_path / "vi")
        guide = Guide()
        AEVB.load(tmp_path / "vi", Model(), guide=guide)
        assert torch.equal(guide.norm.running_var, vi.guide.norm.running_var)
        assert guide.norm.num_batches_tracked == 6

    @pytest.mark.parametrize(
        "objective",
        [
            SGVB(3, kl="sampled", kl_weight=0.5, free_bits=0.1),
            SGVB(gradient="stl"),
            IWELBO(7, 2, gradient="dreg"),
        ],
    )
    def test_settings_of_the_objective_go_round(self, objective, tmp_path):
        vi = fitted(objective=objective)
        vi.save(tmp_path / "vi")
        loaded = AEVB.load(tmp_path / "vi", Model(), guide=Guide())
        assert type(loaded.objective) is type(objective)
        assert loaded.objective.settings == objective.settings
        own = IWELBO(2)
        assert AEVB.load(tmp_path / "vi", Model(), guide=Guide(), objective=own).objective is own

    def test_a_likelihood_of_positive_data(self, tmp_path):
        """Loading reads the model's structure without data, and zeros lie outside such a support."""

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.LogNormal(z[..., None], 1.0).expand([*z.shape, 6]).to_event(1), obs=x)

        class PositiveGuide(Guide):
            def forward(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(self.encoder(x.log())[..., 0], 1.0))

        vi = AEVB(model, PositiveGuide())
        vi.fit(DATA.exp(), **QUICK)
        vi.save(tmp_path / "vi")
        guide = PositiveGuide()
        loaded = AEVB.load(tmp_path / "vi", model, guide=guide)
        assert_same(vi.embed(DATA.exp()), loaded.embed(DATA.exp()))

    def test_the_file_is_tensors_and_json(self, tmp_path):
        vi = fitted(make_functions)
        vi.save(tmp_path / "vi")
        with safe_open(tmp_path / "vi", "pt") as file:
            header = json.loads(file.metadata()["pyro_aevb"])
            names = set(file.keys())
        assert header["fingerprint"]["sites"].keys() == {"z", "x"}
        assert header["pyro_params"] == ["my.scale", "my.weight", "weight"]
        assert len(names) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["vi"]  # no temporary file is left
        pickle_magic = b"\x80\x02"
        assert pickle_magic not in (tmp_path / "vi").read_bytes()[:2]

    def test_a_failing_save_leaves_the_old_file(self, tmp_path, vi):
        path = tmp_path / "vi"
        vi.save(path)
        old = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as on a full disk
        try:
            with pytest.raises(FileError, match=r"vi.*unchanged"):
                vi.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == old
        assert [entry.name for entry in tmp_path.iterdir()] == ["vi"]

    def test_a_folder_that_is_not_there(self, tmp_path, vi):
        with pytest.raises(FileError, match="folder"):
            vi.save(tmp_path / "folder" / "vi")

    def test_tied_weights(self, tmp_path):
        class Tied(Guide):
            def __init__(self, model):
                super().__init__()
                self.shared = model.decoder

        def make():
            model = Model()
            return model, Tied(model)

        vi = fitted(make)
        vi.save(tmp_path / "vi")
        model, guide = make()
        loaded = AEVB.load(tmp_path / "vi", model, guide=guide)
        assert guide.shared.weight is model.decoder.weight
        assert_same(numbers(vi), numbers(loaded))


class WideModel(Model):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 6, bias=False)


class OtherSite(Model):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class OtherGuide(Guide):
    def forward(self, x):
        loc, log_scale = self.encoder(self.norm(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc, log_scale.exp()).to_event(1))


class TestWrongFiles:
    @pytest.fixture
    def path(self, vi, tmp_path):
        vi.save(tmp_path / "vi")
        return tmp_path / "vi"

    def refuse(self, path, match, model=None, guide=None):
        model, guide = model or Model(), guide or Guide()
        before = [parameter.detach().clone() for program in (model, guide) for parameter in program.parameters()]
        state = torch.get_rng_state()
        with pytest.raises(FileError, match=match):
            AEVB.load(path, model, guide=guide)
        after = [parameter for program in (model, guide) for parameter in program.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert torch.equal(state, torch.get_rng_state())
        assert len(pyro.get_param_store()) == 0

    def test_another_model(self, path):
        self.refuse(path, r"another model.*decoder\.bias", WideModel())
        self.refuse(path, r"another model.*\['z'\]", OtherSite(), OtherGuide())

    def test_another_guide(self, path):
        guide = Guide()
        guide.encoder = nn.Linear(6, 4, bias=False)
        self.refuse(path, r"encoder\.bias", guide=guide)

    def test_missing(self, tmp_path):
        self.refuse(tmp_path / "nothing", "missing or damaged")

    @pytest.mark.parametrize("size", [0, 5, 200, -1, -400])
    def test_truncated(self, path, size):
        path.write_bytes(path.read_bytes()[:size])
        self.refuse(path, "damaged")

    def test_no_tensors(self, path):
        path.write_text("hello, this is not a file of tensors")
        self.refuse(path, "damaged")

    def test_of_another_kind(self, path):
        save_file({"a": torch.zeros(2)}, path)
        self.refuse(path, "not written by this package")

    def change_header(self, path, **changes):
        header, tensors = read_file(path)
        write_file(path, Contents(header | changes, tensors))

    def test_another_version(self, path, monkeypatch):
        contents = read_file(path)
        with monkeypatch.context() as patch:
            patch.setattr(files, "FORMAT", FORMAT + 1)
            write_file(path, contents)
        self.refuse(path, rf"format {FORMAT + 1}.*reads {FORMAT}")

    def test_one_flipped_bit_anywhere(self, path):
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                header, tensors = read_file(path)
            except FileError:
                continue
            # only the blanks that fill up a header may be others
            path.write_bytes(whole)
            expected = read_file(path)
            assert header == expected.header
            assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in tensors.items())

    def test_an_unknown_objective(self, path):
        self.change_header(path, objective=["Mystery", {}])
        self.refuse(path, "Mystery.*objective=")

    def test_settings_that_the_objective_does_not_know(self, path):
        self.change_header(path, objective=["SGVB", {"mystery": 1}])
        self.refuse(path, "mystery")

    def test_a_guide_is_needed(self, path):
        with pytest.raises(FileError, match="guide="):
            AEVB.load(path, Model())
