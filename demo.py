"""The main job from end to end, on two CPU cores in a few minutes: train, B-cosify, fine-tune, evaluate, explain.

Writes `explanations.png`, `localisation.png`, `curves.png`, `results.json` and `report.html`, and prints a table of figures.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    import bcos_kernels as bk
    from interpretability.localisation import Localisation

DATASET = "Digits"
CONVENTIONAL, CONVERTED = "standard", "bcosification"
# Not just "experiments": a run that starts afresh deletes this folder, whatever --output is.
EXPERIMENTS = "demo_experiments"
GRID = 2
SHOWN = 12


@dataclass
class Results:
    """What the demo measures. Accuracies and localisation scores are shares between 0 and 1."""

    experiment_name: str
    conventional_accuracy: float = 0.0
    converted_accuracy: float = 0.0
    bcos_accuracy: float = 0.0
    bcos_localisation: float = 0.0
    conventional_localisation: float = 0.0
    grids: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """The table that is printed and shown in the report."""
        return [
            ("test accuracy, conventional network", f"{self.conventional_accuracy:.1%}"),
            ("test accuracy, right after conversion", f"{self.converted_accuracy:.1%}"),
            ("test accuracy, B-cos network (fine-tuned)", f"{self.bcos_accuracy:.1%}"),
            ("localisation, B-cos explanation", f"{self.bcos_localisation:.3f}"),
            ("localisation, Input x Gradient on the conventional network", f"{self.conventional_localisation:.3f}"),
            ("localisation, an explanation that knows nothing", f"{1 / GRID**2:.3f}"),
            *((f"seconds, {name}", f"{seconds:.1f}") for name, seconds in self.seconds.items()),
            ("seconds, everything", f"{sum(self.seconds.values()):.1f}"),
        ]


def get_parser() -> argparse.ArgumentParser:
    """The options of demo.py."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    parser.add_argument(
        "--experiment_name", default="resnet_10", help="network (default: resnet_10; smaller: resnet_10_w8)"
    )
    parser.add_argument("--epochs", type=int, help="train both networks this long instead of the recipe's epochs")
    parser.add_argument(
        "--resume", action="store_true", help="keep what an earlier run has trained; default: start afresh"
    )
    return parser


def main(argv: list[str] | None = None) -> Results:
    """Runs the demo.

    Args:
        argv: the options; default: the command line.

    Raises:
        models.errors.UserError: options that do not fit.
        ImportError: matplotlib is missing; the message names the extra. Raised before anything is trained.
    """
    args = get_parser().parse_args(argv)
    # The libraries take seconds to import; --help should not.
    import evaluate
    import train
    from interpretability import figures
    from interpretability.attribution import bcos_contributions, input_x_gradient
    from interpretability.localisation import localise
    from interpretability.report import text_table
    from models import load_checkpoint
    from models.errors import UserError

    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs must be at least 1, got {args.epochs}.")
    figures.new_figure(1, 1)  # fails now, not after minutes of training, where matplotlib is missing
    experiments = args.output / EXPERIMENTS
    if experiments.exists() and not args.resume:
        shutil.rmtree(experiments)
    args.output.mkdir(parents=True, exist_ok=True)

    results = Results(args.experiment_name)
    epochs = [] if args.epochs is None else ["--max_epochs", str(args.epochs)]

    def options(base_network: str, *more: str) -> list[str]:
        names = ["--dataset", DATASET, "--base_network", base_network, "--experiment_name", args.experiment_name]
        return [*names, "--base_directory", str(experiments), *more]

    with step(results, 1, "train the conventional network"):
        conventional_directory = train.main(options(CONVENTIONAL, *epochs))
        results.conventional_accuracy = evaluate.main(options(CONVENTIONAL, "--reload", "best"))["acc1"]
    with step(results, 2, "convert it"):
        results.converted_accuracy = evaluate.main(options(CONVERTED))["acc1"]
    with step(results, 3, "fine-tune the B-cos network"):
        bcos_directory = train.main(options(CONVERTED, *epochs))
        results.bcos_accuracy = evaluate.main(options(CONVERTED, "--reload", "best"))["acc1"]
    assert conventional_directory is not None  # None only after --list
    assert bcos_directory is not None

    conventional, bcos = (
        load_checkpoint(DATASET, base_network, args.experiment_name, reload="best", base_directory=experiments)
        for base_network in (CONVENTIONAL, CONVERTED)
    )
    normalised, six_channels = (
        test_images(base_network, args.experiment_name) for base_network in (CONVENTIONAL, CONVERTED)
    )
    with step(results, 4, "localisation"):
        bcos_score = localise(bcos, six_channels, n=GRID)
        conventional_score = localise(conventional, normalised, n=GRID, attribution=input_x_gradient(conventional))
        results.bcos_localisation, results.conventional_localisation = bcos_score.mean, conventional_score.mean
        results.grids = {"B-cos": len(bcos_score.scores), "conventional": len(conventional_score.scores)}
    with step(results, 5, "draw the pictures"):
        pictures = {
            "explanations": draw_explanations(bcos, six_channels),
            "localisation": draw_localisation(
                bcos_score,
                {
                    "B-cos network": (bcos_contributions(bcos), six_channels),
                    "Input x Gradient": (input_x_gradient(conventional), normalised),
                },
            ),
            "curves": figures.training_curves(
                {
                    "conventional": read_metrics(conventional_directory / "metrics.csv"),
                    "B-cos": read_metrics(bcos_directory / "metrics.csv"),
                }
            ),
        }
        for name, picture in pictures.items():
            picture.savefig(args.output / f"{name}.png", dpi=110)
    write_results(args.output, results, pictures)
    print(f"\nOpen {args.output / 'report.html'} in a browser. Pictures: {args.output}\n")
    print(text_table("B-cosification of a small ResNet on handwritten digits", results.rows()))
    return results


