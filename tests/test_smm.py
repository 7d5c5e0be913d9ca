"SMM: sizes as published, masks by the formula, batch normalisation in both modes, and what a deployed prompt costs."
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spikeprompt.backbones import Backbone, create_backbone
from spikeprompt.data import read_digits
from spikeprompt.energy import count_macs, footprint, picojoules
from spikeprompt.experiments import load_run, prepared_split, run, save_run
from spikeprompt.methods.smm import SMM, SMMConfig, mask_network
from spikeprompt.prompts import Head, PromptedModel, prompt_parameters
from spikeprompt.settings import SettingsError, TargetSettings, TrainSettings
from spikeprompt.training import outputs, trainable_state


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(read_digits().x_train[:16]).expand(-1, 3, -1, -1) / 255


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
    D = backbone.num_features
    return PromptedModel(backbone, prompt, Head(torch.zeros(D), torch.ones(D), torch.zeros(10, D), torch.zeros(10)))


def normalisations(prompt):
    return [layer for layer in prompt.network if isinstance(layer, nn.BatchNorm2d)]


def test_sizes_are_the_published_ones():
    prompt = SMM(SMMConfig(), Backbone("resnet18", timm.create_model("resnet18")))
    normalised = sum(p.numel() for layer in normalisations(prompt) for p in layer.parameters())
    network = sum(p.numel() for p in prompt.network.parameters())
    assert (network - normalised, normalised, prompt.delta.numel()) == (26_259, 240, 150_528)
    assert prompt_parameters(prompt) == 26_499 + 150_528
    assert prompt.stored_bits == 32 * (26_259 + 150_528)
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
    assert prompt.operations(images)["macs"] == count_macs(prompt.network, images) + images[0].numel()
    backbone.input_size = (15, 45)
    with pytest.raises(SettingsError, match="pools = 4: allowed are 0 to 3 for pictures of 15 px"):
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


def test_what_is_stored_is_enough(prompt, images):
    layers = list(prompt.network)
    folded = []
    for layer, following in zip(layers, [*layers[1:], None]):
        if isinstance(following, nn.BatchNorm2d):
            layer = fuse_conv_bn_eval(layer, following)
        if not isinstance(layer, nn.BatchNorm2d):
            folded.append(layer)
    deployed = deepcopy(prompt)
    deployed.network = nn.Sequential(*folded)
    assert 32 * sum(p.numel() for p in deployed.parameters()) == prompt.stored_bits < 32 * prompt_parameters(prompt)
    with torch.no_grad():
        assert torch.allclose(deployed.pixels(images), prompt.pixels(images), atol=1e-5)


@pytest.mark.parametrize("pools", range(5))
def test_operations_are_those_of_the_flop_counter(prompt, images, pools):
    prompt.network = mask_network(pools)
    made = prompt.operations(images)
    assert made["macs"] == count_macs(prompt.network, images) + 3 * 32 * 32
    assert made["acs"] == made["membrane_updates"] == 0


def test_footprint_adds_the_network_to_the_system(model, prompt, images):
    cost = footprint(model, images)
    assert cost["prompt_macs"] == prompt.operations(images)["macs"]
    assert cost["prompt_pj"] == pytest.approx(picojoules(**prompt.operations(images)))
    assert cost["deployed_bytes"] == 4 * (3072 + 26_259) and cost["connection_sparsity"] == pytest.approx(0, abs=0.01)


def test_measures(prompt, images):
    masks = prompt.masks(images).detach()
    shared = masks.mean(0).square().mean() / masks.square().mean()
    found = prompt.measures(images)
    assert found["mask_spread"] == pytest.approx(1 - shared.item(), abs=1e-4) and 0.01 < found["mask_spread"] < 1
    assert prompt.measures(images[:1].expand(4, -1, -1, -1))["mask_spread"] == pytest.approx(0, abs=1e-6)
    nn.init.zeros_(prompt.delta[:, :16])
    assert prompt.measures(images)["density"] == pytest.approx(0.5, abs=0.01)


def test_bf16_stays_close(prompt, images):
    whole = prompt.prompt(images)
    with torch.autocast("cpu", torch.bfloat16):
        low = prompt.pixels(images)
        rounded = prompt.prompt(images)
    assert low.dtype == torch.float32
    assert (rounded - whole).square().mean() < 1e-3 * whole.square().mean()


def test_running_statistics_are_saved_with_a_run(tmp_path):
    train, config = TrainSettings(epochs=2, probe_c=[0.01]), SMMConfig()
    fresh = create_backbone("pocket_resnet")
    digits = prepared_split(read_digits(), TargetSettings(n_train=128, n_val=64), 0, fresh, "digits")
    model, history, record = run("pocket_resnet", "smm", config, digits, train, 0, report=lambda line: None)
    assert history.density.iloc[0] == 0 and history.density.iloc[-1] > 0.99
    assert record["prompt_parameters"] == 26_499 + 3 * 32 * 32
    save_run(model, tmp_path / "run.safetensors")
    loaded = load_run(tmp_path / "run.safetensors", "pocket_resnet", "smm", config, train.weights)
    kept, state = trainable_state(model), trainable_state(loaded)
    assert kept.keys() == state.keys() and all(torch.equal(kept[name], state[name].to(kept[name].device)) for name in kept)
    assert normalisations(loaded.prompt)[0].num_batches_tracked > 0
    assert torch.equal(outputs(model.cpu(), digits.val[0]), outputs(loaded, digits.val[0]))
