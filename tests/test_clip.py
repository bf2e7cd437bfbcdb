"""CLIP's image encoder: names and recipe, training on what the conventional encoder says, and its three tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

import bcos_kernels as bk
import evaluate
import explain
import train
from models import create_model, experiments, load_checkpoint, open_clip_files, zeroshot
from models.checkpoint_files import read_checkpoint
from models.checkpoints import epoch_checkpoints
from models.class_names import in_sentences
from models.clip import clip_resnet50
from models.errors import CheckpointError, UnknownNameError, UserError
from models.factory import starting_network
from models.recipes import DataRecipe, Experiment, ModelRecipe, OptimiserRecipe, TrainerRecipe
from models.standard import build
from tests.tolerances import OUTPUT, assert_close
from training.data import Digits
from training.module import Distillation
from training.probe import embeddings, linear_probe

NETWORK = "clip_bcosification"
NAME = "resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_{}_bcosification"
SMALL = ["model.architecture=clip_resnet10_w8", "data.image_size=64", "data.num_workers=0", "data.batch_size=4"]
CLASSES = ["no_ink", "one", "two"]


# Names and recipe


def test_whole_recipe() -> None:
    name = NAME.format("ImageNet") + "-seed=3"
    assert experiments.find("ImageNet", NETWORK, name) == Experiment(
        dataset="ImageNet",
        base_network=NETWORK,
        name=name,
        seed=3,
        model=ModelRecipe(
            "clip_resnet50", 0, converted=True, start="pretrained", pretrained="openai", normalize="clip", b=2.0
        ),
        data=DataRecipe("ImageNet", image_size=224, six_channels=True, batch_size=64, num_workers=16, clip_crop=True),
        optimiser=OptimiserRecipe(
            "adam", lr=1e-4, weight_decay=0.0, schedule="cosine", interval="epoch", agc=0.01, restart_every=None
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="siglip", eval_loss="siglip"),
    )


def test_names() -> None:
    cyclic = experiments.find("CC3M", NETWORK, NAME.replace("_sigLip", "_cyclicLR_sigLip").format("CC3M"))
    assert (cyclic.optimiser.restart_every, cyclic.data.dataset) == (10, "CC3M")
    plain = experiments.find("CC3M", NETWORK, NAME.format("CC3M"))
    assert plain == experiments.find("CC3M", NETWORK, NAME.format("kd_CC3M"))
    assert plain.optimiser.restart_every is None
    with pytest.raises(UnknownNameError, match=r"Did you mean 'resnet_50_clip.*ImageNet_bcosification'"):
        experiments.find("ImageNet", NETWORK, NAME.format("CC3M"))
    with pytest.raises(UnknownNameError, match="Known: none"):
        experiments.find("Digits", NETWORK, NAME.format("Digits"))


def test_network_is_the_converted_encoder() -> None:
    model = create_model("resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_ImageNet_bcosification", NETWORK)
    torch.manual_seed(0)
    expected = bk.bcosify(clip_resnet50(), normalize="clip")
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(model.normalize.mean, expected.normalize.mean)
    with pytest.raises(ValueError, match="gives embeddings and has no classes, got 10"):
        create_model(NAME.format("ImageNet"), NETWORK, num_classes=10)


def test_openai_weights_come_through_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = clip_resnet50()
    path = tmp_path / "RN50.pt"
    torch.save(
        {
            f"visual.{key}": value.half() if value.is_floating_point() else value
            for key, value in published.state_dict().items()
        },
        path,
    )
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: asked.append(config) or str(path))
    experiment = experiments.find("ImageNet", NETWORK, NAME.format("ImageNet"))
    state = starting_network(experiment, 0, tmp_path).state_dict()
    assert asked[0]["url"].endswith("RN50.pt")
    assert_close(state["model.attnpool.v_proj.weight"], published.attnpool.v_proj.weight, {torch.float32: 1e-3})

    def fail(config: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"'openai' for RN50-quickgelu .* no route to host"):
        starting_network(experiment, 0, tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a file nor.*Did you mean 'openai'"):
        open_clip_files.weights("RN50-quickgelu", "openay")


def test_without_open_clip_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'bcos_kernels\[clip\]'"):
        create_model(NAME.format("ImageNet"), NETWORK, weights="pretrained")


# Training, on digits that lie in folders


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of images, and the weights of a small conventional encoder."""
    root = tmp_path_factory.mktemp("clip")
    digits = Digits(train=True)
    for part, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            found = digits.images[digits.targets == label]
            for index in range(count):
                to_pil_image(found[index + (10 if part == "val" else 0)]).save(root / part / name / f"{index}.png")
    torch.save(teacher(digits.images[:64]).state_dict(), root / "teacher.pth")
    return root


