"""Every accepted form of data reaches model and guide as the same rows, in their own dtype, once an epoch."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from pyro_aevb import SGVB, fit
from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.training.data import as_batch, as_source

X = torch.arange(10.0)
Y = X**2


class Recorder(nn.Module):
    """A model without latents that keeps the batches that it is trained on."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.batches = []

    def forward(self, x, y=None):
        if torch.is_grad_enabled():
            self.batches.append((x, y))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x.float())


def no_latents(x, y=None):
    pass


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return X[index], Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


def record(data, **settings):
    model = Recorder()
    result = fit(model, no_latents, SGVB(kl="sampled"), data, **({"num_epochs": 1, "progress": False} | settings))
    return model.batches, result


ONE = {
    "tensor": lambda: X,
    "numpy array": lambda: X.numpy(),
    "tuple": lambda: (X,),
    "list": lambda: [X.numpy()],
    "mapping": lambda: {"x": X},
    "dataset": lambda: TensorDataset(X),
    "stream": lambda: Stream(),
}
TWO = {
    "tuple": lambda: (X, Y),
    "list": lambda: [X, Y.numpy()],
    "mapping in any order": lambda: {"y": Y, "x": X},
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": lambda: Squares(),
}


@pytest.mark.parametrize("form", ONE)
def test_every_row_is_seen_once_an_epoch(form):
    batches, _ = record(ONE[form](), batch_size=4, num_epochs=2)
    assert [len(x) for x, _ in batches] == [4, 4, 2] * 2
    for epoch in (batches[:3], batches[3:]):
        assert torch.equal(torch.cat([x for x, _ in epoch]).sort().values, X)


@pytest.mark.parametrize("form", TWO)
def test_rows_of_several_tensors_stay_together(form):
    batches, _ = record(TWO[form](), batch_size=3)
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    assert torch.equal(x.sort().values, X)
    assert torch.equal(x**2, y)


