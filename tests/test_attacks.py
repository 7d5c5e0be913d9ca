"What an attack must keep to, what it must achieve, and that chance is fixed by the seed."
import pytest
import torch
from torch import nn

from spikeprompt.attacks import ATTACKS, attack, attacked, ball, square_masks, square_side
from spikeprompt.backbones import create_backbone
from spikeprompt.data import read_digits
from spikeprompt.experiments import prepared_split
from spikeprompt.methods.linear_probe import LinearProbe, LinearProbeConfig
from spikeprompt.methods.lorsp import LoRSP, LoRSPConfig
from spikeprompt.prompts import PromptedModel
from spikeprompt.settings import SettingsError, TargetSettings
from spikeprompt.training import accuracy, as_input, linear_probe, outputs

QUICK = {"pgd": {"steps": 4}, "square": {"queries": 20}}


@pytest.fixture(scope="module")
def digits():
    settings = TargetSettings(n_train=300, n_val=40)
    return prepared_split(read_digits(), settings, 0, create_backbone("pocket_resnet"), "digits")


@pytest.fixture(scope="module")
def models(digits):
    "A trained probe, and the same head under an untrained LoRSP prompt."
    found = {}
    for method, config in ((LinearProbe, LinearProbeConfig()), (LoRSP, LoRSPConfig(pooled=8, alpha=0.05))):
        backbone = create_backbone("pocket_resnet")
        head, _ = linear_probe(backbone, digits, [0.1])
        torch.manual_seed(0)
        prompt = method(config, backbone)
        prompt.start(as_input(digits.train[0][:64]), backbone)
        found[method] = PromptedModel(backbone, prompt, head).eval()
    return found


class Blind(nn.Module):
    "A model whose output has no gradient."
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).detach()


@pytest.mark.parametrize("method", [LinearProbe, LoRSP])
@pytest.mark.parametrize("name", ATTACKS)
def test_pictures_stay_in_the_ball_and_parameters_get_no_gradient(models, digits, method, name):
    model, (images, labels) = models[method], (digits.val[0][:8], digits.val[1][:8])
    found = attack(model, name, images, labels, 0.1, **QUICK.get(name, {}))
    change = (found - as_input(images)).abs()
    assert 0.09 < change.max() <= 0.1 + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ATTACKS)
def test_epsilon_zero_changes_nothing(models, digits, name):
    images, labels = digits.val[0][:8], digits.val[1][:8]
    assert torch.equal(attack(models[LoRSP], name, images, labels, 0, **QUICK.get(name, {})), as_input(images))


@pytest.mark.parametrize("epsilon", [16 / 255, 32 / 255])
def test_gradients_lower_accuracy_and_steps_lower_it_further(models, digits, epsilon):
    model, (images, labels) = models[LinearProbe], digits.val
    clean = accuracy(outputs(model, images), labels)
    fgsm, pgd = (accuracy(attacked(model, name, images, labels, epsilon), labels) for name in ("fgsm", "pgd"))
    assert clean > 0.9
    assert pgd <= fgsm < clean - 0.2
    assert pgd < 0.3


def test_square_needs_no_gradients(models, digits):
    images, labels = digits.val
    blind = Blind(models[LinearProbe])
    with torch.inference_mode():
        found = attacked(blind, "square", images, labels, 48 / 255, queries=60)
    assert accuracy(found, labels) < accuracy(outputs(blind, images), labels) - 0.2
    with pytest.raises(RuntimeError, match="does not require grad"):
        attack(blind, "fgsm", images, labels, 48 / 255)


def test_square_queries_only_what_is_not_yet_misclassified(models, digits):
    images, labels = digits.val
    asked = []

    class Counted(Blind):
        def forward(self, pixels):
            asked.append(len(pixels))
            return super().forward(pixels)

    attack(Counted(models[LinearProbe]), "square", images, labels, 64 / 255, queries=40)
    assert asked[0] == len(images) and asked[-1] < len(images)
    assert asked[1:] == sorted(asked[1:], reverse=True)


def test_fgsm_on_a_linear_model_is_the_closed_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    images, labels = 0.3 + 0.4 * torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])
    w = model[1].weight.detach()
    expected = images + 0.1 * (w[1 - labels] - w[labels]).sign().view_as(images)
    torch.testing.assert_close(attack(model, "fgsm", images, labels, 0.1), expected)
    torch.testing.assert_close(attack(model, "pgd", images, labels, 0.1), expected)


def test_pgd_starts_anywhere_in_the_ball(models):
    grey = torch.full((4, 3, 32, 32), 0.5)
    change = attack(models[LinearProbe], "pgd", grey, torch.zeros(4, dtype=torch.long), 0.1, steps=1, step_size=0.0) - grey
    assert change.mean().abs() < 0.003 and change.abs().max() > 0.099
    assert change.std() == pytest.approx(0.2 / 12**0.5, rel=0.03)
    assert not torch.equal(change[0], change[1])


@pytest.mark.parametrize("name", ATTACKS)
def test_batches_do_not_matter(models, digits, name):
    images, labels, options = digits.val[0][:12], digits.val[1][:12], QUICK.get(name, {})
    one = attacked(models[LinearProbe], name, images, labels, 0.1, **options)
    parts = attacked(models[LinearProbe], name, images, labels, 0.1, batch_size=5, **options)
    assert (one - parts).abs().max() < 1e-2 * one.abs().max()


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_the_seed_fixes_chance(models, digits, name):
    images, labels = digits.val[0][:6], digits.val[1][:6]
    first, again, other = (attack(models[LoRSP], name, images, labels, 0.1, seed, **QUICK[name]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_squares_have_their_side_and_lie_inside():
    corners = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    masks = square_masks(corners, 3, (5, 9))
    assert masks.shape == (200, 1, 5, 9) and (masks.sum((1, 2, 3)) == 9).all()
    assert masks.any(0).all()
    assert [square_side(query, 10_000, 0.8, (32, 32)) for query in (1, 10, 50, 8000)] == [29, 20, 14, 2]
    assert square_side(9_999, 10_000, 0.001, (32, 32)) == 1


@pytest.mark.parametrize("epsilon", [-0.1, 1.01, float("nan")])
def test_a_wrong_epsilon_is_named(epsilon):
    with pytest.raises(SettingsError, match=f"epsilon = {epsilon}: allowed are 0 to 1"):
        ball(torch.zeros(1, 3, 4, 4), epsilon)


@pytest.mark.parametrize("name, options, said", [
    ("deepfool", {}, "attack = 'deepfool': allowed are fgsm, pgd, square"), ("pgd", {"steps": 0}, "steps = 0"),
    ("square", {"queries": 0}, "queries = 0"), ("square", {"p": 1.5}, "p = 1.5")])
def test_wrong_options_are_named(models, digits, name, options, said):
    with pytest.raises(SettingsError, match=said):
        attack(models[LinearProbe], name, digits.val[0][:2], digits.val[1][:2], 0.1, **options)
