"""The demo: its pictures, its page, and the whole of it with a tiny network and a few epochs."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bcos_kernels as bk
import demo
from interpretability import figures
from interpretability.report import Section, html_page, text_table

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from threads, and lose much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class SmallBcos(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = bk.BcosConv2d(6, 8, 3, padding=1)
        self.head = bk.BcosConv2d(8, 10, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images)).mean((2, 3))


def embedded(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_the_page_is_one_file_and_escapes_its_texts() -> None:
    picture = figures.localisation_figure(torch.rand(3, 8, 8), {"a method": torch.randn(4, 8, 8)}, list("abcd"), 2)
    sections = [
        Section(
            "A <b>", ["x < y & z"], table=[("a", "0.5")], picture=picture, caption='a "quote"', commands=["run > it"]
        ),
        Section("B"),
    ]
    page = html_page("<script>alert(1)</script>", "intro", sections)
    assert page.count("<script") == 0
    assert "x &lt; y &amp; z" in page
    assert "run &gt; it" in page
    assert 'alt="a &quot;quote&quot;"' in page
    assert len(embedded(page)) == 1
    assert embedded(page)[0].startswith(PNG)
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing may be loaded from elsewhere"
    assert page.index("A &lt;b&gt;") < page.index("<h2>B</h2>")


def test_the_table_lines_up() -> None:
    lines = text_table("Title", [("short", "1"), ("a longer name", "22.5")]).splitlines()
    assert lines[0] == "Title"
    assert lines[2:4] == ["short             1", "a longer name  22.5"]


def test_colours_are_laid_over_the_background() -> None:
    rgba = torch.tensor([[1.0, 0.5, 0.0, 0.5], [1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(figures.on_background(rgba), torch.tensor([[1.0, 0.75, 0.5], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(figures.on_background(rgba, 0.0)[0], torch.tensor([0.5, 0.25, 0.0]))
    with pytest.raises(ValueError, match="rgba: expected red, green, blue and alpha"):
        figures.on_background(rgba[:, :3])


def test_contributions_are_drawn_symmetric_and_clipped() -> None:
    values = torch.linspace(-1, 0.5, 1000).reshape(20, 50)
    values[0, 0] = -100.0  # an outlier may not wash out the rest
    axes = figures.new_figure(1, 1).subplots()
    figures.draw_contributions(axes, values)
    low, high = axes.images[0].get_clim()
    assert low == -high
    assert 0.9 < high < 1.1
    assert axes.images[0].get_cmap().name == "bwr"
    assert figures.clip_range(torch.zeros(3, 3)) == 1.0
    with pytest.raises(ValueError, match=r"contributions: expected one map \[H, W\], got shape \[2, 3, 4\]"):
        figures.draw_contributions(axes, torch.zeros(2, 3, 4))


def test_a_dozen_explanations_fill_the_figure() -> None:
    images, rgba, maps = torch.rand(7, 3, 5, 5), torch.rand(7, 5, 5, 4), torch.randn(7, 5, 5)
    figure = figures.explanation_figure(images, rgba, maps, list("abcdefg"), columns=4)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(figure.axes) == 24
    assert len(drawn) == 21
    assert [axes.get_title() for axes in drawn if axes.get_title()] == list("abcdefg")
    with pytest.raises(ValueError, match="got 7, 7, 7 and 2"):
        figures.explanation_figure(images, rgba, maps, ["a", "b"])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'bcos_kernels\[train\]'"):
        figures.new_figure(1, 1)
    with pytest.raises(ImportError, match="matplotlib"):
        demo.main(["--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists(), "before anything is trained"


def test_metrics_are_read_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,train_loss,train_acc1,val_loss,val_acc1\n0,1.5,0.5,1.25,0.75\n1,1,0.5,,\n")
    rows = demo.read_metrics(path)
    assert rows[0] == {"epoch": 0, "train_loss": 1.5, "train_acc1": 0.5, "val_loss": 1.25, "val_acc1": 0.75}
    accuracy, loss = figures.training_curves({"a network": rows}).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines == {"a network, training": [[1, 1.5], [2, 1]], "a network, test": [[1, 1.25]]}
    assert accuracy.get_legend() is not None


def test_grey_keeps_the_contributions_and_takes_the_colour() -> None:
    images = bk.AddInverse()(torch.rand(3, 1, 8, 8).expand(-1, 3, -1, -1))
    explanation = bk.explain(SmallBcos(), images)
    grey = demo.grey(explanation)
    torch.testing.assert_close(grey.contributions, explanation.contributions)
    colours = grey.rgba(smooth=1)[..., :3]
    torch.testing.assert_close(colours, colours[..., :1].expand_as(colours))
    assert not torch.allclose(explanation.rgba(smooth=1)[..., 0], explanation.rgba(smooth=1)[..., 1])


def test_every_class_is_explained_and_mistakes_are_named() -> None:
    images = bk.AddInverse()(torch.rand(40, 1, 8, 8).expand(-1, 3, -1, -1))
    model = SmallBcos().eval()
    dataset = TensorDataset(images, torch.arange(40) % 10)
    figure = demo.draw_explanations(model, dataset)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert [int(title[0]) for title in titles[:10]] == list(range(10))
    assert len(titles) == demo.SHOWN
    guesses = model(images).argmax(1)
    assert titles[1] == ("1" if guesses[1] == 1 else f"1, taken for {int(guesses[1])}")


def test_bad_epochs_are_refused(tmp_path: Path) -> None:
    from models.errors import UserError

    with pytest.raises(UserError, match="--epochs must be at least 1, got 0"):
        demo.main(["--epochs", "0", "--output", str(tmp_path)])


@pytest.mark.slow
def test_the_demo_runs_and_starts_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a network of 8 channels and 5 epochs; the accuracies and scores of the real one are in its own report."""
    pytest.importorskip("lightning")
    stale = tmp_path / demo.EXPERIMENTS / "Digits" / "standard" / "resnet_10_w8" / "last.ckpt"
    stale.parent.mkdir(parents=True)
    stale.write_text("not a checkpoint")
    (tmp_path / "mine.txt").write_text("keep me")

    arguments = ["--output", str(tmp_path), "--experiment_name", "resnet_10_w8", "--epochs", "5"]
    results = demo.main(arguments)

    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert stale.stat().st_size > 1000
    assert results.conventional_accuracy > 0.7
    assert results.converted_accuracy < results.bcos_accuracy
    assert results.bcos_accuracy > 0.8
    assert results.bcos_localisation > max(0.35, results.conventional_localisation)
    for name in ("explanations", "localisation", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(embedded(page)) == 3
    assert f"{results.bcos_accuracy:.1%}" in page
    assert str(tmp_path) not in page
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["bcos_localisation"] == results.bcos_localisation
    table = capsys.readouterr().out.rstrip().splitlines()
    assert table[-2].startswith("seconds, everything")
    assert any(line.startswith("test accuracy, right after conversion") for line in table[-14:])

    again = demo.main([*arguments, "--resume"])
    assert again.bcos_localisation == results.bcos_localisation
    assert "is trained" in capsys.readouterr().out
