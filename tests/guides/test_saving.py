"""A saved automatic guide is built again from the file and the model alone, and draws what it drew."""

import functools
import json

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from model_classes.registry import REGISTRY
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from safetensors import safe_open
from torch import nn

from pyro_aevb import AEVB, AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.errors import FileError, GuideError, SettingError

NAMES = ["circular", "conditional_vae", "crossed", "decoder_weights", "globals_ragged", "images_convolutional"]
NAMES += ["innovations", "label_and_style", "label_covariate", "mixed_regression", "mixed_table"]
NAMES += ["nan_coded", "obs_mask_counts", "ragged_series", "simplex", "vector_categorical"]
every_model = pytest.mark.parametrize("entry", [pytest.param(REGISTRY[name], id=name) for name in NAMES])


def fitted(model, guide, batch, data_plate="auto"):
    """Build on a batch, and move every parameter from where it starts."""
    vi = AEVB(model, guide, data_plate=data_plate, num_data=len(batch[0][0]))
    vi.partial_fit(*batch[0], learning_rate=0.02, seed=0, **batch[1])
    with torch.no_grad():
        for parameter in vi.module.program.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return vi


def assert_same(vi, loaded, batch):
    args, kwargs = batch
    expected = vi.posterior(*args, num_samples=3, seed=1, **kwargs)
    found = loaded.posterior(*args, num_samples=3, seed=1, **kwargs)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


