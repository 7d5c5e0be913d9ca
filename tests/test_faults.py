"What each fault does to a deployed prompt, and that the prompt comes back whole."

import pytest
import torch
from torch import nn

from spikeprompt.backbones.loader import create_backbone
from spikeprompt.config import ConfigError, RobustnessConfig
from spikeprompt.model import get_prompted_model
from spikeprompt.prompts.base import Prompt, PromptConfig, method_class, packaged_methods
from spikeprompt.robustness.faults import FAULTS, bit_flips, fault_conditions, faulty, gaussian, quantise, reached_tensors

LEVELS = {"quantise": 3, "gaussian": 0.5, "bit_flips": 0.3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unpack(packed):
    return (packed[..., None] >> torch.arange(8)) & 1


def prompted(method, backbone="pocket_vit", **settings):
    "An untrained prompt on its backbone."
    torch.manual_seed(0)
    cls = method_class(method)
    model = get_prompted_model(create_backbone(backbone), cls.config_class(**settings), 10)
    model.calibrate(torch.rand(32, 3, 32, 32, generator=seeded()))
    nn.init.normal_(model.head.linear.weight)
    return model.eval()


def copied(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Packed(Prompt):
    "Latents that learn; their signs and a scale are what is deployed."

    def __init__(self):
        super().__init__(PromptConfig(), None)
        self.latents, self.scale = nn.Parameter(torch.randn(100, 8, generator=seeded())), nn.Parameter(torch.tensor([1.0, 3.0]))

    def deployed_state(self):
        return {"bits": ((self.latents > 0).long() << torch.arange(8)).sum(-1).to(torch.uint8), "scale": self.scale}

    def load_deployed_state(self, state):
        with torch.no_grad():
            self.latents.copy_(2 * unpack(state["bits"]) - 1)
            self.scale.copy_(state["scale"])


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
def test_flips_have_their_share(share):
    packed = torch.randint(0, 256, (500,), dtype=torch.uint8, generator=seeded())
    flipped = bit_flips(packed, share, seeded(1))
    assert flipped.dtype == torch.uint8
    changed = unpack(packed) != unpack(flipped)
    assert abs(changed.float().mean() - share) <= 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-6
    assert (changed.float().mean(0) - share).abs().max() <= 0.1  # of every bit of a byte


def test_a_fault_reaches_what_is_stored_and_nothing_else():
    prompt = Packed()
    signs, scale = prompt.latents > 0, prompt.scale.detach().clone()
    assert (reached_tensors(prompt, "bit_flips"), reached_tensors(prompt, "quantise")) == (["bits"], ["scale"])
    with faulty(prompt, "bit_flips", 1):
        assert torch.equal(prompt.latents > 0, ~signs) and torch.equal(prompt.scale, scale)
    with faulty(prompt, "quantise", 2):
        assert torch.equal(prompt.latents > 0, signs) and prompt.scale.tolist() == [0, 3]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantised_values_lie_on_a_few_levels_nearby(bits):
    values = torch.randn(1000, generator=seeded())
    found = quantise(values, bits)
    step = values.abs().max() / (2 ** (bits - 1) - 1)
    assert len(found.unique()) <= 2**bits - 1
    assert (found - values).abs().max() <= step / 2 + 1e-6
    torch.testing.assert_close(quantise(-values, bits), -found)
    assert torch.equal(quantise(torch.zeros(3), bits), torch.zeros(3))


@pytest.mark.parametrize("level", [0, 0.1, 2.0])
def test_noise_is_measured_against_each_tensor(level):
    values = 5 + torch.randn(20_000, generator=seeded())
    noise = gaussian(values, level, seeded(1)) - values
    rms = values.square().mean().sqrt()
    assert noise.square().mean().sqrt() == pytest.approx((level * rms).item(), rel=0.03)
    assert noise.mean().abs() <= 4 * level * rms / 20_000**0.5


def test_sixteen_bits_are_enough():
    model, images = prompted("vpt"), torch.rand(8, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        whole = model(images)
        with faulty(model.prompt, "quantise", 16):
            fine = model(images)
        with faulty(model.prompt, "quantise", 2):
            coarse = model(images)
    assert 0 < (fine - whole).abs().max() < 0.05 * (coarse - whole).abs().max()


@pytest.mark.parametrize("backbone", ["pocket_vit", "pocket_resnet"])
@pytest.mark.parametrize("method", packaged_methods())
def test_every_prompt_comes_back_whole(method, backbone):
    model, images = prompted(method, backbone), torch.rand(4, 3, 32, 32, generator=seeded())
    prompt = model.prompt.train()
    with torch.no_grad():
        for parameter in prompt.parameters():  # zeros at the start have nothing to lose
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(1)))
    before, learns = copied(prompt.state_dict()), [p.requires_grad for p in prompt.parameters()]
    for fault in [fault for fault in FAULTS if reached_tensors(prompt, fault)]:
        stored = copied(prompt.deployed_state())
        with torch.no_grad(), faulty(prompt, fault, LEVELS[fault], seeded()):
            damaged = copied(prompt.deployed_state())
            assert model.eval()(images).isfinite().all()
        model.train()
        assert not equal(damaged, stored) and equal(prompt.state_dict(), before)
        with pytest.raises(ZeroDivisionError):
            with faulty(prompt, fault, LEVELS[fault], seeded()):
                1 / 0
        assert equal(prompt.state_dict(), before)
    assert [p.requires_grad for p in prompt.parameters()] == learns and all(p.grad is None for p in prompt.parameters())


@pytest.mark.parametrize("backbone", ["pocket_vit", "pocket_resnet"])
def test_spike_nvpt_stores_bits(backbone):
    model = prompted("spike_nvpt", backbone)
    bits = model.prompt.discrete_state()
    for share in 0, 0.3, 1:
        with faulty(model.prompt, "bit_flips", share, seeded()):
            changed = (model.prompt.discrete_state() != bits).float().mean()
        assert changed == pytest.approx(share, abs=4 * (share * (1 - share) / len(bits)) ** 0.5 + 1e-6)
    for fault, level in ("quantise", 2), ("gaussian", 1.0):
        with faulty(model.prompt, fault, level, seeded()):
            assert torch.equal(model.prompt.discrete_state(), bits)


def test_the_generator_fixes_chance():
    prompt = prompted("vpt").prompt

    def noisy(seed):
        with faulty(prompt, "gaussian", 0.1, seeded(seed)):
            return copied(prompt.state_dict())

    assert equal(noisy(0), noisy(0)) and not equal(noisy(0), noisy(1))


@pytest.mark.parametrize(
    "fault, level, kind, message",
    [
        ("rot", 1, ValueError, f"fault = 'rot': allowed are {', '.join(FAULTS)}"),
        ("quantise", 1, ValueError, "level of quantise = 1: allowed"),
        ("quantise", 4.5, ValueError, "level of quantise = 4.5: allowed"),
        ("gaussian", -1, ValueError, "level of gaussian = -1: allowed are 0 and more"),
        ("gaussian", float("inf"), ValueError, "level of gaussian = inf: allowed"),
        ("bit_flips", 1.1, ValueError, "level of bit_flips = 1.1: allowed"),
        ("bit_flips", 0.1, ConfigError, "bit_flips' on VPT.*: it stores no bits"),
    ],
)
def test_what_cannot_be_is_named(fault, level, kind, message):
    prompt = prompted("vpt").prompt
    before = copied(prompt.state_dict())
    with pytest.raises(kind, match=message) as caught:
        with faulty(prompt, fault, level, seeded()):
            pass
    assert "\n" not in str(caught.value) and equal(prompt.state_dict(), before)


def test_conditions_are_checked():
    assert fault_conditions(RobustnessConfig(faults={"quantise": [8.0, 2.0], "gaussian": [0.1]})) == [
        ("quantise", 8.0),
        ("quantise", 2.0),
        ("gaussian", 0.1),
    ]
    for faults, message in ({"rot": [1.0]}, "robustness.faults.rot: allowed"), ({"quantise": [1.0]}, "robustness.faults.quantise = 1.0"):
        with pytest.raises(ConfigError, match=message):
            fault_conditions(RobustnessConfig(faults=faults))