def teacher(images: Tensor | None = None) -> nn.Module:
    """A small conventional encoder with random weights, and the statistics that its B-cos network has on images: with
    others the images fade on their way through."""
    torch.manual_seed(0)
    standard = build("clip_resnet10_w8", 0)
    images = torch.rand(32, 3, 64, 64) if images is None else F.interpolate(images, 64)
    model = bk.bcosify(standard, normalize="clip").train()
    norms = [
        [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, bk.BatchNormUncentered2d))]
        for net in (standard, model.model)
    ]
    for norm in norms[1]:
        norm.momentum = 1.0
    with torch.no_grad():
        model(bk.AddInverse()(images))
    for ours, theirs in zip(*norms, strict=True):
        ours.running_var.copy_(theirs.running_var)
    return standard


def options(root: Path, base_directory: Path, *more: str) -> list[str]:
    return [
        *("--dataset", "ImageFolder", "--base_network", NETWORK, "--experiment_name", NAME.format("ImageFolder")),
        *("--data_path", str(root), "--base_directory", str(base_directory), *more),
    ]


def train_small(root: Path, base_directory: Path, *more: str, epochs: int = 1) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        directory = train.main(
            options(root, base_directory, "--max_epochs", str(epochs), "--refresh_rate", "0", *more, "--set", *SMALL)
        )
    finally:
        torch.set_num_threads(threads)
    assert directory is not None
    return directory


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a small encoder, trained for two epochs, the second one in a second run."""
    base = tmp_path_factory.mktemp("experiments")
    train_small(root, base, "--init_weights", str(root / "teacher.pth"), "--explanation_logging")
    train_small(root, base, epochs=2)  # the teacher comes out of the checkpoint
    return base


def test_training_resumes_with_the_teacher_of_the_checkpoint(root: Path, trained: Path, tmp_path: Path) -> None:
    (directory,) = (path.parent for path in trained.rglob("last.ckpt"))
    header, *rows = (directory / "metrics.csv").read_text().splitlines()
    columns = dict(zip(header.split(","), zip(*(row.split(",") for row in rows), strict=True), strict=True))
    assert columns["epoch"] == ("0", "1")
    assert columns["val_acc1"] == ("", "")
    assert [path.name for path in (directory / "explanations").iterdir()] == ["epoch=0.png"]
    assert all(float(loss) > 0 for loss in columns["train_loss"] + columns["val_loss"])
    assert {tuple(found.scores) for found in epoch_checkpoints(directory)} == {("val_loss",)}
    state = read_checkpoint(directory / "last.ckpt")["state_dict"]
    for key, value in torch.load(root / "teacher.pth", weights_only=True).items():
        assert torch.equal(state[f"clip_model.{key}"], value), key
    config = json.loads((directory / "config.json").read_text())
    assert (config["model"]["architecture"], config["data"]["image_size"]) == ("clip_resnet10_w8", 64)
    whole = train_small(root, tmp_path, "--init_weights", str(root / "teacher.pth"), epochs=2)
    once = read_checkpoint(whole / "last.ckpt")["state_dict"]
    assert all(torch.equal(once[key], state[key]) for key in state if not key.startswith("clip_model"))


def test_other_changes_of_the_recipe_are_refused(root: Path, trained: Path) -> None:
    with pytest.raises(UserError, match=r"optimiser\.lr: 0\.0001 then, 0\.1 now"):
        train_small(root, trained, "--set", "optimiser.lr=0.1", epochs=3)


def test_teacher_sees_normalised_rgb_and_stays_as_it_is(root: Path) -> None:
    torch.manual_seed(1)
    conventional = teacher().double()
    model = bk.bcosify(conventional, normalize="clip")
    experiment = experiments.find("ImageFolder", NETWORK, NAME.format("ImageFolder"))
    module = Distillation(model, conventional, experiment).train()
    assert module.model.training
    assert not any(part.training for part in module.clip_model.modules())
    rgb = torch.rand(3, 3, 64, 64, dtype=torch.float64)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    taught = module._taught(bk.AddInverse()(rgb))
    assert_close(taught, conventional((rgb - mean) / std), OUTPUT)
    assert not taught.requires_grad
    assert all(not parameter.requires_grad for parameter in module.clip_model.parameters())
    assert all(parameter.requires_grad for parameter in module.model.parameters())


# Zero-shot classification


def _encode(texts: Sequence[str]) -> Tensor:
    """A stub: texts to unit vectors that depend on every letter."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(text)))
        rows.append(torch.randn(128, generator=generator))
    return F.normalize(torch.stack(rows), dim=1)


