"""The networks that energy-based ones are compared with: what they compute, their training, attacks and corruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from verideq.attacks.opened import PlainDynamics, has_states, is_opaque, open_model
from verideq.certify.corruption import (
    corrupted_predictions,
    corruption_errors,
    normalised_error,
    summarise_corruptions,
)
from verideq.cli.main import run as command
from verideq.cli.options import read_model, training_of
from verideq.data import load
from verideq.data.corruptions import SEVERITIES, corrupt
from verideq.errors import InputError, ModelError, RecipeError, UnknownName
from verideq.graph import load_model, trace
from verideq.models.convnet import ConvNet
from verideq.models.epnet import EPNet
from verideq.models.named import classifier_named
from verideq.models.vit import ViT
from verideq.training.adversarial import Adversary
from verideq.training.adversary import AdversarialRecipe, AdversarialTrainer
from verideq.training.energy import EnergyRecipe
from verideq.training.kinds import KINDS, kind_of, read_trained

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "equilibrium-propagation"
CPU = torch.device("cpu")
TINY: dict[str, dict[str, Any]] = {
    "convnet": {"architecture": "convnet", "options": {"channels": [4]}},
    "vit": {"architecture": "vit", "options": {"width": 8, "heads": 2, "layers": 1}},
}
SMALL: dict[str, Any] = {"data": "digits", "loss": "clean", "epochs": 3, "batch_size": 32, "learning_rate": 0.01}


# Models


@pytest.mark.parametrize("pool", ["max", "average", "stride", "none"])
def test_a_convolutional_network_has_the_shape_of_an_energy_based_one(pool: str) -> None:
    sizes: dict[str, Any] = {"channels": (3, 5), "hidden": (7,), "pool": pool}
    other = EPNet((1, 9, 9), 4, **sizes)
    torch.manual_seed(0)
    net = ConvNet((1, 9, 9), 4, batch_norm=False, **sizes)
    kernels = [tuple(p.shape) for p in net.parameters()]
    assert kernels == [tuple(p.shape) for p in other.parameters()]
    assert net(torch.rand(2, 1, 9, 9)).shape == (2, 4)
    assert trace(net).input_shape == (1, 9, 9)
    batch_norms = [m for m in ConvNet((1, 9, 9), 4, **sizes).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(batch_norms) == 2


def test_the_shipped_cifar_models_have_the_sizes_of_the_paper() -> None:
    for name, wanted in (("cifar10-bp-cnn", 3_846_666), ("cifar10-adv-cnn", 3_846_666)):
        recipe = AdversarialRecipe.read(RECIPES / f"{name}.toml")
        net = classifier_named(recipe.architecture, (3, 32, 32), 10, **recipe.options)
        # 3,843,850 of the energy-based network, and a scale and a shift a channel.
        assert sum(p.numel() for p in net.parameters()) == wanted == 3_843_850 + 2 * (128 + 256 + 512 + 512)
    vit = AdversarialRecipe.read(RECIPES / "cifar10-vit.toml")
    assert [vit.options[key] for key in ("layers", "heads", "patch")] == [7, 12, 4]


def test_the_mnist_models_are_of_one_shape() -> None:
    shapes = set()
    for name in ("mnist", "mnist-bp-cnn", "mnist-adv-cnn"):
        kind = kind_of(RECIPES / f"{name}.toml")
        assert kind is not None
        recipe = KINDS[kind].recipe_type.read(RECIPES / f"{name}.toml")
        assert isinstance(recipe, (AdversarialRecipe, EnergyRecipe))
        shapes.add((tuple(recipe.options["channels"]), recipe.options["kernel"]))
    assert len(shapes) == 1
    adv = AdversarialRecipe.read(RECIPES / "mnist-adv-cnn.toml")
    assert (adv.loss, adv.norm) == ("pgd-at", "l2")
    assert {AdversarialRecipe.read(RECIPES / f"mnist-{n}.toml").loss for n in ("bp-cnn", "vit")} == {"clean"}


def test_a_transformer_looks_at_all_patches_and_knows_their_places() -> None:
    torch.manual_seed(0)
    net, x = ViT((1, 8, 8), 3, width=8, heads=2).double().eval(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    out = net(x)
    assert out.shape == (2, 3)
    torch.testing.assert_close(net(x[:1]), out[:1])
    for corner in ((slice(0, 4), slice(0, 4)), (slice(4, 8), slice(4, 8))):
        moved = x.clone()
        moved[0, 0, corner[0], corner[1]] += 0.5
        assert not torch.allclose(net(moved)[0], out[0]) and torch.equal(net(moved)[1], out[1])
    assert not torch.allclose(net(x.roll(4, 3)), out)
    F.cross_entropy(net.train()(x), torch.tensor([0, 2])).backward()  # type: ignore[no-untyped-call]  # torch's
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvNet((8, 8), 3),
        lambda: ConvNet((1, 8, 8), 3, channels=()),
        lambda: ConvNet((1, 8, 8), 3, paddings=(1,)),
        lambda: ConvNet((1, 4, 4), 3, channels=(2, 2, 2)),
        lambda: ConvNet((1, 8, 8), 3, pool="median"),
        lambda: ViT((1, 9, 8), 3),
        lambda: ViT((1, 8, 8), 3, width=9, heads=2),
        lambda: ViT((8, 8), 3),
        lambda: classifier_named("resnet", (1, 8, 8), 3),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build: Any) -> None:
    with pytest.raises(InputError):
        build()


# Training


def test_an_l2_adversary_climbs_within_its_ball() -> None:
    torch.manual_seed(0)
    net = ConvNet((1, 8, 8), 3, channels=(4,)).eval()
    x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])

    def loss(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y, reduction="sum")

    found = Adversary(0.7, 8, norm="l2").craft(net, x, x + 0.5, loss)
    size = (found - x).flatten(1).norm(dim=1)
    assert bool((size <= 0.7 + 1e-5).all()) and float(size.max()) > 0.5
    assert bool(((found >= 0) & (found <= 1)).all())
    with torch.no_grad():
        assert float(loss(net(found))) > float(loss(net(x)))
    # Where the gradient is zero there is nothing to climb, and no NaN.
    still = Adversary(0.7, 2, norm="l2").craft(lambda x: 0 * x.flatten(1)[:, :3], x, x, loss)
    assert torch.equal(still, x)
    with pytest.raises(UnknownName, match="norm"):
        Adversary(0.7, norm="l1")


@pytest.mark.parametrize("name", ["convnet", "vit"])
def test_training_reaches_the_digits_and_the_folder_is_a_model(name: str, tmp_path: Path) -> None:
    recipe = AdversarialRecipe.make(SMALL | TINY[name])
    trainer = AdversarialTrainer(recipe, tmp_path, CPU)
    lines: list[dict[str, Any]] = []
    trainer.run(report=lines.append)
    assert lines[-1]["residual"] is None and lines[-1]["train_error"] < 0.25
    assert "residual" not in trainer.progress(lines[-1])
    x = load("digits").scaled(slice(0, 20)).float()
    with torch.no_grad():
        wanted = trainer.model.eval()(x)
    torch.testing.assert_close(read_trained(tmp_path)(x), wanted)
    model, label = read_model(str(tmp_path), None)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert label == tmp_path.name
    # A network of supported operations gets a model file; a transformer cannot have one.
    assert (tmp_path / "model.safetensors").exists() == (name == "convnet") == (not is_opaque(trainer.model))
    training = training_of(str(tmp_path))
    assert training is not None and training["seed"] == 0 and "seed" not in training["recipe"]
    assert training["recipe"]["architecture"] == name


def test_an_adversary_in_training_makes_a_network_harder_to_break(tmp_path: Path) -> None:
    x, y = load("digits").scaled(slice(0, 100)).float(), load("digits").labels[:100]
    left = {}
    for loss in ("clean", "pgd-at"):
        values = {"loss": loss, "norm": "l2", "eps": "0.5", "attack_steps": 3, "epochs": 6}
        trainer = AdversarialTrainer(AdversarialRecipe.make(SMALL | TINY["convnet"] | values), tmp_path / loss, CPU)
        trainer.run()
        net = trainer.model.eval()
        found = Adversary(0.5, 10, norm="l2").craft(net, x, x, lambda f: F.cross_entropy(f, y, reduction="sum"))
        with torch.no_grad():
            left[loss] = float((net(found).argmax(1) == y).double().mean())
    assert left["pgd-at"] > left["clean"] + 0.1


@pytest.mark.parametrize("key", ["random_states", "pretrain_steps", "jacobian"])
def test_what_needs_an_equilibrium_is_refused_without_one(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}.*convnet has no equilibrium"):
        AdversarialRecipe.make(SMALL | TINY["convnet"] | {key: 1})
    with pytest.raises(RecipeError, match="unknown norm"):
        AdversarialRecipe.make({"norm": "l1"})


def test_folders_that_are_no_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no finished training"):
        read_model(str(tmp_path), None)
    with pytest.raises(ModelError, match="--weights goes with"):
        read_model(str(tmp_path), tmp_path / "weights.pt")
    (tmp_path / "recipe.toml").write_text(AdversarialRecipe.make(SMALL | TINY["vit"]).toml())
    with pytest.raises(ModelError, match="finish the training"):
        read_model(str(tmp_path), None)
    save_file({"other": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="finish the training"):
        read_model(str(tmp_path), None)
    assert training_of(None) is training_of("file.safetensors") is None


# Attacks


class Opaque(nn.Module):
    """A classifier that no trace goes through; nothing is trained, the mean of a quarter is its output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 2:
            raise ValueError("too bright")
        parts = [x[:, 0, i::2, j::2].mean((1, 2)) for i in (0, 1) for j in (0, 1)]
        return self.scale * torch.stack(parts, 1).sin()


