"What an attack must keep to, what it must achieve, and that the seed fixes chance."

import pytest
import torch
from torch import nn

from spikeprompt.backbones.loader import create_backbone
from spikeprompt.config import ConfigError, DatasetConfig, RobustnessConfig
from spikeprompt.datasets.image_files import to_size
from spikeprompt.datasets.readers import read_dataset
from spikeprompt.datasets.splits import split
from spikeprompt.model import PromptedModel
from spikeprompt.prompts.base import method_class
from spikeprompt.robustness.attacks import ATTACKS, attack, attack_conditions, square_masks, square_side
from spikeprompt.training.head import accuracy, fit_head, outputs, to_pixels

QUICK = {"pgd": {"steps": 4}, "square": {"queries": 20}}


@pytest.fixture(scope="module")
def fashion():
    config = DatasetConfig(folder="data/fashion_mnist", n_train=300, n_val=40)
    found = split(read_dataset("fashion_mnist", config), config, 0)
    found.train, found.val = ((to_size(x, (32, 32)), y) for x, y in (found.train, found.val))
    return found


@pytest.fixture(scope="module")
def models(fashion):
    "A head fitted without a prompt, and the same head under an untrained LoRSP prompt."
    backbone, found = create_backbone("pocket_resnet"), {}
    head, _ = fit_head(*((outputs(backbone, images), labels) for images, labels in (fashion.train, fashion.val)), [0.1])
    for name in "no_prompt", "lorsp":
        torch.manual_seed(0)
        cls, backbone = method_class(name), create_backbone("pocket_resnet")
        found[name] = PromptedModel(backbone, cls(cls.config_class(), backbone), head).eval()
        found[name].calibrate(to_pixels(fashion.train[0][:64]))
    return found


class NoGradient(nn.Module):
    "A model whose output has no gradient."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).detach()


@pytest.mark.parametrize("method", ["no_prompt", "lorsp"])
@pytest.mark.parametrize("name", ATTACKS)
def test_images_stay_in_the_ball_and_parameters_get_no_gradient(models, fashion, method, name):
    model, (images, labels) = models[method], (fashion.val[0][:8], fashion.val[1][:8])
    found = attack(model, name, images, labels, 0.1, **QUICK.get(name, {}))
    change = (found - to_pixels(images)).abs()
    assert 0.09 < change.max() <= 0.1 + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ATTACKS)
def test_epsilon_zero_changes_nothing(models, fashion, name):
    images, labels = fashion.val[0][:8], fashion.val[1][:8]
    assert torch.equal(attack(models["lorsp"], name, images, labels, 0, **QUICK.get(name, {})), to_pixels(images))


def test_gradients_lower_accuracy_and_steps_lower_it_further(models, fashion):
    model, (images, labels) = models["no_prompt"], fashion.val
    clean = accuracy(outputs(model, images), labels)
    fgsm, pgd = (accuracy(outputs(model, attack(model, name, images, labels, 24 / 255)), labels) for name in ("fgsm", "pgd"))
    assert clean > 0.6
    assert pgd <= fgsm < clean - 0.2
    assert pgd < 0.3


def test_square_needs_no_gradients(models, fashion):
    images, labels = fashion.val
    model = NoGradient(models["no_prompt"])
    with torch.inference_mode():
        found = attack(model, "square", images, labels, 48 / 255, queries=60)
    assert accuracy(outputs(model, found), labels) < accuracy(outputs(model, images), labels) - 0.2
    with pytest.raises(RuntimeError, match="does not require grad"):
        attack(model, "fgsm", images, labels, 48 / 255)


def test_square_queries_only_what_is_not_yet_misclassified(models, fashion):
    images, labels = fashion.val
    queried = []

    class Counted(NoGradient):
        def forward(self, pixels):
            queried.append(len(pixels))
            return super().forward(pixels)

    attack(Counted(models["no_prompt"]), "square", images, labels, 64 / 255, queries=40)
    assert queried[0] == len(images) and queried[-1] < len(images)
    assert queried[1:] == sorted(queried[1:], reverse=True)