def test_directions_are_the_normalised_mean_over_the_templates() -> None:
    templates = zeroshot.openai_templates()
    assert len(templates) == 80
    found = zeroshot.directions(_encode, ["dog", "cat"], templates)
    mean = _encode([template("cat") for template in templates]).mean(0)
    torch.testing.assert_close(found[1], mean / mean.norm())
    assert in_sentences("ImageFolder", CLASSES) == ["no ink", "one", "two"]
    names = in_sentences("ImageNet", ["n01440764"])
    assert (len(names), names[0]) == (1000, "tench")


@pytest.mark.parametrize(("unpool", "power"), [(False, 1.0), (True, 1.0), (True, 2.0), (True, 3.5)])
def test_classifier_is_the_cosine_to_a_power(unpool: bool, power: float) -> None:
    torch.manual_seed(0)
    encoder = bk.bcosify(teacher().double().eval(), normalize="clip")
    texts = torch.randn(5, 128, dtype=torch.float64)
    features: list[Tensor] = []
    encoder.model.attnpool.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    model = zeroshot.classifier(encoder, texts, unpool=unpool, power=power)
    images = bk.AddInverse()(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    logits = model(images)
    if unpool:
        pool = encoder.model.attnpool
        each = features[0].flatten(2).mT @ pool.v_proj.weight.T @ pool.c_proj.weight.T
        cosines = torch.stack([F.cosine_similarity(each, text, dim=2) for text in texts], 2)  # N, locations, K
        assert cosines.shape == (2, 4, 5)
        expected = 100 * (cosines * cosines.abs() ** (power - 1)).mean(1)
    else:
        expected = 100 * F.cosine_similarity(encoder(images)[:, None], texts, dim=2)
    assert_close(logits, expected, {torch.float64: 1e-4 if power == 3.5 else 1e-11})  # the general power has an epsilon


@pytest.mark.parametrize(("unpool", "power"), [(False, 1.0), (True, 1.0), (True, 3.0)])
def test_similarity_is_explained_exactly(unpool: bool, power: float) -> None:
    torch.manual_seed(0)
    encoder = bk.bcosify(teacher().double().eval(), normalize="clip")
    model = zeroshot.classifier(encoder, torch.randn(5, 128, dtype=torch.float64), unpool=unpool, power=power)
    explanation = bk.explain(model, torch.rand(2, 3, 64, 64, dtype=torch.float64), targets=[3, 0])
    seen = explanation.images - encoder.normalize.mean
    logits = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    assert_close((seen * explanation.weights).sum((1, 2, 3)), logits, {torch.float64: 1e-9})


def _right(logits: Tensor) -> float:
    targets = torch.arange(3).repeat_interleave(4)
    return float((logits.argmax(1) == targets).float().mean())


def _images(root: Path, part: str) -> Tensor:
    """As the recipe evaluates them: 32 x 32 to 64 x 64, bicubic, six channels."""
    found = []
    for path in (path for name in CLASSES for path in sorted((root / part / name).iterdir())):
        image = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    rgb = torch.stack(found)
    return torch.cat([rgb, 1 - rgb], 1)


@pytest.mark.parametrize("more", [(), ("--attn_unpool", "--cosine_power", "3")])
@pytest.mark.parametrize("columns", [True, False])
def test_zeroshot_with_stored_directions(
    root: Path, trained: Path, tmp_path: Path, more: tuple[str, ...], columns: bool
) -> None:
    texts = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
    path = tmp_path / "texts.pt"
    torch.save(texts.T.contiguous() if columns else texts, path)
    arguments = ["--task", "zeroshot", "--reload", "last", "--zeroshot_weights", str(path), *more, "--no-cuda"]
    result = evaluate.main(options(root, trained, *arguments))
    encoder = load_checkpoint("ImageFolder", NETWORK, NAME.format("ImageFolder"), base_directory=trained)
    model = zeroshot.classifier(encoder, texts, unpool=bool(more), power=3.0 if more else 1.0)
    with torch.no_grad():
        logits = model(_images(root, "val"))
    assert result["acc1"] == pytest.approx(_right(logits), abs=1.1 / 12)
    loss = F.cross_entropy(logits, torch.arange(3).repeat_interleave(4)).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-2)
    assert result["images"] == 12


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A small CLIP in open_clip's registry, and a file with random weights of it."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    torch.save({"state_dict": model.state_dict()}, folder / "tiny.pt")
    return "tiny-clip", folder / "tiny.pt"