def test_an_opaque_model_is_opened_by_its_outputs() -> None:
    model = Opaque()
    assert is_opaque(model) and not has_states(model)
    opened = open_model(model)
    assert isinstance(opened, PlainDynamics)
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(opened.outputs(x), model(x.float()).double(), rtol=1e-5, atol=1e-6)
    assert model.scale.requires_grad and model.scale.dtype == torch.float32
    assert has_states(EPNet((1, 8, 8), 3)) and not has_states(ConvNet((1, 8, 8), 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both networks, trained here in a second."""
    found = {}
    for name, values in TINY.items():
        found[name] = tmp_path_factory.mktemp(name)
        AdversarialTrainer(AdversarialRecipe.make(SMALL | values), found[name], CPU).run()
    return found


def attack(model: Path, out: Path, *more: str) -> list[str]:
    arguments = ["attack", str(model), "--limit", "6", "--eps", "0.03", "--eps", "0.1", "--suite", "pgd"]
    return [*arguments, "--threads", "1", "--device", "cpu", "--batch-size", "4", "--out", str(out), *more]


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["convnet", "vit"])
def test_the_command_attacks_explicit_networks_under_corruptions(
    name: str, norm: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(attack(folders[name], tmp_path, "--norm", norm, "--corruptions", "blur,fog", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [r["norm"] for r in summary["results"]] == [norm] * 2
    names = ["defocus-blur", "glass-blur", "motion-blur", "zoom-blur", "gaussian-blur", "fog"]
    corruptions = summary["corruptions"]
    assert list(corruptions["correct"]) == names and corruptions["n"] == 6
    assert list(corruptions["error"]) == ["all", "blur", "weather"]
    # What was recorded is what the model as it runs makes of the corrupted sample.
    data, model = load("digits"), read_model(str(folders[name]), None)[0]
    records = lines(tmp_path)
    for record in records:
        x = data.scaled([record["index"]])
        for severity in (1, 5):
            with torch.no_grad():
                outputs = model(corrupt(x, "fog", severity, indices=[record["index"]]).float())
            assert record["corrupted"]["fog"][severity - 1] == int(outputs.argmax(1))
    right = sum(r["corrupted"]["fog"][4] == r["label"] for r in records) / 2  # at each of two radii the same
    assert corruptions["correct"]["fog"][4] == right
    meta = json.loads((tmp_path / "run.json").read_text())
    assert meta["corruptions"] == names and meta["training"]["recipe"]["architecture"] == name
    assert "Natural corruptions" in (tmp_path / "report.html").read_text()


def test_corruptions_resume(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, torn = (attack(folders["vit"], tmp_path / name, "--corruptions", "noise") for name in ("whole", "torn"))
    assert command(whole) == command(torn) == 0
    assert "mean corruption error, not normalised" in " ".join(capsys.readouterr().out.split())
    results = tmp_path / "torn" / "results.jsonl"
    content = results.read_bytes()
    results.write_bytes(content[: len(content) * 2 // 3])
    assert command([*torn, "--resume"]) == 0
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    capsys.readouterr()
    assert command([*torn[:-1], "fog", "--resume"]) == 2
    assert "corruptions differ" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "intermediate"], "--suite intermediate looks at the states on the way to an equilibrium"),
        (["--suite", "full"], "use --suite pgd or standard"),
        (["--defence", "ensemble"], "use --defence final"),
        (["--defence", "early:2"], "--defence early:2"),
        (["--corruptions", "rain"], "unknown corruption 'rain'"),
        (["--corruptions", "saturate"], "names no corruption of images with 1 channels"),
    ],
)
def test_what_an_explicit_network_cannot_be_asked_is_refused(
    more: list[str], message: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in folders.values():
        assert command([*attack(folder, tmp_path / "run"), *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_any_builder_is_attacked_and_a_raise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_opaque.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        if len(x) == 1 and (x.flatten(1)[:, :9] == 1).all():\n            raise ValueError('a corner')\n"
        "        return x.flatten(1)[:, 9:49:4].cos()\n\n\n"
        "class Flat(torch.nn.Module):\n    def forward(self, x):\n        return x.mean((1, 2, 3)).tolist()\n"
    )
    arguments = ["--limit", "2", "--suite", "pgd", "--threads", "1", "--device", "cpu", "--json"]
    assert command(["attack", "my_opaque:Net", *arguments, "--out", "run"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["results"][0]["falsified"] == summary["results"][0]["error"] == 0
    assert command(["attack", "my_opaque:Flat", *arguments, "--out", "flat"]) == 2
    assert "does not take a sample of shape (1, 8, 8)" in " ".join(capsys.readouterr().err.split())
    # It cannot be certified, and says why.
    assert command(["certify", "my_opaque:Net", *arguments[:2], "--out", "certified"]) == 2
    assert "cannot be traced" in " ".join(capsys.readouterr().err.split())
    # Corruptions that raise cost the samples that they are of, and are no pass.
    from verideq.certify import corruption

    def bad(images: Tensor, name: str, severity: int, *, indices: list[int], seed: int) -> Tensor:
        if 1 in indices:
            raise RuntimeError("no such frost")
        return images

    monkeypatch.setattr(corruption, "corrupt", bad)
    assert command(["attack", "my_opaque:Net", *arguments, "--out", "raised", "--corruptions", "frost"]) == 1
    by_index = {record["index"]: record for record in lines(tmp_path / "raised")}
    assert by_index[1]["status"] == "ERROR" and "no such frost" in by_index[1]["reason"]
    assert by_index[1]["attacked"] is None and "corrupted" in by_index[0]


# Corruption errors


def test_predictions_that_are_no_numbers_are_wrong() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)

    def outputs(x: Tensor) -> Tensor:
        found = torch.zeros(len(x), 3)
        found[0, 1], found[1, 0] = 1.0, float("nan")
        return found

    first, second = corrupted_predictions(outputs, x, [0, 1], ["fog"], 0)
    assert first == {"fog": [1] * 5} and second == {"fog": [None] * 5}


def records(*predictions: list[int | None]) -> list[dict[str, Any]]:
    return [
        {"index": k, "label": 0, "eps": eps, "corrupted": {"fog": row, "jpeg": [0] * 5}}
        for eps in (0.1, 0.2)
        for k, row in enumerate(predictions)
    ]


def test_corruption_errors_are_means_over_severities_then_over_names() -> None:
    summary = summarise_corruptions(records([0, 0, 0, 1, 1], [0, 0, 0, 0, None]))
    assert summary is not None
    assert summary["n"] == 2 and len(SEVERITIES) == 5
    assert summary["correct"] == {"fog": [2, 2, 2, 1, 0], "jpeg": [2] * 5}
    assert corruption_errors(summary) == {"fog": pytest.approx(0.3), "jpeg": 0.0}
    assert summary["error"] == {
        "all": pytest.approx(0.15), "weather": pytest.approx(0.3), "digital": pytest.approx(0.0),
    }  # fmt: skip
    assert summarise_corruptions([{"index": 0}]) is None


def test_normalised_errors_leave_out_what_the_baseline_never_misses() -> None:
    own = {"n": 10, "correct": {"fog": [5] * 5, "jpeg": [9] * 5, "snow": [0] * 5}}
    baseline = {"n": 20, "correct": {"fog": [15] * 5, "jpeg": [20] * 5}}
    assert normalised_error(own, baseline) == pytest.approx(0.5 / 0.25)
    assert normalised_error(own, own) == pytest.approx(1.0)
    assert normalised_error(own, {"n": 1, "correct": {"jpeg": [1] * 5}}) is None


def test_a_model_file_of_a_network_loads(folders: dict[str, Path]) -> None:
    x = load("digits").scaled(slice(0, 4)).float()
    torch.testing.assert_close(
        load_model(folders["convnet"] / "model.safetensors")(x),
        read_trained(folders["convnet"])(x),
        rtol=1e-5,
        atol=1e-5,
    )