def test_attacks_on_a_linear_model_have_a_closed_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    images, labels = 0.3 + 0.4 * torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])
    w = model[1].weight.detach()
    expected = images + 0.1 * (w[1 - labels] - w[labels]).sign().view_as(images)
    torch.testing.assert_close(attack(model, "fgsm", images, labels, 0.1), expected)
    torch.testing.assert_close(attack(model, "pgd", images, labels, 0.1), expected)


def test_pgd_starts_anywhere_in_the_ball(models):
    grey = torch.full((4, 3, 32, 32), 0.5)
    change = attack(models["no_prompt"], "pgd", grey, torch.zeros(4, dtype=torch.long), 0.1, steps=1, step_size=0.0) - grey
    assert change.mean().abs() < 0.003 and change.abs().max() > 0.099
    assert change.std() == pytest.approx(0.2 / 12**0.5, rel=0.03)
    assert not torch.equal(change[0], change[1])


@pytest.mark.parametrize("name", ATTACKS)
def test_neither_batches_nor_the_type_of_the_labels_matter(name):
    "On a model in fp64 whose sums do not depend on the batch."
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).double()
    images, labels, options = torch.rand(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 5, QUICK.get(name, {})
    one = attack(model, name, images, labels, 0.1, **options)
    parts = attack(model, name, images, labels.to(torch.uint8), 0.1, batch_size=5, **options)
    assert one.shape == parts.shape == images.shape
    torch.testing.assert_close(one, parts)


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_the_seed_fixes_chance(models, fashion, name):
    images, labels = fashion.val[0][:6], fashion.val[1][:6]
    first, again, other = (attack(models["lorsp"], name, images, labels, 0.1, seed, **QUICK[name]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_squares_have_their_side_and_lie_inside():
    corners = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    masks = square_masks(corners, 3, (5, 9))
    assert masks.shape == (200, 1, 5, 9) and (masks.sum((1, 2, 3)) == 9).all()
    assert masks.any(0).all()
    assert [square_side(query, 10_000, 0.8, (32, 32)) for query in (1, 10, 50, 8000)] == [29, 20, 14, 2]
    assert square_side(9_999, 10_000, 0.001, (32, 32)) == 1


@pytest.mark.parametrize(
    "name, epsilon, options, message",
    [
        ("deepfool", 0.1, {}, "attack = 'deepfool': allowed are fgsm, pgd, square"),
        ("fgsm", -0.1, {}, "epsilon = -0.1: allowed are 0 to 1"),
        ("fgsm", float("nan"), {}, "epsilon = nan: allowed are 0 to 1"),
        ("pgd", 0.1, {"steps": 0}, "steps = 0"),
        ("square", 0.1, {"queries": 0}, "queries = 0"),
        ("square", 0.1, {"p": 1.5}, "p = 1.5"),
    ],
)
def test_wrong_arguments_are_named(models, fashion, name, epsilon, options, message):
    with pytest.raises(ValueError, match=message):
        attack(models["no_prompt"], name, fashion.val[0][:2], fashion.val[1][:2], epsilon, **options)


def test_conditions_have_their_options_and_wrong_ones_are_named():
    config = RobustnessConfig(attacks={"square": [0.1, 0.2], "fgsm": [0.1], "pgd": [0.3]}, attack_steps=7, attack_queries=50)
    assert attack_conditions(config) == [
        ("square", 0.1, {"queries": 50}),
        ("square", 0.2, {"queries": 50}),
        ("fgsm", 0.1, {}),
        ("pgd", 0.3, {"steps": 7}),
    ]
    for attacks, message in ({"deepfool": [0.1]}, "robustness.attacks.deepfool: allowed"), ({"pgd": [2.0]}, "robustness.attacks.pgd = 2.0"):
        with pytest.raises(ConfigError, match=message):
            attack_conditions(RobustnessConfig(attacks=attacks))