def test_zeroshot_with_a_text_model(root: Path, trained: Path, text_model: tuple[str, Path]) -> None:
    name, path = text_model
    arguments = ["--task", "zeroshot", "--reload", "best", "--text_model", name, "--text_weights", str(path)]
    result = evaluate.main(options(root, trained, *arguments))
    assert result["images"] == 12
    assert 0 <= result["acc1"] <= result["acc5"] == 1
    encode = zeroshot.TextEncoder(name, path)
    network = open_clip.create_model(name, pretrained=str(path)).eval()
    with torch.no_grad():
        expected = network.encode_text(open_clip.get_tokenizer(name)(["a dog", "a cat"]), normalize=True)
    torch.testing.assert_close(encode(["a dog", "a cat"]), expected)
    torch.save({"positional_embedding": torch.zeros(1)}, path.with_name("other.pt"))
    with pytest.raises(CheckpointError, match="holds no text side of tiny-clip: 'text_projection' is missing"):
        zeroshot.TextEncoder(name, path.with_name("other.pt"))
    state = network.state_dict() | {"ln_final.weight": torch.zeros(3)}
    torch.save(state, path.with_name("shapes.pt"))
    with pytest.raises(CheckpointError, match="does not fit open_clip's tiny-clip"):
        zeroshot.TextEncoder(name, path.with_name("shapes.pt"))


# Explanations


def _explain(root: Path, base_directory: Path, *more: str) -> list[dict[str, object]]:
    image, out = root / "val" / "one" / "0.png", base_directory / "out"
    arguments = options(root, base_directory, "--output", str(out), "--no-cuda", *more)
    if "--text" in more:  # which needs no folder
        arguments = [word for word in arguments if word not in ("--data_path", str(root))]
    return explain.main([str(image), *arguments])