class Counter(nn.Module):
    """Poisson counts whose rates a network decodes: its weights are zero until it is trained or loaded."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 4)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, x, group):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            rate = self.net(z[..., None]).squeeze(-2).exp()
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("x", dist.Poisson(rate * (1 + group[:, None])), obs=x)


def counts():
    torch.manual_seed(0)
    return (torch.poisson(torch.rand(50, 4) * 5), torch.arange(50) % 7), {}


class TestRoundTrip:
    @every_model
    def test_draws_are_the_same(self, entry, tmp_path):
        kinds = (AutoAmortizedNormal, AutoAmortizedMultivariateNormal, AutoAmortizedFlow)
        kind = kinds[NAMES.index(entry.name) % 3]
        vi = fitted(entry.model, kind(entry.model, init_scale=0.3, data_plate=entry.data_plate), entry.batch())
        vi.save(tmp_path / "vi")
        loaded = AEVB.load(tmp_path / "vi", entry.model)
        assert type(loaded.guide) is kind
        assert loaded.guide.init_scale == 0.3
        assert_same(vi, loaded, entry.batch() if entry.joint else entry.test_batch())
        assert loaded.guide.record == vi.guide.record

    def test_what_untrained_weights_do_not_show(self, tmp_path):
        # at weights of zero all columns have one distribution, so that they would be read as a set
        vi = AEVB(Counter())
        with torch.no_grad():
            vi.model.net.weight.normal_()
        vi.partial_fit(*counts()[0], seed=0)
        assert vi.guide.built.asymmetric == {"columns"}
        vi.save(tmp_path / "vi")
        loaded = AEVB.load(tmp_path / "vi", Counter())
        assert loaded.guide.built.asymmetric == {"columns"}
        assert_same(vi, loaded, counts())

    @pytest.mark.parametrize("kind", ["normal", "flow", AutoNormal, AutoLowRankMultivariateNormal])
    def test_guides_of_globals(self, kind, tmp_path):
        entry = REGISTRY["globals_hierarchical"]
        vi = fitted(entry.model, AutoAmortizedNormal(entry.model, global_guide=kind), entry.batch())
        vi.save(tmp_path / "vi")
        loaded = AEVB.load(tmp_path / "vi", entry.model)
        assert loaded.guide.global_guide == kind
        assert_same(vi, loaded, entry.batch())

    def test_a_loaded_one_is_fitted_and_saved_again(self, tmp_path):
        entry = REGISTRY["label_covariate"]
        args, kwargs = entry.batch()
        vi = AEVB(entry.model)
        vi.fit({"x": args[0], **kwargs}, num_epochs=1, batch_size=100, seed=0, progress=False)
        vi.save(tmp_path / "first")
        second = AEVB.load(tmp_path / "first", entry.model)
        second.fit({"x": args[0], **kwargs}, num_epochs=1, batch_size=100, seed=0, progress=False)
        second.save(tmp_path / "second")
        third = AEVB.load(tmp_path / "second", entry.model)
        assert_same(second, third, entry.test_batch())

    def test_encoders_are_given_again(self, tmp_path):
        entry = REGISTRY["chain"]
        make = {
            "one": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
            "by latent": lambda: {"z2": nn.Linear(4, 3)},
        }
        for name, encoder in make.items():
            vi = fitted(entry.model, AutoAmortizedNormal(entry.model, encoder=encoder()), entry.batch())
            vi.save(tmp_path / name)
            assert_same(vi, AEVB.load(tmp_path / name, entry.model, encoder=encoder()), entry.test_batch())
            with pytest.raises(FileError, match="give encoder="):
                AEVB.load(tmp_path / name, entry.model)

    def test_flows_are_given_again(self, tmp_path):
        entry = REGISTRY["chain"]
        flow = functools.partial(zuko.flows.MAF, transforms=2)
        vi = fitted(entry.model, AutoAmortizedFlow(entry.model, flow=flow), entry.batch())
        vi.save(tmp_path / "vi")
        with pytest.raises(FileError, match=r"its own flow.*guide=AutoAmortizedFlow"):
            AEVB.load(tmp_path / "vi", entry.model)
        loaded = AEVB.load(tmp_path / "vi", entry.model, guide=AutoAmortizedFlow(entry.model, flow=flow))
        assert_same(vi, loaded, entry.test_batch())

    def test_the_header_is_readable_and_holds_no_data(self, tmp_path):
        entry = REGISTRY["label_covariate"]
        fitted(entry.model, None, entry.batch()).save(tmp_path / "vi")
        with safe_open(tmp_path / "vi", framework="pt") as file:
            saved = json.loads(file.metadata()["pyro_aevb"])["guide"]
        assert saved["class"] == "AutoAmortizedNormal"
        assert saved["record"]["parents"]["x"] == ["@label", "z"]
        assert saved["record"]["inputs"][1] == [
            {"num_classes": 3, "is_count": False, "is_bounded": False, "has_number": True, "is_positive": False},
            False,
        ]


class TestWhatDoesNotFit:
    def save(self, tmp_path, guide=None, **settings):
        entry = REGISTRY["chain"]
        fitted(entry.model, guide, entry.batch(), **settings).save(tmp_path / "vi")
        return tmp_path / "vi", entry.model

    def test_a_guide_of_another_class(self, tmp_path):
        path, model = self.save(tmp_path)
        with pytest.raises(FileError, match="AutoAmortizedNormal, but guide= is a AutoAmortizedFlow"):
            AEVB.load(path, model, guide=AutoAmortizedFlow(model))

    def test_an_encoder_that_the_guide_did_not_have(self, tmp_path):
        path, model = self.save(tmp_path)
        with pytest.raises(FileError, match="saved with encoder none"):
            AEVB.load(path, model, encoder=nn.Linear(4, 3))
        with pytest.raises(SettingError, match="encoder="):
            AEVB.load(path, model, guide=AutoAmortizedNormal(model), encoder=nn.Linear(4, 3))

    def test_a_class_of_the_users(self, tmp_path):
        class Mine(AutoAmortizedNormal):
            pass

        model = REGISTRY["chain"].model
        path, model = self.save(tmp_path, Mine(model))
        with pytest.raises(FileError, match="its own class"):
            AEVB.load(path, model)
        AEVB.load(path, model, guide=Mine(model))

    def test_a_guide_of_the_users(self, tmp_path):
        def guide(x):
            with pyro.plate("data", len(x)):
                z1 = pyro.sample("z1", dist.Normal(0.0, pyro.param("scale", torch.tensor(1.0))))
                pyro.sample("z2", dist.Normal(z1[..., None].expand(*z1.shape, 2), 1.0).to_event(1))

        path, model = self.save(tmp_path, guide)
        with pytest.raises(FileError, match="guide="):
            AEVB.load(path, model)

    def test_another_model(self, tmp_path):
        path, _ = self.save(tmp_path)
        with pytest.raises(FileError, match="another model"):
            AEVB.load(path, REGISTRY["collider"].model)

    def test_a_record_of_a_guide_that_is_not_built(self):
        with pytest.raises(GuideError, match=r"build\(\*batch\)"):
            _ = AutoAmortizedNormal(REGISTRY["chain"].model).record
