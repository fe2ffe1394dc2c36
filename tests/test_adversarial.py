"""General DEQs and their adversarial training: sizes, losses and runs that can be taken up again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from verideq.cli.main import run as command
from verideq.equilibrium import DEQ, Auto, Broyden, Equilibrium, Implicit, Phantom
from verideq.errors import InputError, RecipeError, ResumeError, UnknownName
from verideq.models.mdeq import MDEQ, dense, general_named
from verideq.models.zoo import linear_deq
from verideq.parametrizations import RowGauge
from verideq.training.adversarial import (
    AdversarialLoss,
    Adversary,
    jacobian_penalty,
    pgd_at_loss,
    stopped_at,
    trades_loss,
    truncated_outputs,
)
from verideq.training.adversary import AdversarialRecipe, AdversarialTrainer
from verideq.training.kinds import kind_of

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "adversarial"
SMALL = {
    "data": "digits", "options": {"units": 16}, "samples": 128, "epochs": 2, "batch_size": 32, "attack_steps": 2,
    "pretrain_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters", "step", "state"),
    [
        ("mdeq-tiny", 158_890, 111_696, 30_720),
        ("mdeq-large", 11_097_438, 8_715_232, 61_440),
        ("mdeq-xl", 48_792_098, None, 138_240),
    ],
)
def test_multiscale_models_have_the_sizes_of_the_papers(
    name: str, parameters: int, step: int | None, state: int
) -> None:
    with torch.device("meta"):
        model = general_named(name, (3, 32, 32), 10)
    assert isinstance(model, MDEQ)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.size == state
    cell: nn.Module = model.cell  # type: ignore[assignment]  # a module here
    assert step is None or sum(p.numel() for p in cell.parameters()) == step


def two_scales() -> MDEQ:
    torch.manual_seed(0)
    return MDEQ((3, 8, 8), 4, channels=(8, 8), heads=(2, 2), final=8, expansion=1, groups=4, dropout=0.5)


def test_a_multiscale_model_computes_and_trains() -> None:
    model, x = two_scales(), torch.rand(3, 3, 8, 8)
    assert model(x).shape == (3, 4)
    F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()  # type: ignore[no-untyped-call]  # torch's
    assert all(p.grad is not None for p in model.parameters())
    injected = model.inject(x)
    # One mask for all steps of a forward pass, by sample and channel.
    assert {injected[f"mask{i}"].shape for i in (0, 1)} == {(3, 8, 1, 1)}
    model.eval()
    assert set(model.inject(x)) == {"v"}
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)
    z = torch.rand(3, model.size)
    moved = model.step(z, model.inject(x))
    other = z.clone()
    other[:, : 8 * 64] += 1.0  # the finest scale reaches the coarsest within a step
    assert not torch.allclose(model.step(other, model.inject(x))[:, 8 * 64 :], moved[:, 8 * 64 :])


@pytest.mark.parametrize(
    "build",
    [
        lambda: MDEQ((3, 9, 9), 2, channels=(8, 8), heads=(2, 2), final=8),
        lambda: MDEQ((3, 8, 8), 2, channels=(8, 8), heads=(2,), final=8),
    ],
)
def test_scales_that_do_not_halve_are_refused(build: object) -> None:
    with pytest.raises(InputError, match="halve"):
        build()  # type: ignore[operator]  # a function


def test_an_unknown_general_deq_is_refused() -> None:
    with pytest.raises(UnknownName, match="general DEQ"):
        general_named("mdeq-huge", (3, 32, 32), 10)


# Losses


def trained(seed: int = 0) -> DEQ:
    torch.manual_seed(seed)
    return dense((1, 4, 4), 3, units=16)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])


def test_an_adversary_climbs_within_its_ball() -> None:
    model, (x, y) = trained().eval(), batch()
    adversary = Adversary(0.1, 5)

    def loss(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y, reduction="sum")

    found = adversary.craft(model, x, x + 0.5, loss)
    assert float((found - x).abs().max()) <= 0.1 + 1e-6
    assert bool(((found >= 0) & (found <= 1)).all())
    with torch.no_grad():
        assert float(loss(model(found))) > float(loss(model(x)))
    assert not found.requires_grad


def test_the_losses_are_those_of_the_papers() -> None:
    model, (x, y) = trained(), batch()
    adversary = Adversary(1e-9, 1)  # the adversary can do nothing: what is left is the clean loss
    draw = torch.Generator().manual_seed(0)
    clean = F.cross_entropy(model(x), y)
    torch.testing.assert_close(pgd_at_loss(model, x, y, adversary, draw, crafted=model), clean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trades_loss(model, x, y, adversary, draw, crafted=model), clean, rtol=1e-3, atol=1e-4)
    strong = Adversary(0.2, 5)
    with torch.enable_grad():
        attacked = pgd_at_loss(model, x, y, strong, draw, crafted=model).detach()
    assert float(attacked) > float(clean.detach())
    light, heavy = (
        float(trades_loss(model, x, y, strong, torch.Generator().manual_seed(0), crafted=model, weight=w).detach())
        for w in (0.0, 6.0)
    )
    assert light == pytest.approx(float(clean.detach()), rel=1e-5) and heavy > light
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_the_jacobian_penalty_is_the_mean_square_of_the_entries() -> None:
    """E (vᵀ J)² summed over the columns is ‖J‖²_F."""
    model, (x, _) = trained().double(), batch()
    x = x.double()
    injected = model.inject(x)
    z = model.settle(injected)
    J = torch.func.vmap(torch.func.jacrev(lambda z, v: model.step(z[None], {"v": v[None]})[0]))(z, injected["v"])
    wanted = float(J.detach().square().sum((1, 2)).mean() / z.shape[1])
    draw = torch.Generator().manual_seed(0)
    found = float(jacobian_penalty(model, x, draw, probes=2000).detach())
    assert found == pytest.approx(wanted, rel=0.1)
    gradient = torch.autograd.grad(jacobian_penalty(model, x, draw), [model.cell.first.weight])  # type: ignore[union-attr]  # a DenseCell
    assert float(gradient[0].abs().max()) > 0


def test_the_jacobian_penalty_of_a_gauged_model_is_that_of_its_layers() -> None:
    torch.manual_seed(0)
    model, (x, _) = linear_deq((1, 4, 4), 3, RowGauge.apply, width=8), batch()
    layer: Equilibrium = model[1]  # type: ignore[assignment]  # an equilibrium
    z = layer(x.flatten(1))
    W = layer.fusion.weight
    wanted = float(((z.detach() > 0).float()[:, :, None] * W.detach()).square().sum((1, 2)).mean() / 8)
    found = float(jacobian_penalty(model, x, torch.Generator().manual_seed(0), probes=2000).detach())
    assert found == pytest.approx(wanted, rel=0.1)
    with pytest.raises(InputError, match="equilibrium"):
        jacobian_penalty(nn.Linear(2, 2), torch.rand(3, 2), torch.Generator())


def test_a_random_state_is_a_solve_that_stops_there() -> None:
    model, (x, _) = trained().eval(), batch()
    with stopped_at(model, 2):
        assert model.solver == Broyden(tol=0.0, max_steps=2)
        stopped = model(x)
    assert model.solver == Broyden()
    assert not torch.allclose(stopped, model(x))
    torch.manual_seed(0)
    gauged = linear_deq((1, 4, 4), 3, RowGauge.apply, width=8)
    with stopped_at(gauged, 1):
        gauged(x)
    layer: Equilibrium = gauged[1]  # type: ignore[assignment]  # an equilibrium
    assert layer.solver == Auto() and layer.throw
    seen = set()
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        loss = AdversarialLoss("clean", Adversary(0.1), random_states=3)(model, x, batch()[1], draw)
        seen.add(round(float(loss.detach()), 6))
    assert len(seen) > 1  # the best of the states so far, which more steps need not better


def test_the_truncated_network_is_tied_layers_from_zero() -> None:
    model, (x, _) = trained(), batch()
    injected = model.inject(x)
    z = model.start(injected)
    for _ in range(3):
        z = model.step(z, injected)
    torch.testing.assert_close(truncated_outputs(model, x, 3), model.head(z, injected))


@pytest.mark.parametrize("loss", ["pgd-at", "trades", "clean"])
@pytest.mark.parametrize("gradient", ["exact", "phantom"])
def test_training_lowers_the_loss(loss: str, gradient: str, tmp_path: Path) -> None:
    recipe = AdversarialRecipe.make(
        SMALL
        | {"loss": loss, "gradient": gradient, "epochs": 6, "jacobian": 0.01, "learning_rate": 0.01, "eps": "0.02"}
        | {"architecture": "tanh-deq", "options": {"units": 32, "scale": 0.5}}  # it converges: both gradients are right
    )
    trainer = AdversarialTrainer(recipe, tmp_path, torch.device("cpu"))
    assert isinstance(trainer.model.gradient, Implicit if gradient == "exact" else Phantom)
    lines: list[dict[str, float]] = []
    trainer.run(report=lines.append)
    assert lines[0]["phase"] == "truncated"
    assert lines[-1]["loss"] < 0.8 * lines[1]["loss"]


# Runs


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = AdversarialRecipe.make(SMALL | {"random_states": 3, "crop": 1, "flip": True, "epochs": 3})
    whole = AdversarialTrainer(recipe, tmp_path / "whole", torch.device("cpu")).run()

    def interrupt(line: dict[str, object]) -> None:
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AdversarialTrainer(recipe, tmp_path / "torn", torch.device("cpu")).run(report=interrupt)
    with pytest.raises(ResumeError, match="--resume"):
        AdversarialTrainer(recipe, tmp_path / "torn", torch.device("cpu"))
    torn = AdversarialTrainer(recipe, tmp_path / "torn", torch.device("cpu"), resume=True).run()
    assert torn.read_bytes() == whole.read_bytes()
    numbers = [json.loads(line)["epoch"] for line in (tmp_path / "torn" / "log.jsonl").read_text().splitlines()]
    assert numbers == [1, 2, 3, 4]
    other = AdversarialRecipe.make(SMALL | {"seed": 1})
    with pytest.raises(ResumeError, match="another recipe"):
        AdversarialTrainer(other, tmp_path / "torn", torch.device("cpu"), resume=True)


def test_the_command_trains_and_its_weights_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(AdversarialRecipe.make(SMALL).toml(), encoding="utf-8")
    assert kind_of(path) == "adversarial"
    assert AdversarialRecipe.read(path) == AdversarialRecipe.make(SMALL)
    arguments = ["train", str(path), "--out", str(tmp_path / "run"), "--threads", "1", "--device", "cpu"]
    assert command([*arguments, "--set", "epochs=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = dense((1, 8, 8), 10, units=16)
    model.load_state_dict(load_file(report["weights"]))
    assert command([*arguments, "--show"]) == 0
    assert 'loss = "pgd-at"' in capsys.readouterr().out


def test_the_shipped_recipes_are_valid() -> None:
    names = sorted(path.name for path in RECIPES.glob("*.toml"))
    assert names == ["cifar10.toml", "deq-large.toml", "mnist-unconverged.toml", "mnist.toml"]
    for name in names:
        recipe = AdversarialRecipe.read(RECIPES / name)
        assert read_values(recipe.toml()) == recipe
    with torch.device("meta"):
        large = AdversarialRecipe.read(RECIPES / "deq-large.toml")
        model = general_named(large.architecture, (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == 11_097_438


def read_values(text: str) -> object:
    import tomllib

    return AdversarialRecipe.make(tomllib.loads(text))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"losss": "trades"}, "did you mean loss"),
        ({"loss": "fgsm"}, "adversarial loss"),
        ({"gradient": "jfb"}, "choose one of exact, phantom"),
        ({"attack_gradient": "jfb"}, "attack_gradient 'jfb': choose one of exact, phantom"),
        ({"architecture": "convnet", "attack_gradient": "exact"}, "convnet has no equilibrium"),
        ({"epochs": 0}, "epochs 0"),
        ({"samples": -1}, "samples -1"),
        ({"eps": "-1/255"}, "negative"),
        ({"eps": 0}, "positive eps"),
        ({"epochs": "many"}, "expected int"),
        ({"flip": 1}, "expected bool"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_recipes_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AdversarialRecipe.make(values)


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    recipe = AdversarialRecipe.make(SMALL | {"options": {"width": 3}})
    with pytest.raises(RecipeError, match="options"):
        AdversarialTrainer(recipe, tmp_path, torch.device("cpu"))


def test_the_learning_rate_falls_along_a_cosine() -> None:
    from verideq.training.adversarial import cosine

    rates = [cosine(step, 10, 1e-3) for step in range(11)]
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert rates[5] == pytest.approx((1e-3 + 1e-6) / 2)
