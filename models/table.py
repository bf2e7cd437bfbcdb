"""The README's table of networks: `python -m models.table` prints it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchvision.models

from models import experiments
from models.factory import untrained
from models.recipes import Experiment

#: Top-1 accuracy on ImageNet, per cent, from the model zoo in the README of B-cos v2: the conventional simple ViTs, and the
#: B-cos networks of the same sizes that were trained from scratch.
_B_COS_V2 = {
    "simple_vit_ti_patch16_224": (70.230, 59.960),
    "simple_vit_s_patch16_224": (74.470, 69.246),
    "simple_vit_b_patch16_224": (75.300, 74.408),
    "simple_vit_l_patch16_224": (75.710, 75.060),
    "vitc_ti_patch1_14": (72.590, 67.260),
    "vitc_s_patch1_14": (75.756, 74.504),
    "vitc_b_patch1_14": (76.790, 77.152),
    "vitc_l_patch1_14": (77.866, 77.782),
    "resnet18": (None, 68.736),
    "resnet50": (None, 75.882),
    "densenet121": (None, 73.612),
}

_GOLDEN = "public code's vectors"
_FULL_SIZE = "runs at full size"


@dataclass(frozen=True)
class _Row:
    base_network: str
    name: str
    verified: str


_ROWS = [
    _Row("bcosification", "resnet_18", _GOLDEN),
    _Row("bcosification", "resnet_50", _FULL_SIZE),
    _Row("bcosification", "resnet_50_V1", _FULL_SIZE),
    _Row("bcosification", "densenet_121", _GOLDEN),
    *(
        _Row(
            "vit_bcosification",
            f"bcosifyv2_bcos_{architecture}_0.001{warmup}_gapReorder",
            _GOLDEN if "_ti_" in architecture else _FULL_SIZE,
        )
        for architecture, warmup in (
            ("simple_vit_ti_patch16_224", ""),
            ("simple_vit_s_patch16_224", ""),
            ("simple_vit_b_patch16_224", "_lrWarmup"),
            ("simple_vit_l_patch16_224", "_lrWarmup"),
            ("vitc_ti_patch1_14", ""),
            ("vitc_s_patch1_14", ""),
            ("vitc_b_patch1_14", "_lrWarmup"),
            ("vitc_l_patch1_14", "_lrWarmup"),
        )
    ),
    _Row("clip_bcosification", "resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_ImageNet_bcosification", _GOLDEN),
]


def table() -> str:
    """Markdown. Parameters are counted, accuracies are published ones."""
    lines = [
        "| `--base_network` | `--experiment_name` | Parameters | Conventional | B-cos from scratch | Verified here |",
        "|---|---|---|---|---|---|",
    ]
    for row in _ROWS:
        experiment = experiments.find("ImageNet", row.base_network, row.name)
        conventional, from_scratch = _published(experiment)
        cells = [f"`{row.base_network}`", f"`{row.name}`", f"{_parameters(experiment):,}"]
        lines.append(f"| {' | '.join([*cells, conventional, from_scratch, row.verified])} |")
    return "\n".join(lines)


def _parameters(experiment: Experiment) -> int:
    assert experiment.model.num_classes is not None
    with torch.device("meta"):
        model = untrained(experiment.model, experiment.model.num_classes)
    return sum(parameter.numel() for parameter in model.parameters())


def _published(experiment: Experiment) -> tuple[str, str]:
    """Of the conventional network that training starts from, and of a B-cos network trained from scratch."""
    recipe = experiment.model
    conventional, from_scratch = _B_COS_V2.get(recipe.architecture, (None, None))
    source = "b"
    if recipe.architecture in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(recipe.architecture)[recipe.pretrained]
        conventional, source = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], "a"
    return _cell(conventional, source), _cell(from_scratch, "b")


def _cell(accuracy: float | None, source: str) -> str:
    return "" if accuracy is None else f"{accuracy:.2f} % [{source}]"


if __name__ == "__main__":
    print(table())
