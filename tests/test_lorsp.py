"LoRSP and its controls: sparse and low-rank, one prompt an image, trainable everywhere, no state between calls."

import copy
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from spikeprompt.config import ConfigError, parse_config
from spikeprompt.controls.lorsp import LoRSPMagnitudeMask, LoRSPNoCarry, LoRSPPermuted, LoRSPRandomMask, LoRSPShuffled
from spikeprompt.methods.lorsp import VARIANTS, LoRSP, LoRSPConfig, mean_firing_rate
from spikeprompt.prompts.base import METHODS, create_prompt, num_parameters

CONTROLS = [LoRSPNoCarry, LoRSPPermuted, LoRSPShuffled, LoRSPRandomMask, LoRSPMagnitudeMask]
variants = pytest.mark.parametrize("variant", VARIANTS)
classes = pytest.mark.parametrize("cls", [LoRSP, *CONTROLS])


def noise(number, size=32, seed=0):
    "Images with structure: smooth noise in [0, 1]."
    coarse = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def make(cls=LoRSP, size=32, calibrate=True, **settings):
    torch.manual_seed(0)
    backbone = SimpleNamespace(input_size=(size, size))
    prompt = create_prompt(cls.config_class(**settings), backbone)
    if calibrate:
        prompt.calibrate(noise(64, size), backbone)
    return prompt.eval()


@pytest.mark.parametrize(
    "settings, count",
    [
        ({"rank": 4}, 5376),
        ({"rank": 2}, 2688),
        ({"rank": 1}, 1344),
        ({"learn_gain": True}, 5377),
        ({"thresholds": "learned"}, 5400),
        ({"learn_gain": True, "variant": "static"}, 5376),
        ({"thresholds": "learned", "variant": "select"}, 5388),
        ({"variant": "binary"}, 5388),
        ({"trainable": False}, 0),
    ],
)
def test_number_of_parameters_at_224_px(settings, count):
    assert num_parameters(make(size=224, calibrate=False, **settings)) == count


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("rank, firing_rate", [(1, 0.3), (2, 0.16), (4, 0.16), (4, 0.3)])
def test_sparse_and_low_rank_at_224_px(rank, firing_rate, calibrate):
    prompt = make(size=224, rank=rank, firing_rate=firing_rate, calibrate=calibrate)
    patterns = prompt.prompt(noise(8, 224, seed=1)).detach()
    assert torch.linalg.matrix_rank(patterns).max() <= rank
    assert (patterns != 0).float().mean().item() == pytest.approx(1 - (1 - firing_rate**2) ** rank, abs=0.03)


def test_a_pixel_is_zero_where_its_row_and_column_never_fire_together():
    prompt, images = make(), noise(8)
    rows, columns = prompt.spikes(images)
    together = torch.einsum("kbch,kbcw->bchw", rows, columns)
    assert prompt.prompt(images)[together == 0].abs().max() == 0


@variants
@pytest.mark.parametrize("surrogate", ["atan", "triangle", "sigmoid"])
def test_every_tensor_learns(variant, surrogate):
    prompt = make(variant=variant, surrogate=surrogate, learn_gain=True, thresholds="learned").train()
    (prompt.pixels(noise(32)) - 0.3).square().sum().backward()
    learning = {name: (p.grad != 0).float().mean().item() for name, p in prompt.named_parameters()}
    assert min(learning.values()) > (0.5 if surrogate == "triangle" else 0.9), learning


@variants
def test_variants_keep_what_they_promise(variant):
    prompt, images = make(variant=variant), noise(64)
    P = prompt.prompt(images).detach()
    rank, density = torch.linalg.matrix_rank(P).max().item(), (P != 0).float().mean().item()
    assert (rank <= 4) == (variant != "pixel")
    if variant in ("pixel", "select"):
        assert 0.3 < density < 1
    else:  # static has 32 rows and columns only
        assert density == pytest.approx(1 - (1 - 0.3**2) ** 4, abs=0.1 if variant == "static" else 0.04)
    assert mean_firing_rate(prompt.spikes(images)).item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(P[0], P[1]) == (variant == "static")
    assert (prompt.pattern() is not None) == (variant == "static")


