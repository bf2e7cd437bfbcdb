"""Files of weights that must not be taken in: none of them runs anything, and each is refused with its reason."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import evaluate
from models.checkpoint_files import read_checkpoint
from models.checkpoints import load_weights, read_state_dict
from models.errors import CheckpointError, UserError
from tests.checkpoint_case import lightning, network, published, save
from tests.tiny_run import options
from training.fit import find_resumable


class Runs:
    """Unpickling this creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir '{self.path}'",)


def _rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], compression: int) -> Path:
    """The same zip archive with other members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


# Code


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict"])
def test_code_is_named_and_not_run(tmp_path: Path, where: str, zipped: bool) -> None:
    made = tmp_path / "made"
    content = published(network())
    if where == "state_dict":
        content[where]["model.0.weight"] = Runs(made)
    else:
        content[where] = Runs(made)
    path = tmp_path / "x.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x\.ckpt .*posix\.system"):
        load_weights(network(), path)
    assert not made.exists()
    # The file does what it is meant to do where somebody lets it.
    torch.load(path, weights_only=False)
    assert made.exists()


def test_resuming_runs_nothing_either(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", published(network()) | {"hyper_parameters": Runs(tmp_path / "made")})
    with (
        pytest.warns(UserWarning, match=r"asks for Python objects .* posix\.system"),
        pytest.raises(CheckpointError, match="--force-no-resume"),
    ):
        find_resumable(tmp_path)
    assert not (tmp_path / "made").exists()


def test_everything_that_a_file_asks_for_is_named(tmp_path: Path) -> None:
    content = {"a": torch.utils.data.TensorDataset(torch.ones(1)), "b": nn.Linear(1, 1)}
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(save(tmp_path / "x.ckpt", content))
    for name in ("torch.utils.data.dataset.TensorDataset", "torch.nn.modules.linear.Linear"):
        assert name in str(caught.value)
    assert "save {'state_dict': content['state_dict']}" in str(caught.value)


def _script(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/constants.pkl", pickle.dumps((), 2))
        archive.writestr("x/data/0", bytes(16))
    return path


def test_torchscript_archive_runs_nothing(tmp_path: Path) -> None:
    path = _script(tmp_path / "x.pt", pickle.dumps(Runs(tmp_path / "made"), 2))
    with pytest.raises(CheckpointError, match=r"x\.pt asks for .*posix\.system"):
        read_checkpoint(path)
    assert not (tmp_path / "made").exists()
    # getattr by a dotted name, which pickle has since protocol 4
    path = _script(tmp_path / "y.pt", b"\x80\x04\x8c\x05torch\x8c\x0bhub.os.path\x93.")
    with pytest.raises(CheckpointError, match=r"torch\.hub\.os\.path"):
        read_checkpoint(path)


def test_damaged_torchscript_archive(tmp_path: Path) -> None:
    for data in (b"", b"\x80\x02.", b"\x80\x02K\x01", pickle.dumps({"a": 1}, 2)[:-3]):
        with pytest.raises(CheckpointError, match="damaged TorchScript archive"):
            read_checkpoint(_script(tmp_path / "x.pt", data))


def test_torchscript_archive_that_would_fill_the_memory_with_numbers(tmp_path: Path) -> None:
    path = _script(tmp_path / "x.pt", b"\x80\x02}r\xff\xff\xff\x3f.")
    with pytest.raises(CheckpointError, match=r"it has 9 bytes and an object number 1,073,741,823"):
        read_checkpoint(path)


def test_torchscript_module_that_holds_itself(tmp_path: Path) -> None:
    # A module whose attribute "a" is itself, and a tensor "b" beside it, that claims to be larger than its 16 bytes.
    module = b"c__torch__.M\nM\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00"
    tensor = b"X\x01\x00\x00\x00bctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    tensor += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K%b\x85K\x01\x85\x89}tR"
    path = _script(tmp_path / "x.pt", b"\x80\x02" + module + tensor % b"\x04" + b"ub.")
    assert {key: value.tolist() for key, value in read_state_dict(path).items()} == {"b": [0.0] * 4}
    with pytest.raises(CheckpointError, match=r"damaged TorchScript archive.*out of bounds"):
        read_checkpoint(_script(tmp_path / "y.pt", b"\x80\x02" + module + tensor % b"\x05" + b"ub."))


# Size


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save(tmp_path / "whole.ckpt", {"state_dict": {"model.a": torch.zeros(4_000_000)}})
    bomb = _rewrite(whole, tmp_path / "bomb.ckpt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    assert torch.load(bomb, weights_only=True)["state_dict"]["model.a"].shape == (4_000_000,)
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpacks the file"))
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt has [\d,]+ bytes and would unpack to 16,0\d\d,\d\d\d"):
        read_checkpoint(bomb)


def test_compression_by_itself_is_no_bomb(tmp_path: Path) -> None:
    source, target = network(), network()
    whole = save(tmp_path / "whole.ckpt", source.state_dict())
    load_weights(target, _rewrite(whole, tmp_path / "x.ckpt", lambda _, data: data, zipfile.ZIP_DEFLATED))
    assert torch.equal(target[0].weight, source[0].weight)


def test_record_that_is_smaller_than_its_tensor(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.ckpt", {"a": torch.zeros(4)})

    def claim(name: str, data: bytes) -> bytes:
        return data.replace(b"K\x04", b"K\xc8") if name.endswith("data.pkl") else data

    path = _rewrite(whole, tmp_path / "x.ckpt", claim, zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match=r"damaged or cut short.*16 bytes"):
        read_checkpoint(path)


def test_tensor_that_repeats_one_value_a_trillion_times(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", {"a": torch.zeros(1).expand(10**12)})
    with pytest.raises(CheckpointError, match=r"'a' is \(1000000000000,\), 4,000,000,000,000 bytes, .* holds 4\."):
        read_state_dict(path)
    save(
        tmp_path / "last.ckpt", {"epoch": 1, "optimizer_states": [], "state_dict": {"a": torch.ones(1).expand(10**12)}}
    )
    with pytest.warns(UserWarning, match="of which the file holds"), pytest.raises(CheckpointError):
        find_resumable(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "quantised", "meta"])
def test_tensors_without_all_their_values(tmp_path: Path, kind: str) -> None:
    tensor = torch.ones(2, 3, device="meta" if kind == "meta" else "cpu")
    if kind == "sparse":
        tensor = tensor.to_sparse()
    elif kind == "quantised":
        tensor = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointError, match=r"'a' is no plain tensor"):
        read_state_dict(save(tmp_path / "x.ckpt", {"a": tensor}))


# Damage


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    content = published(network(), network())
    files = {name: io.BytesIO() for name in ("zip", "pickles")}
    torch.save(content, files["zip"])
    torch.save(content, files["pickles"], _use_new_zipfile_serialization=False)
    return {name: file.getvalue() for name, file in files.items()}


@pytest.mark.parametrize("form", ["zip", "pickles"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_short_anywhere(tmp_path: Path, whole: dict[str, bytes], form: str, share: float) -> None:
    path = tmp_path / "x.ckpt"
    keep = int(share * len(whole[form]))
    path.write_bytes(whole[form][:keep])
    with pytest.raises(CheckpointError) as caught:
        load_weights(network(), path)
    sentences = [
        f"{path} is empty",
        f"{path} is text",
        f"{path} ({keep:,} bytes) cannot be read as a checkpoint; it is",
    ]
    if form == "pickles":  # cut in the middle of a name, that name is asked for
        sentences.append(f"{path} asks for Python objects")
    assert str(caught.value).startswith(tuple(sentences))


@pytest.mark.parametrize("form", ["zip", "pickles"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_one_wrong_byte(tmp_path: Path, whole: dict[str, bytes], form: str, share: float, mask: int) -> None:
    """Refused with a sentence, or harmless, as in a name; never another kind of error."""
    data = bytearray(whole[form])
    data[int(share * len(data))] ^= mask
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        load_weights(network(), path)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", r"x\.ckpt is empty: 0 bytes"),
        (
            b"<!DOCTYPE html>\n<html><title>404</title>",
            r"x\.ckpt is a web page, not .*<!DOCTYPE html> <html>.*download",
        ),
        (b"Not Found", r"x\.ckpt is text, not a checkpoint \('Not Found'\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), r"is no checkpoint: it begins with the bytes 89 50 4e 47"),
        (b"PK\x03\x04" + bytes(100), r"\(104 bytes\) cannot be read as a checkpoint; it is damaged or cut short"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(tmp_path / "x.ckpt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"There is no checkpoint {tmp_path / 'x.ckpt'}"):
        read_checkpoint(tmp_path / "x.ckpt")
    save(tmp_path / "last.ckpt", {})
    with pytest.raises(CheckpointError, match=r"is a folder; name a file in it \(last\.ckpt\)"):
        read_checkpoint(tmp_path)


def test_broken_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(network().state_dict(), path)
    data = path.read_bytes()
    for broken in (data[:-3], data[:20], b"\xff" * 8 + data[8:], data.replace(b'"F32"', b'"F99"'), bytes(16)):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=rf"x\.safetensors \({len(broken)} bytes\) cannot be read"):
            load_weights(network(), path)


# Content


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}, {"model_state_dict": {"a": 1}}])
def test_file_without_a_network(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt holds no network"):
        load_weights(network(), save(tmp_path / "x.ckpt", content))
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        load_weights(network(), save(tmp_path / "y.ckpt", [1]))


def test_swapped_and_integer_weights(tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.weight"], state["0.bias"] = state["0.bias"], state["0.weight"]
    state["1.weight"] = state["1.weight"].to(torch.int8)
    with pytest.raises(CheckpointError) as caught:
        load_weights(network(), save(tmp_path / "x.ckpt", state))
    for part in (
        "'0.weight' is (2,) in the file and (2, 3) in the network",
        "'0.bias' is (2, 3) in the file and (2,) in the network",
        "'1.weight' is (2,) of integers in the file and (2,) in the network",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    target = network()
    before = target[0].weight.clone()
    state = network().state_dict()
    state["0.weight"][1, 1:] = value
    state["1.running_var"][0] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinite: '0\.weight': 2 of 6 values; '1\.running_var': 1 of 2"):
        load_weights(target, save(tmp_path / "x.ckpt", state))
    assert torch.equal(target[0].weight, before)


def test_spoilt_average_does_not_spoil_the_weights(tmp_path: Path) -> None:
    average = network()
    average[0].weight.data.fill_(float("nan"))
    path = save(tmp_path / "x.ckpt", published(network(), average))
    load_weights(network(), path)
    with pytest.raises(CheckpointError, match="6 of 6"):
        load_weights(network(), path, ema=True)


def test_command_line_says_it_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_text("<html>")
    with pytest.raises(UserError, match="is a web page"):
        evaluate.main(options(tmp_path, "standard", "--weights", str(tmp_path / "x.ckpt")))


def test_pickles_here_are_what_they_claim_to_be() -> None:
    """The attack of this file is the real one: its pickle names a function to call."""
    names = [argument for _, argument, _ in pickletools.genops(pickle.dumps(Runs(Path("x")), 2)) if argument]
    assert "posix system" in names
    assert lightning(network())