@pytest.mark.parametrize("batch", [lambda rows: rows, lambda rows: {"x": rows[0], "y": rows[1]}])
def test_a_loader_keeps_its_own_batches_and_order(batch):
    loader = DataLoader(Squares(), batch_size=4, collate_fn=lambda items: batch(torch.tensor(items).T.unbind()))
    batches, _ = record(loader)
    assert [x.tolist() for x, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(torch.equal(x**2, y) for x, y in batches)


def test_rows_are_shuffled_anew_in_each_epoch():
    for data in (X, TensorDataset(X)):
        batches, _ = record(data, batch_size=5, num_epochs=2, seed=0)
        first, second = (torch.cat([batches[i][0], batches[i + 1][0]]) for i in (0, 2))
        assert not torch.equal(first, X)
        assert not torch.equal(first, second)


def test_all_rows_at_once_keep_their_order():
    batches, _ = record(X, batch_size=10, num_epochs=2, seed=0)
    assert all(torch.equal(x, X) for x, _ in batches)


def test_bytes_stay_bytes_until_the_program_sees_them():
    batches, _ = record(torch.arange(10, dtype=torch.uint8), batch_size=4)
    assert {x.dtype for x, _ in batches} == {torch.uint8}
    batches, _ = record(np.arange(10, dtype=np.uint8), batch_size=4)
    assert {x.dtype for x, _ in batches} == {torch.uint8}


def test_numpy_arrays_are_not_copied():
    array = np.zeros(4, dtype=np.float32)
    assert as_batch(array).args[0].data_ptr() == array.ctypes.data


def test_the_default_batch_is_the_papers():
    batches, _ = record(torch.arange(250.0))
    assert [len(x) for x, _ in batches] == [100, 100, 50]
    batches, _ = record(X)
    assert [len(x) for x, _ in batches] == [10]


def test_asking_for_the_first_batch_leaves_the_generators():
    before = torch.get_rng_state()
    as_source(DataLoader(TensorDataset(X), shuffle=True)).first()
    assert torch.equal(before, torch.get_rng_state())


class GlobalRecorder(Recorder):
    def forward(self, x, y=None):
        g = pyro.sample("g", dist.Normal(self.loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)


def global_guide(x, y=None):
    pyro.sample("g", dist.Normal(0.0, 1.0))


class TestStreams:
    def test_a_stream_has_no_length_and_needs_none_without_globals(self):
        batches, result = record(Stream(), batch_size=5, num_epochs=2)
        assert result.num_steps == len(batches) == 4

    def test_globals_need_the_number_of_rows(self):
        with pytest.raises(SettingError, match=r"\['g'\].*num_data"):
            fit(GlobalRecorder(), global_guide, SGVB(), Stream(), num_epochs=1, progress=False)

    def test_num_data_weighs_the_rows_against_the_globals(self):
        fitted = []
        for num_data in (10, 1000):
            model = GlobalRecorder()
            nn.init.constant_(model.loc, 1.0)
            # KL(q(g) || p(g)) = loc^2 / 2 has weight 1 whatever num_data, and the rows do not know loc
            optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
            settings = {"batch_size": 10, "num_epochs": 1, "seed": 0, "optimizer": optimizer, "progress": False}
            result = fit(model, global_guide, SGVB(kl="analytic"), Stream(), num_data=num_data, **settings)
            fitted.append(result.history[0]["bound"])
            assert model.loc.item() == pytest.approx(0.9)
        # nats per row: the KL is shared by 10 or by 1000 rows
        assert fitted[1] - fitted[0] == pytest.approx(0.5 / 10 - 0.5 / 1000, rel=1e-3)


class TestWhole:
    def test_a_model_without_rows_gets_everything_once_an_epoch(self):
        model = Recorder()
        settings = {"num_epochs": 3, "progress": False, "data_plate": None}
        fit(model, no_latents, SGVB(kl="sampled"), torch.arange(250.0), **settings)
        assert [len(x) for x, _ in model.batches] == [250] * 3

    def test_its_validation_data_too(self):
        class Counting(Recorder):
            lengths = []

            def forward(self, x, y=None):
                if self.loc != 0 and not torch.is_grad_enabled():
                    self.lengths.append(len(x))
                super().forward(x)

        settings = {"num_epochs": 1, "progress": False, "data_plate": None, "validation": torch.arange(230.0)}
        fit(Counting(), no_latents, SGVB(kl="sampled"), torch.arange(250.0), **settings)
        assert Counting.lengths == [230]

    def test_a_batch_size_would_mean_nothing(self):
        with pytest.raises(SettingError, match="batch_size=5"):
            fit(Recorder(), no_latents, SGVB(kl="sampled"), X, batch_size=5, data_plate=None, progress=False)

    def test_a_stream_has_no_whole(self):
        with pytest.raises(DataError, match="tensors"):
            fit(Recorder(), no_latents, SGVB(kl="sampled"), Stream(), data_plate=None, progress=False)


class Loading(Dataset):
    """Squares that remember which of them were asked for."""

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.loaded.append(index)
        return X[index], Y[index]


ORDERED = {
    "tensor": lambda: X,
    "tuple": lambda: (X, Y),
    "mapping": lambda: {"x": X, "y": Y},
    "dataset": lambda: TensorDataset(X, Y),
}


def columns(batches):
    return [torch.stack([*batch.args, *batch.kwargs.values()]).tolist() for batch in batches]


class TestEnteringAnEpoch:
    @pytest.mark.parametrize("form", ORDERED)
    @pytest.mark.parametrize("skip", [0, 1, 3, 4])
    def test_the_rest_of_the_epoch_is_the_same_and_so_is_the_next_one(self, form, skip):
        source = as_source(ORDERED[form](), batch_size=3)
        assert source.can_skip
        whole, entered = (torch.Generator().manual_seed(5) for _ in range(2))
        expected = columns(source.batches(whole))
        assert columns(source.batches(entered, skip=skip)) == expected[skip:]
        assert torch.equal(whole.get_state(), entered.get_state())
        assert columns(source.batches(whole)) == columns(source.batches(entered)) != expected

    @pytest.mark.parametrize("form", ORDERED)
    def test_without_a_generator_the_order_is_that_of_the_rows(self, form):
        batches = columns(as_source(ORDERED[form](), batch_size=3).batches(skip=2))
        assert [batch[0] for batch in batches] == [[6.0, 7.0, 8.0], [9.0]]

    def test_rows_that_are_passed_over_are_not_loaded(self):
        dataset = Loading()
        source = as_source(dataset, batch_size=3)
        rows = [int(x) for batch in source.batches(torch.Generator().manual_seed(0), skip=2) for x in batch.args[0]]
        assert dataset.loaded == rows
        assert len(rows) == 4

    @pytest.mark.parametrize("form", [*ORDERED, "stream"])
    def test_torchs_generator_is_left_alone(self, form):
        source = as_source((ORDERED | {"stream": Stream})[form](), batch_size=3)
        before = torch.get_rng_state()
        list(source.batches())
        list(source.batches(torch.Generator()))
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("data", [DataLoader(Squares(), batch_size=3), Stream()])
    def test_an_order_that_is_not_ours_can_only_be_followed(self, data):
        source = as_source(data)
        assert not source.can_skip
        with pytest.raises(SettingError, match="order of its own"):
            next(source.batches(skip=1))

    @pytest.mark.parametrize("skip", [-1, 5])
    def test_batches_that_are_not_there(self, skip):
        with pytest.raises(SettingError, match=f"0 and the number of batches in an epoch, 4; got {skip}"):
            next(as_source(X, batch_size=3).batches(skip=skip))


class Counting(IterableDataset):
    """An endless stream that tells and takes its place, as Hugging Face's do."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        while True:
            self.next += 1
            yield torch.tensor(float(self.next))

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Stateful(DataLoader):
    """A loader that tells and takes its place, as torchdata's does."""

    place = 0

    def __iter__(self):
        while True:
            self.place += 1
            yield torch.full((2,), float(self.place))

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class TestStates:
    def test_what_we_order_ourselves_has_none(self):
        for data in (X, {"x": X}, TensorDataset(X), Stream()):
            source = as_source(data)
            assert source.state() == {}
            source.load_state({})

    @pytest.mark.parametrize("sampler", [False, True])
    def test_a_loaders_own_generator_is_one(self, sampler):
        own = torch.Generator().manual_seed(3)
        order = {"sampler": RandomSampler(X, generator=own)} if sampler else {"shuffle": True, "generator": own}
        source = as_source(DataLoader(TensorDataset(X), batch_size=3, **order))
        source.first()
        state = source.state()
        first, second = columns(source.batches()), columns(source.batches())
        source.load_state(state)
        assert columns(source.batches()) == first != second

    def test_the_first_batch_does_not_move_a_loaders_generator(self):
        own = torch.Generator().manual_seed(3)
        source = as_source(DataLoader(TensorDataset(X), shuffle=True, generator=own))
        before = own.get_state()
        source.first()
        assert torch.equal(before, own.get_state())

    @pytest.mark.parametrize("data", [Counting, lambda: DataLoader(Counting(), batch_size=2), lambda: Stateful(X)])
    def test_a_stream_that_keeps_its_place_goes_on_from_it(self, data):
        source = as_source(data(), *([2] if data is Counting else []))
        for _ in range(2):  # a fit looks at the first batch before it begins
            assert columns([source.first()]) == columns([source.first()])
            begin = source.state()
            passing = source.batches()
            ahead = columns([next(passing) for _ in range(3)])
            state = source.state()
            rest = columns([next(passing) for _ in range(3)])
            assert rest != ahead
            other = as_source(data(), *([2] if data is Counting else []))
            other.first()
            other.load_state(state)
            passing = other.batches()
            assert columns([next(passing) for _ in range(3)]) == rest
            source.load_state(begin)
            assert columns([next(iter(source.batches()))]) == ahead[:1]
            source = other

    def test_the_state_of_another_kind_of_data_is_refused(self):
        with pytest.raises(DataError, match=r"states of \['stream'\] and are one with states of \[\]"):
            as_source(X).load_state(as_source(Counting()).state())