def test_the_config_names_the_variants():
    assert set(get_args(LoRSPConfig.model_fields["variant"].annotation)) == set(VARIANTS)


@variants
def test_construction_draws_the_factors_and_nothing_else(variant):
    prompt = make(variant=variant, calibrate=False)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(prompt.b, 0.01 * torch.randn(3, 4, 32)) and torch.equal(prompt.a, 0.01 * torch.randn(3, 4, 32))
    assert torch.equal(after, torch.rand(1))
    assert mean_firing_rate(prompt.spikes(noise(64))).item() == pytest.approx(0.3, abs=0.15)


@variants
def test_training_starts_from_a_prompt_that_changes_nothing(variant):
    assert make(variant=variant).prompt(noise(8)).abs().max() < (0.05 if variant == "binary" else 0.004)  # a grey level


@classes
def test_forward_is_the_prompted_image(cls):
    prompt, images = make(cls).eval(), noise(8)
    prompted, penalty = prompt(images)
    assert torch.equal(prompted, prompt.pixels(images)) and penalty == 0
    assert torch.equal(prompted, images + prompt.prompt(images))


@classes
@pytest.mark.parametrize("training", [False, True])
def test_no_call_leaves_anything_behind_but_thresholds_in_training(cls, training):
    prompt, images = make(cls).train(training), noise(8)
    names, state = sorted(vars(prompt)), copy.deepcopy(prompt.state_dict())
    prompt.prompt(images), prompt.measures(images)
    assert all(torch.equal(value, state[key]) for key, value in prompt.state_dict().items())
    prompted, _ = prompt(images)
    prompted.square().sum().backward()
    assert prompt.measures(images).keys() == prompt.measures(images).keys() == {"pixel_density", "rms", "firing_rate"}
    assert sorted(vars(prompt)) == names
    changed = {key for key, value in prompt.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == ({"thresholds"} if training and cls.has_thresholds else set())
    twin = copy.deepcopy(prompt).eval()
    with torch.no_grad():
        prompt.b.zero_()
    assert twin.prompt(images).abs().max() > 0


@classes
def test_homeostasis_brings_the_rate_back_in_training_alone(cls):
    images, rate = noise(64), lambda prompt: mean_firing_rate(prompt.spikes(images)).item()
    settings = {} if cls.has_thresholds else {"firing_rate": 0.3125}
    prompt = make(cls, **settings)
    if not cls.has_thresholds:  # a mask needs none
        assert rate(prompt) == 0.3125
        return
    with torch.no_grad():
        prompt.thresholds.mul_(2)
    assert rate(prompt.eval()) == rate(prompt) < 0.2
    for _ in range(40):
        prompt.train()(images)
    assert rate(prompt.eval()) == pytest.approx(0.3, abs=0.02)
    fixed = make(cls, thresholds="fixed")
    before = fixed.thresholds.clone()
    fixed.train()(noise(64, seed=1))
    assert torch.equal(fixed.thresholds, before)


def test_the_scale_of_the_factors_moves_no_spike():
    small, large, images = make(init_std=0.01), make(init_std=1.0), noise(16)
    assert all((s != t).float().mean() < 1e-3 for s, t in zip(small.spikes(images), large.spikes(images)))
    torch.testing.assert_close(1e4 * small.prompt(images).mean(), large.prompt(images).mean(), rtol=0.05, atol=1e-3)


def test_an_untrained_prompt_has_nothing_to_learn():
    prompt = make(trainable=False, learn_gain=True, thresholds="learned")
    assert not prompt(noise(4))[0].requires_grad


@pytest.mark.parametrize("surrogate", ["atan", "triangle", "sigmoid"])
def test_factors_learn_a_low_rank_pattern(surrogate):
    prompt, images = make(surrogate=surrogate, rank=2, init_std=1.0, firing_rate=0.5), noise(16)
    draw = torch.Generator().manual_seed(3)
    sparse = lambda: torch.randn(3, 2, 32, generator=draw) * (torch.rand(3, 2, 32, generator=draw) < 0.5)
    wanted = torch.einsum("ckh,ckw->chw", sparse(), sparse())
    optimizer = torch.optim.Adam([prompt.b, prompt.a], 0.03)
    losses = []
    for _ in range(150):
        loss = (prompt.prompt(images) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * wanted.square().mean()


@variants
def test_batched_equals_one_by_one(variant):
    prompt, images = make(variant=variant), noise(6)
    alone = torch.cat([prompt.pixels(image[None]) for image in images])
    torch.testing.assert_close(prompt.pixels(images), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [cls for cls in CONTROLS if not cls.mixes_images])
def test_controls_batched_equal_one_by_one(cls):
    prompt, images = make(cls).eval(), noise(6)
    alone = torch.cat([prompt.pixels(image[None]) for image in images])
    torch.testing.assert_close(prompt.pixels(images), alone, rtol=0, atol=1e-5)


@variants
def test_autocast_changes_no_spike_and_no_pixel(variant):
    prompt, images = make(variant=variant), noise(4)
    with torch.autocast("cpu", torch.bfloat16):
        low = prompt(images)[0]
    assert low.dtype == torch.float32 and torch.equal(low, prompt(images)[0])


@variants
def test_a_bf16_model_spikes_in_fp32(variant):
    prompt = make(variant=variant, learn_gain=True, thresholds="learned").to(torch.bfloat16).train()
    images = noise(4).bfloat16()
    prompted, _ = prompt(images)
    assert prompted.dtype == prompt.pixels(images).dtype == torch.bfloat16
    assert all(s.dtype == torch.float32 for s in prompt.spikes(images)) and prompt.prompt(images).dtype == torch.float32
    prompted.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prompt.parameters())


@pytest.mark.parametrize(
    "cls, settings",
    [(LoRSP, {}), (LoRSP, {"variant": "select"}), (LoRSP, {"variant": "static"}), (LoRSPNoCarry, {}), (LoRSPMagnitudeMask, {})],
)
def test_exports_with_any_batch_size(cls, settings):
    prompt, images = make(cls, **settings).eval().requires_grad_(False), noise(7)

    class Pixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = prompt

        def forward(self, images):
            return self.prompt(images)[0]

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Pixels(), (images[:3],), dynamic_shapes={"images": {0: batch}})
    torch.testing.assert_close(program.module()(images), prompt.pixels(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["factor", "pixel"])
def test_compiles_with_gradients(variant):
    torch._dynamo.reset()
    own, images = make(variant=variant).train(), noise(4)
    twin = copy.deepcopy(own)
    found = torch.compile(lambda images: own(images)[0], backend="eager", fullgraph=True)(images)
    expected = twin(images)[0]
    assert torch.equal(found, expected) and torch.equal(own.thresholds, twin.thresholds)
    grads = [torch.autograd.grad(x.square().sum(), [prompt.b, prompt.a]) for x, prompt in ((found, own), (expected, twin))]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@classes
def test_a_state_dict_is_the_whole_prompt(cls):
    prompt, images = make(cls).eval(), noise(4)
    torch.manual_seed(5)
    other = cls(cls.config_class(), SimpleNamespace(input_size=(32, 32))).eval()
    assert not torch.equal(other.pixels(images), prompt.pixels(images))
    other.load_deployed_state(prompt.deployed_state())
    assert torch.equal(other.pixels(images), prompt.pixels(images))


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"rank": 2.5}, {"firing_rate": 1.0}, {"lr": 0.0}, {"rnak": 2}, {"surrogate": "identity"}, {"thresholds": "none"}]
)
def test_config_refuses_what_cannot_work(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        parse_config(LoRSPConfig, bad, "lorsp")


@pytest.mark.parametrize(
    "cls, settings, message",
    [
        (LoRSPRandomMask, {"variant": "factor"}, "variant = 'factor': input should be 'static'"),
        (LoRSPRandomMask, {"thresholds": "learned"}, "thresholds = 'learned': input should be 'fixed'"),
        (LoRSPMagnitudeMask, {"variant": "pixel"}, "variant = 'pixel': input should be 'factor', 'binary' or 'static'"),
        (LoRSPMagnitudeMask, {"thresholds": "homeostatic"}, "thresholds = 'homeostatic': input should be 'fixed'"),
    ],
)
def test_masks_refuse_what_has_no_meaning_there(cls, settings, message):
    with pytest.raises(ConfigError, match=re.escape(f"here.{message}")):
        parse_config(cls.config_class, settings, "here")


@pytest.mark.parametrize("cls", CONTROLS)
def test_controls_are_registered_and_compared_with_lorsp(cls):
    assert METHODS[cls.method] is cls and cls.reference == "lorsp" and cls.label.startswith("LoRSP, ")
    assert num_parameters(make(cls)) == num_parameters(make())


@pytest.mark.parametrize("cls", [LoRSPRandomMask, LoRSPMagnitudeMask])
def test_masks_keep_the_rate_exactly_and_have_no_thresholds(cls):
    prompt, images = make(cls, firing_rate=0.3125), noise(32)
    assert "thresholds" not in prompt.state_dict()
    assert {s.mean(-1).unique().item() for s in prompt.spikes(images)} == {10 / 32}
    assert prompt.measures(images)["pixel_density"] == pytest.approx(1 - (1 - 0.3125**2) ** 4, abs=0.04)


def test_without_carry_only_the_first_step_is_the_same():
    images = noise(64)
    carry, no_carry = (make(cls).spikes(images)[0] for cls in (LoRSP, LoRSPNoCarry))
    differing = (carry != no_carry).float().mean((1, 2, 3))
    assert differing[0] == 0 and differing[1:].min() > 0.05
    torch.testing.assert_close(no_carry.mean((1, 2, 3)), torch.full((4,), 0.3), atol=0.01, rtol=0)
    assert torch.equal(make(rank=1).prompt(images), make(LoRSPNoCarry, rank=1).prompt(images))


def test_carry_lets_an_early_factor_act_on_a_late_spike():
    for cls, reaches in (LoRSP, True), (LoRSPNoCarry, False):
        prompt = make(cls, variant="static")
        prompt.spikes(noise(2))[0][-1].sum().backward()
        assert (prompt.b.grad[:, 0].abs().max() > 0.01) == reaches


@pytest.mark.parametrize("variant", get_args(LoRSPShuffled.config_class.model_fields["variant"].annotation))
def test_shuffled_images_get_the_gates_of_their_neighbours_in_training_and_evaluation(variant):
    own, shuffled, images = make(variant=variant), make(LoRSPShuffled, variant=variant), noise(8)
    assert variant != "static" and not torch.equal(own.prompt(images)[0], own.prompt(images)[1])
    for training in True, False:
        assert torch.equal(shuffled.train(training).prompt(images), own.train(training).prompt(images).roll(1, 0))
    assert shuffled.measures(images) == pytest.approx(own.measures(images))
    assert torch.equal(shuffled.prompt(images[:1]), own.prompt(images[:1]))  # alone, it has no other


def test_permuted_factors_are_lorsp_in_evaluation_and_random_in_training():
    permuted, images = make(LoRSPPermuted), noise(8)
    assert torch.equal(permuted.eval().prompt(images), make().prompt(images))
    passes = [permuted.train().prompt(images) for _ in range(5)]
    assert any(not torch.equal(passes[0], other) for other in passes[1:])
    assert mean_firing_rate(permuted.spikes(images)).item() == pytest.approx(0.3, abs=0.05)