def test_similarity_of_image_and_text_is_explained(
    root: Path, trained: Path, text_model: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = text_model
    texts = ["a photo of a dog", "a one"]
    side = ["--text_model", name, "--text_weights", str(path)]
    rows = _explain(root, trained, *side, "--text", *texts, "--target", "a one")
    encoder = load_checkpoint("ImageFolder", NETWORK, NAME.format("ImageFolder"), base_directory=trained)
    model = zeroshot.classifier(encoder, zeroshot.TextEncoder(name, path)(texts))
    expected = bk.explain(model, _images(root, "val")[4:5], 1)
    found = {row["name"]: row for row in rows}
    for text, logit, share in zip(
        texts, expected.logits[0].tolist(), expected.logits[0].softmax(0).tolist(), strict=True
    ):
        assert found[text]["logit"] == pytest.approx(logit, rel=1e-2)
        assert found[text]["confidence"] == pytest.approx(share, rel=1e-2)
    assert "class 1, a one" in capsys.readouterr().out
    picture = np.asarray(Image.open(trained / "out" / "0.explanation.png")) / 255
    assert np.abs(picture - expected.rgba()[0].numpy()).mean() < 0.02


def test_classes_of_the_dataset_are_explained_in_sentences(
    root: Path, trained: Path, text_model: tuple[str, Path], tmp_path: Path
) -> None:
    name, path = text_model
    rows = _explain(root, trained, "--text_model", name, "--text_weights", str(path), "--target", "no_ink")
    encode = zeroshot.TextEncoder(name, path)
    texts = zeroshot.directions(encode, ["no ink", "one", "two"], zeroshot.openai_templates())
    torch.save(texts, tmp_path / "texts.pt")
    stored = _explain(root, trained, "--zeroshot_weights", str(tmp_path / "texts.pt"), "--target", "no_ink")
    assert {row["name"] for row in rows} == set(CLASSES)
    assert [row["logit"] for row in rows] == pytest.approx([row["logit"] for row in stored], rel=1e-4)
    unpooled = ["--attn_unpool", "--cosine_power", "3"]
    other = _explain(root, trained, "--zeroshot_weights", str(tmp_path / "texts.pt"), *unpooled)
    assert [row["logit"] for row in rows] != pytest.approx([row["logit"] for row in other], rel=1e-2)
    for more, sentence in (
        (["--text", "a", "b", "--zeroshot_weights", str(tmp_path / "texts.pt")], "has 3 texts, not 2"),
        (["--text", "a", "--text_model", "RN5"], "open_clip has no model 'RN5'"),
        (["--text", "a", "--target", "b"], "no class has this name"),
        (["--cosine_power", "2"], "--cosine_power needs --attn_unpool"),
        (["--dataset", "CC3M", "--experiment_name", NAME.format("CC3M")], "give texts with --text"),
    ):
        with pytest.raises(UserError, match=sentence):
            _explain(root, trained, *more)
    with pytest.raises(UserError, match="leave it out"):
        explain.main([str(root / "x.png"), *options(root, trained, "--text", "a")])


# Linear probe


def test_linear_probe(root: Path, trained: Path) -> None:
    result = evaluate.main(options(root, trained, "--task", "linear_probe", "--reload", "last", "--probe_c", "100"))
    encoder = load_checkpoint("ImageFolder", NETWORK, NAME.format("ImageFolder"), base_directory=trained)
    parts = [[(_images(root, part), torch.arange(3).repeat_interleave(n))] for part, n in (("train", 6), ("val", 4))]
    expected = linear_probe(encoder, *parts, torch.device("cpu"), c=100)
    assert result["acc1"] == pytest.approx(expected["acc1"], abs=1.1 / 12)
    assert (result["acc5"], result["images"]) == (1, 12)
    unpooled = evaluate.main(options(root, trained, "--task", "linear_probe", "--reload", "last", "--attn_unpool"))
    assert unpooled["images"] == 12


def test_probe_fits_what_is_linear() -> None:
    torch.manual_seed(0)
    images = torch.randn(60, 6, 1, 1)
    encoder = nn.Flatten()
    targets = F.normalize(images.flatten(1), dim=1)[:, :3].argmax(1)
    halves = [[(images[part], targets[part])] for part in (slice(0, 40), slice(40, 60))]
    result = linear_probe(encoder, *halves, torch.device("cpu"), c=1e4)
    assert result["acc1"] > 0.85
    inputs, _ = embeddings(nn.Unflatten(1, (2, 3)), [(images[:, :, 0, 0], targets)], torch.device("cpu"))
    expected = F.normalize(images[:, :, 0, 0].unflatten(1, (2, 3)).mean(1), dim=1)
    np.testing.assert_allclose(inputs, expected.numpy(), rtol=1e-5)
    two = [(images, (targets > 0).long())]
    assert linear_probe(encoder, two, two, torch.device("cpu"), c=1e4)["acc5"] == 1


# What cannot be honoured


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "gives embeddings: choose --task zeroshot or linear_probe"),
        (["--task", "zeroshot", "--cosine_power", "2"], "--cosine_power needs --attn_unpool"),
        (["--task", "linear_probe", "--attn_unpool", "--cosine_power", "2"], "--cosine_power needs --task zeroshot"),
        (["--task", "zeroshot", "--attn_unpool", "--cosine_power", "0.5"], "at least 1, got 0.5"),
        (["--task", "zeroshot", "--attn_unpool", "--cosine_power", "inf"], "a finite number of at least 1, got inf"),
        (["--task", "linear_probe", "--probe_c", "0"], "--probe_c must be a finite number above 0"),
        (["--task", "linear_probe", "--probe_c", "inf"], "--probe_c must be a finite number above 0"),
        (["--task", "zeroshot", "--probe_c", "1"], "--probe_c needs --task linear_probe"),
        (["--task", "linear_probe", "--text_model", "RN50"], "--text_model needs --task zeroshot"),
        (["--task", "zeroshot", "--text_model", "x", "--zeroshot_weights", "y"], "--text_model has no use"),
        (["--task", "zeroshot", "--set", "trainer.eval_loss=bce"], 'trainer.eval_loss must be "siglip", got "bce"'),
        (["--task", "linear_probe", "--text_weights", "x"], "--text_weights needs --task zeroshot"),
        (["--task", "zeroshot", "--text_weights", "x", "--zeroshot_weights", "y"], "--text_weights has no use"),
        (["--task", "zeroshot", "--reload", "last", "--zeroshot_weights", "none.pt"], "There is no file none.pt"),
        (["--task", "zeroshot", "--reload", "last", "--text_model", "RN5"], "open_clip has no model 'RN5'"),
        (
            ["--task", "zeroshot", "--base_network", "standard", "--experiment_name", "resnet_18"],
            "needs --base_network",
        ),
        (["--attn_unpool", "--base_network", "standard", "--experiment_name", "resnet_18"], "--attn_unpool needs"),
        (["--dataset", "CC3M", "--experiment_name", NAME.format("CC3M"), "--task", "zeroshot"], "CC3M has no classes"),
    ],
)
def test_options_that_cannot_be_honoured_say_so(root: Path, trained: Path, more: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate.main(options(root, trained, *more))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("content", [torch.ones(7, 3), {"a": 1}, torch.full((128, 3), float("nan")), torch.ones(3)])
def test_directions_that_do_not_fit(tmp_path: Path, content: object) -> None:
    encoder = bk.bcosify(build("clip_resnet10_w8", 0), normalize="clip")
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"must hold a finite tensor \[128, classes\]"):
        zeroshot.read_directions(tmp_path / "x.pt", encoder)
    with pytest.raises(UserError, match="5 entries, the image embeddings 128"):
        zeroshot.classifier(encoder, torch.ones(3, 5))
    with pytest.raises(UserError, match="no attention pool"):
        zeroshot.classifier(nn.Identity(), torch.ones(3, 5))
    with pytest.raises(ValueError, match="must not have length 0"):
        bk.CosineLogits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"must be \[K, E\], floating; got \[2\], torch.int64"):
        bk.CosineLogits(torch.tensor([1, 2]))
