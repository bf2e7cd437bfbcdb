"""The choice of a backend, and the sentences that explain it."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator

import pytest
import torch

import bcos_kernels as bk
from bcos_kernels import choice, dispatch, portable

X, W = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A backend that comes first, marks its results, and refuses MaxOut."""
    module = types.ModuleType("tests.picky")
    module.unavailable = lambda: None
    module.why_not = lambda call: "picky: no MaxOut here" if call.options.max_out > 1 else None
    module.conv2d = lambda *a: (r := portable.conv2d(*a))._replace(y=r.y + 1000)
    module.conv2d_backward = portable.conv2d_backward
    monkeypatch.setitem(sys.modules, "tests.picky", module)
    monkeypatch.setattr(dispatch, "BACKENDS", {"picky": "tests.picky", **dispatch.BACKENDS})
    monkeypatch.setattr(choice, "table", dict)  # nothing was measured
    dispatch.forget()
    with dispatch.forget_logged():
        yield module
    dispatch.forget()


def is_picky(y: torch.Tensor) -> bool:
    return bool((y > 500).all())


def test_automatic_choice_takes_the_first_that_can(picky: types.ModuleType) -> None:
    assert is_picky(bk.bcos_conv2d(X, W))
    assert not is_picky(bk.bcos_conv2d(X, W, max_out=2))


def test_next_backend_takes_over_and_says_so_once(picky: types.ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bcos_kernels"):
        for _ in range(3):
            bk.bcos_conv2d(X, W, max_out=2)
    assert [m for m in caplog.messages if "picky" in m] == ["picky: no MaxOut here; the next backend takes over"]


def test_named_backend_that_cannot_run_raises_its_sentence(picky: types.ModuleType) -> None:
    with pytest.raises(RuntimeError, match="picky: no MaxOut here"):
        bk.bcos_conv2d(X, W, max_out=2, backend="picky")


def test_unavailable_backend(picky: types.ModuleType) -> None:
    picky.unavailable = lambda: "picky: out today"
    dispatch.forget()
    assert bk.available_backends()["picky"] == "picky: out today"
    assert not is_picky(bk.bcos_conv2d(X, W))
    with pytest.raises(RuntimeError, match="picky: out today"):
        bk.bcos_conv2d(X, W, backend="picky")


def test_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", {"gone": "bcos_kernels.gone", **dispatch.BACKENDS})
    dispatch.forget()
    assert "gone: cannot be imported" in str(bk.available_backends()["gone"])
    assert bk.bcos_conv2d(X, W).shape == (1, 2, 4, 4)


def test_backward_of_a_named_backend_falls_back(picky: types.ModuleType) -> None:
    """Its forward pass has been done: a backward pass that it cannot run is no reason to lose it."""
    picky.conv2d = portable.conv2d
    x = X.clone().requires_grad_()
    y = bk.bcos_conv2d(x, W, backend="picky")
    picky.why_not = lambda call: "picky: no backward" if call.op.endswith("backward") else None
    y.sum().backward()
    expected = X.clone().requires_grad_()
    bk.bcos_conv2d(expected, W, backend="portable").sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_use_backend_is_a_switch_and_a_block(picky: types.ModuleType) -> None:
    with bk.use_backend("portable"):
        assert not is_picky(bk.bcos_conv2d(X, W))
        with bk.use_backend("picky"):
            assert is_picky(bk.bcos_conv2d(X, W))
        assert not is_picky(bk.bcos_conv2d(X, W))
        assert is_picky(bk.bcos_conv2d(X, W, backend="picky"))  # the argument wins
    switch = bk.use_backend("portable")
    assert not is_picky(bk.bcos_conv2d(X, W))
    switch.__exit__()
    assert is_picky(bk.bcos_conv2d(X, W))


def test_use_backend_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), bk.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.requested(None) == "auto"


def test_portable_and_reference_are_always_there() -> None:
    available = bk.available_backends()
    assert available["portable"] is None
    assert available["reference"] is None
