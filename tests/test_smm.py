"SMM: sizes as published, masks by the formula, and batch normalisation in both modes."

import pytest
import timm
import torch
from torch import nn

from spikeprompt.backbones.loader import Backbone, create_backbone
from spikeprompt.baselines.smm import SMM, SMMConfig, mask_network
from spikeprompt.config import ConfigError
from spikeprompt.model import Head, PromptedModel
from spikeprompt.prompts.base import num_parameters
from spikeprompt.robustness.faults import faulty
from spikeprompt.training.head import outputs


@pytest.fixture
def prompt(images):
    "In evaluation mode, with a pattern and running statistics that are not those of the start."
    torch.manual_seed(0)
    made = SMM(SMMConfig(), create_backbone("pocket_resnet"))
    nn.init.normal_(made.delta)
    with torch.no_grad():
        for _ in range(20):
            made.masks(images)
    return made.eval()


@pytest.fixture
def model(prompt):
    "The prompt on its backbone, with a head that knows nothing."
    backbone = create_backbone("pocket_resnet")
    return PromptedModel(backbone, prompt, Head(backbone.num_features, 10))


def normalisations(prompt):
    return [layer for layer in prompt.network if isinstance(layer, nn.BatchNorm2d)]


def test_sizes_are_the_published_ones():
    prompt = SMM(SMMConfig(), Backbone(timm.create_model("resnet18")))
    normalised = sum(p.numel() for layer in normalisations(prompt) for p in layer.parameters())
    network = sum(p.numel() for p in prompt.network.parameters())
    assert (network - normalised, normalised, prompt.delta.numel()) == (26_259, 240, 150_528)
    assert num_parameters(prompt) == 26_499 + 150_528
    assert prompt.network(torch.rand(1, 3, 224, 224)).shape == (1, 3, 28, 28)


@pytest.mark.parametrize("pools", range(5))
def test_prompt_is_the_pattern_times_one_value_a_patch(prompt, images, pools):
    prompt.network = mask_network(pools).eval()
    with torch.no_grad():
        small, P = prompt.network(images[:2]), prompt.pixels(images[:2]) - images[:2]
    assert small.shape[-1] == 32 // 2**pools
    for row in range(32):
        for column in range(32):
            value = small[:, :, row // 2**pools, column // 2**pools]
            assert torch.allclose(P[:, :, row, column], prompt.delta[:, row, column] * value, atol=1e-6)


def test_sides_that_no_patch_divides():
    backbone = create_backbone("pocket_resnet")
    backbone.input_size = (30, 45)
    prompt = SMM(SMMConfig(pools=3), backbone).eval()
    images = torch.rand(2, 3, 30, 45)
    masks = prompt.masks(images)
    assert prompt.pixels(images).shape == masks.shape == images.shape
    assert masks[0, 0].unique().numel() == 3 * 5
    backbone.input_size = (15, 45)
    with pytest.raises(ConfigError, match="pools = 4: allowed are 0 to 3 for images of 15 px"):
        SMM(SMMConfig(pools=4), backbone)
    backbone.input_size = (16, 45)
    SMM(SMMConfig(pools=4), backbone)


def test_config_refuses_what_cannot_work():
    for bad in ({"pools": -1}, {"pools": 5}, {"pools": 1.5}, {"lr": 0.0}, {"pool": 3}):
        with pytest.raises(ValueError):
            SMMConfig(**bad)


def test_starts_unprompted_and_the_network_learns_from_the_second_step(images):
    torch.manual_seed(0)
    backbone = create_backbone("pocket_resnet")
    prompt = SMM(SMMConfig(), backbone)
    assert torch.equal(prompt.pixels(images), images)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        backbone(prompt.pixels(images)).square().sum().backward()
        weights = [layer.weight.grad for layer in prompt.network if isinstance(layer, nn.Conv2d)]
        assert prompt.delta.grad.ne(0).float().mean() > 0.9
        assert all(grad.abs().sum().gt(0) == (step > 0) for grad in weights)
        optimizer.step()


def test_batch_statistics_in_training_and_running_ones_in_evaluation(model, prompt, images):
    others = torch.cat([images[:4], 1 - images[4:8]])

    def first_masks(batch):
        before = [layer.running_mean.clone() for layer in normalisations(prompt)]
        with torch.no_grad():
            model(batch)
            masks = prompt.masks(batch)[:4]
        moved = [not torch.equal(old, layer.running_mean) for old, layer in zip(before, normalisations(prompt))]
        return masks, moved

    model.train()
    (here, moved), (there, _) = first_masks(images[:8]), first_masks(others)
    assert all(moved) and not torch.allclose(here, there, atol=1e-2)
    outputs(model, images)
    (here, moved), (there, _) = first_masks(images[:8]), first_masks(others)
    assert not any(moved) and torch.allclose(here, there, atol=1e-5)


def test_batched_equals_one_by_one(prompt, images):
    with torch.no_grad():
        together, alone = prompt.pixels(images), torch.cat([prompt.pixels(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (prompt.masks(images[:1]) - prompt.masks(images[1:2])).abs().max() > 0.01


def test_measures(prompt, images):
    masks = prompt.masks(images).detach()
    shared = masks.mean(0).square().mean() / masks.square().mean()
    found = prompt.measures(images)
    assert found["mask_spread"] == pytest.approx(1 - shared.item(), abs=1e-4) and 0.01 < found["mask_spread"] < 1
    assert prompt.measures(images[:1].expand(4, -1, -1, -1))["mask_spread"] == pytest.approx(0, abs=1e-6)
    nn.init.zeros_(prompt.delta[:, :16])
    assert prompt.measures(images)["pixel_density"] == pytest.approx(0.5, abs=0.01)


def test_bf16_stays_close(prompt, images):
    whole = prompt.prompt(images)
    with torch.autocast("cpu", torch.bfloat16):
        low = prompt.pixels(images)
        rounded = prompt.prompt(images)
    assert low.dtype == torch.float32
    assert (rounded - whole).square().mean() < 1e-3 * whole.square().mean()


def test_measures_have_no_side_effects(prompt, images):
    before = {name: value.clone() for name, value in prompt.train().state_dict().items()}
    assert prompt.measures(images) == prompt.measures(images) and prompt.network.training
    assert all(torch.equal(before[name], value) for name, value in prompt.state_dict().items())


def test_noise_in_memory_gives_no_negative_variance(prompt, images):
    with torch.no_grad(), faulty(prompt, "gaussian", 2.0, torch.Generator().manual_seed(0)):
        assert prompt.pixels(images).isfinite().all()
