"The peers: their published numbers of parameters, and LoRA beside peft's."

import importlib.util

import pytest
import timm
import torch

from spikeprompt.backbones.loader import Backbone, create_backbone
from spikeprompt.baselines.autovp import AutoVP, AutoVPConfig
from spikeprompt.baselines.evp import EVP, EVPConfig
from spikeprompt.baselines.frozen_factors import FrozenFactors, FrozenFactorsConfig
from spikeprompt.baselines.lor_vp import LoRVP, LoRVPConfig
from spikeprompt.baselines.lora import LoRA, LoRAConfig
from spikeprompt.baselines.quantised_lor_vp import QuantisedLoRVP, QuantisedLoRVPConfig, levels
from spikeprompt.baselines.vp import VP, VPConfig
from spikeprompt.baselines.vpt import VPT, VPTConfig
from spikeprompt.config import ConfigError
from spikeprompt.prompts.base import num_parameters


@pytest.fixture(scope="module")
def large():
    "ViT-B/16 at 224 px without weights."
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    return Backbone(model.to_empty(device="cpu"))


@pytest.mark.parametrize(
    "method, config, published",
    [
        (VP, VPConfig(pad_width=30), 69_840),
        (VP, VPConfig(template="full"), 150_528),
        (EVP, EVPConfig(pad_width=30), 69_840),
        (AutoVP, AutoVPConfig(scale=128 / 224, learn_scale=False), 101_376),
        (AutoVP, AutoVPConfig(scale=128 / 224), 150_529),  # all pixels, and the size
        (LoRVP, LoRVPConfig(rank=4), 5_376),
        (QuantisedLoRVP, QuantisedLoRVPConfig(rank=4), 5_376),
        (VPT, VPTConfig(num_tokens=10, depth="shallow"), 7_680),
        (VPT, VPTConfig(num_tokens=10), 92_160),
        (FrozenFactors, FrozenFactorsConfig(rank=64), 864),
        (LoRA, LoRAConfig(rank=4), 12 * 4 * (768 + 3 * 768)),
    ],
)
def test_a_peer_has_its_number_of_parameters_at_224_px(method, config, published, large):
    assert num_parameters(method(config, large)) == published


@pytest.mark.slow
def test_lora_gives_the_features_of_peft(monkeypatch):
    find = importlib.util.find_spec  # torchaudio, which spikingjelly pulls in, refuses a torch of another CUDA; transformers imports it
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name.startswith("torchaudio") else find(name, *a))
    peft = pytest.importorskip("peft")
    backbone, images = create_backbone("pocket_vit"), torch.rand(4, 3, 32, 32)
    ours = LoRA(LoRAConfig(rank=2, alpha=3.0), backbone)
    theirs = timm.create_model("pocket_vit", pretrained=True)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["qkv"]), theirs)
    state = theirs.state_dict()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, a, b in zip(ours.names, ours.A, ours.B):
            b.normal_()
            module = name.removesuffix(".weight")
            state[f"{module}.lora_A.default.weight"].copy_(a)
            state[f"{module}.lora_B.default.weight"].copy_(b)
        before = backbone(images)
        handles = ours.attach(backbone)
        found, expected = backbone(images), Backbone(theirs.eval())(images)
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 0.01 and torch.equal(backbone(images), before)


def test_the_gradient_of_evp_has_length_one_whatever_the_loss():
    backbone = create_backbone("pocket_resnet")
    prompt = EVP(EVPConfig(), backbone)
    for scale in 1e-3, 1.0, 1e3:
        prompt.values.grad = None
        (scale * backbone(prompt.pixels(torch.full((2, 3, 32, 32), 0.5)))).sum().backward()
        assert prompt.values.grad.norm().item() == pytest.approx(1, abs=1e-5)


def test_a_frame_leaves_the_inside_alone_and_a_padding_shrinks_it():
    backbone, images = create_backbone("pocket_resnet"), torch.rand(2, 3, 32, 32)
    frame, padded = VP(VPConfig(pad_width=4), backbone), EVP(EVPConfig(pad_width=4), backbone)
    with torch.no_grad():
        frame.values.fill_(0.5), padded.values.fill_(0.5)
        assert torch.equal(frame.pixels(images)[..., 4:-4, 4:-4], images[..., 4:-4, 4:-4])
        assert torch.allclose(frame.pixels(images)[..., :4, :], images[..., :4, :] + 0.5)
        assert torch.equal(padded.pixels(images)[..., :4, :], torch.full((2, 3, 4, 32), 0.5))


def test_the_size_of_an_image_is_learned_and_ends_at_the_frame():
    backbone = create_backbone("pocket_resnet")
    prompt, images = AutoVP(AutoVPConfig(scale=0.5), backbone), torch.rand(2, 3, 32, 32)
    half = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=False)
    inside = prompt.pixels(images)[:, :, 9:23, 9:23]  # the edge's pixels are part image, part frame
    assert torch.allclose(inside, half[:, :, 1:15, 1:15], atol=1e-5)
    prompt.pixels(images).square().sum().backward()
    assert prompt.log_scale.grad.abs() > 0
    with torch.no_grad():
        prompt.log_scale.fill_(1.0)
    assert torch.allclose(prompt.pixels(images), images, atol=1e-5) and prompt.measures(images) == {"image_scale": 1.0}
    with pytest.raises(ConfigError, match="scale = 0.05"):
        AutoVP(AutoVPConfig(scale=0.05), backbone)


@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_in_a_few_bits_factors_come_back_to_the_bit(bits):
    backbone, config = create_backbone("pocket_resnet"), QuantisedLoRVPConfig(rank=3, bits=bits)
    prompt, again = QuantisedLoRVP(config, backbone), QuantisedLoRVP(config, backbone)
    torch.manual_seed(bits)
    with torch.no_grad():
        prompt.B.normal_()
    state = prompt.deployed_state()
    again.load_deployed_state(state)
    assert torch.equal(again.pattern(), prompt.pattern()) and prompt.pattern().abs().max() > 0
    assert state["B.levels"].numel() == -(-3 * 32 * 3 * bits // 8) and state["steps"].numel() == 2
    found, step = levels(prompt.B, bits)
    assert found.abs().max() == 2 ** (bits - 1) - 1 and (step * found - prompt.B).abs().max() <= 0.51 * step
