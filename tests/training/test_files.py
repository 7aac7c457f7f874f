"""Files of tensors and JSON: what they hold comes back, and what they can't hold is refused by name."""

import json

import pytest
import torch
from torch import nn

from pyro_aevb.errors import FileError
from pyro_aevb.training.files import Contents, read_file, write_file


def test_tensors_come_back_whatever_their_type_and_layout(tmp_path):
    torch.manual_seed(0)
    shared = torch.randn(4, 6)
    tensors = {
        "whole": shared,
        "view": shared[1:3],
        "turned": shared.t(),
        "expanded": torch.ones(1, 3).expand(5, 3),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False]),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "with a gradient": nn.Parameter(torch.randn(2)),
    }
    write_file(tmp_path / "file", Contents({"a": [1, {"b": None}]}, tensors))
    header, found = read_file(tmp_path / "file")
    assert header["a"] == [1, {"b": None}]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach()), name


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"extra": 1}, r"'x' can't be saved: it is of type dict"),
        (torch.eye(3).to_sparse(), r"'x' can't be saved: it is a torch.sparse_coo tensor"),
        (torch.zeros(2, dtype=torch.complex128), "Could not write.*complex128"),
    ],
    ids=["no tensor", "sparse", "a type that safetensors lacks"],
)
def test_what_no_file_holds(value, match, tmp_path):
    path = tmp_path / "file"
    write_file(path, Contents({}, {"x": torch.ones(2)}))
    with pytest.raises(FileError, match=match):
        write_file(path, Contents({}, {"x": value}))
    assert torch.equal(read_file(path).tensors["x"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_header_that_is_no_json(tmp_path):
    with pytest.raises(FileError, match="no JSON values"):
        write_file(tmp_path / "file", Contents({"a": object()}, {}))


def test_a_header_is_under_the_checksum(tmp_path):
    path = tmp_path / "file"
    write_file(path, Contents({"rate": 0.001}, {"x": torch.ones(2)}))
    whole = path.read_bytes()
    assert b"0.001" in whole
    path.write_bytes(whole.replace(b"0.001", b"0.003"))
    assert json.loads(path.read_bytes()[8 : 8 + int.from_bytes(whole[:8], "little")])  # it still is a header
    with pytest.raises(FileError, match=r"damaged.*checksum"):
        read_file(path)