@contextmanager
def step(results: Results, number: int, name: str) -> Iterator[None]:
    """Announces a step and keeps its time."""
    print(f"\n[{number}/5] {name[0].upper()}{name[1:]}", flush=True)
    start = time.perf_counter()
    yield
    results.seconds[name] = time.perf_counter() - start


def test_images(base_network: str, experiment_name: str) -> Any:
    """The data set of test images, in the form that the network takes."""
    from models import experiments
    from training.data import DataModule

    experiment = experiments.find(DATASET, base_network, experiment_name)
    data = DataModule(experiment.data, experiment.seed)
    data.setup("test")
    return data.val_dataloader().dataset


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of `metrics.csv`; what was not measured is NaN."""
    with path.open(newline="") as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def draw_explanations(bcos: nn.Module, dataset: Any) -> Figure:
    """The first test image of every class, then those of which the network was least sure; each for the predicted class."""
    import torch

    import bcos_kernels as bk
    from interpretability.figures import explanation_figure
    from interpretability.localisation import default_smooth

    images = torch.stack([dataset[index][0] for index in range(len(dataset))])
    labels = [int(dataset[index][1]) for index in range(len(dataset))]
    with torch.no_grad():
        best, second = bcos(images).topk(2, dim=1).values.unbind(1)
    first = [labels.index(label) for label in sorted(set(labels))]
    unsure = [index for index in (best - second).argsort().tolist() if index not in first]
    chosen = (first + unsure)[:SHOWN]
    explanation = grey(bk.explain(bcos, images[chosen]))
    titles = [
        f"{labels[index]}" if labels[index] == guess else f"{labels[index]}, taken for {guess}"
        for index, guess in zip(chosen, explanation.targets.tolist(), strict=True)
    ]
    return explanation_figure(
        explanation.images,
        explanation.rgba(smooth=default_smooth(images.shape[-1])),
        explanation.contributions,
        titles,
        # White ink, found to speak for a class, would be white on white.
        background=1.0 if float(images[:, :3].median()) > 0.5 else 0.5,
    )


def grey(explanation: bk.Explanation) -> bk.Explanation:
    """The explanation of grey images as such: the weights of red, green and blue, which only act in sum, become their mean.

    The contributions stay what they are.
    """
    import torch

    halves = [half.mean(1, keepdim=True).expand_as(half) for half in explanation.weights.chunk(2, dim=1)]
    return dataclasses.replace(explanation, weights=torch.cat(halves, dim=1))


def draw_localisation(score: Localisation, methods: Mapping[str, tuple[Any, Any]]) -> Figure:
    """The first grid of `score`, attributed by each of `methods`: its attribution, and the images in the form it takes."""
    import torch
    from torch.nn import functional as F

    from interpretability.figures import localisation_figure
    from interpretability.localisation import default_smooth, tile

    indices, targets = score.indices[0].tolist(), score.targets[0]
    picture: Tensor | None = None
    rows = {}
    for name, (attribution, dataset) in methods.items():
        grid = tile(torch.stack([dataset[index][0] for index in indices]), GRID)
        picture = grid[:3] if picture is None else picture
        smooth = default_smooth(grid.shape[-1] // GRID)
        maps = attribution(grid.repeat(GRID**2, 1, 1, 1), targets)
        rows[name] = F.avg_pool2d(maps[:, None], smooth, stride=1, padding=smooth // 2)[:, 0]
    assert picture is not None
    return localisation_figure(picture, rows, [f"“{target}”" for target in targets.tolist()], GRID)


def write_results(output: Path, results: Results, pictures: Mapping[str, Figure]) -> None:
    """Writes `results.json` and `report.html`. `pictures`: "explanations", "localisation" and "curves"."""
    from interpretability.report import html_page

    summary = {**vars(results), "environment": dict(environment())}
    (output / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    page = html_page("A network that explains itself", INTRODUCTION, report_sections(results, pictures))
    (output / "report.html").write_text(page, encoding="utf-8")


INTRODUCTION = (
    "A conventional network was trained to read handwritten digits, turned into a B-cos network (“B-cosified”), and "
    "fine-tuned for a few epochs. What is special about a B-cos network: for every image, each of its answers is, up to an "
    "offset, a weighted sum of the pixels, and the weights can be read off exactly. The pictures below show them. They are "
    "not a guess about the network from outside; they are what it computed."
)


def report_sections(results: Results, pictures: Mapping[str, Figure]) -> list[Any]:
    """The parts of the report."""
    from interpretability.report import Section

    options = f"--dataset {DATASET} --experiment_name {results.experiment_name} --base_directory demo/{EXPERIMENTS}"
    return [
        Section(
            "What came out",
            [
                "Accuracy is measured on 360 images that were not trained on. Right after conversion the network can do "
                "little: every layer now also weighs how well its input fits its weights, and the weights were not trained "
                "for that. Fine-tuning teaches them. Of each training, the epoch with the best accuracy on these images is "
                "the one that counts, so both accuracies are a little flattered.",
            ],
            table=results.rows(),
        ),
        Section(
            "Why is this a 3?",
            [
                "For each digit: the image, the explanation, and the contributions, for the class that the network predicts. "
                "The last two are digits that the network was least sure of.",
                "The explanation shows what the network looks for at each pixel, dark or bright, and how much that matters: "
                "the more it does, the stronger the picture; where nothing speaks for the class, it is empty. The images "
                "are grey, so only the sum of a pixel's weights for red, green and blue acts, and that is what is drawn.",
                "The contributions are pixel times weight: red speaks for the class, blue against it, white does not matter.",
            ],
            picture=pictures["explanations"],
            caption="Images, explanations and contribution maps of test digits",
        ),
        Section(
            "Does it look at the right place?",
            [
                f"Four digits are put into one picture, and the network is asked for each: what speaks for it? The answer "
                "should lie on that digit, inside the green frame. The localisation score is the share of what is red that "
                f"does: 1 is perfect, and {1 / GRID**2:.2f} is what an explanation gets that knows nothing. Over "
                f"{results.grids.get('B-cos', 0)} such pictures, the B-cos explanation scores "
                f"{results.bcos_localisation:.2f}. Input x Gradient, a usual explanation of conventional networks, scores "
                f"{results.conventional_localisation:.2f} on the network that this one was made from.",
            ],
            picture=pictures["localisation"],
            caption="Four digits in one picture, and what speaks for each of them by two methods",
        ),
        Section(
            "How it was trained",
            [
                "The losses of the two networks differ in kind and cannot be compared: the conventional one is trained with "
                "cross-entropy, the B-cos network with a yes or no for every class, where “no” is 0.1 instead of 0. That is "
                "why its training loss ends near 0.29 and cannot get lower.",
            ],
            picture=pictures["curves"],
            caption="Accuracy and loss over the epochs",
        ),
        Section(
            "Do it again",
            [
                "All of this is made by make demo. Seeds are fixed: the same versions, machine and threads give the "
                "same figures, up to rounding. The steps one by one:"
            ],
            commands=[
                f"python train.py {options} --base_network {CONVENTIONAL}",
                f"python evaluate.py {options} --base_network {CONVENTIONAL} --reload best",
                f"python evaluate.py {options} --base_network {CONVERTED}   # right after conversion",
                f"python train.py {options} --base_network {CONVERTED}",
                f"python evaluate.py {options} --base_network {CONVERTED} --reload best",
                f"python demo.py --experiment_name {results.experiment_name} --resume   # the rest, with these networks",
            ],
        ),
        Section("Where it ran", table=environment()),
    ]


def environment() -> Sequence[tuple[str, str]]:
    """What the figures depend on besides the code."""
    import lightning
    import torch
    import torchvision

    import bcos_kernels as bk

    return [
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("torchvision", torchvision.__version__),
        ("Lightning", lightning.__version__),
        ("bcos_kernels", bk.__version__),
        ("system", f"{platform.system()} {platform.machine()}"),
        (
            "device",
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}",
        ),
    ]


if __name__ == "__main__":
    # Read when torch is loaded, which is why it is set here. Threads that wait busily starve each other on a shared machine:
    # on 2 cores at load 6 a training step took 1.4 to 4.6 s with "ACTIVE" and 0.1 s with "PASSIVE".
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from models import cli

    cli.run(main)
