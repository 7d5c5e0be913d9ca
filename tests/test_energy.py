"Counts of operations against closed forms, brute force and spikingjelly's counter; energies that add up."
import numpy as np
import pytest
import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter
from torch import nn

from spikeprompt.backbones import create_backbone
from spikeprompt.energy import MAC_PJ, MEMBRANE_PJ, count_macs, footprint, picojoules, quantised_twin
from spikeprompt.export import fold_into_mean
from spikeprompt.methods.lorsp import LoRSP, LoRSPConfig
from spikeprompt.pocket import pocket_names
from spikeprompt.tokens import token_places, unprompted

NAMES = {"prompt_parameters", "deployed_bytes", "system_bytes", "connection_sparsity", "activation_sparsity", "effective_macs",
         "effective_acs", "membrane_updates", "backbone_macs", "prompt_macs", "prompt_pj", "system_pj", "prompt_percent"}


def spikingjelly(model, images, mode=torch.no_grad):
    "MACs of a batch and the operators without a rule; batch norms, which fold into convolutions, are left out."
    counter = MACCounter(extra_ignore_modules=[nn.BatchNorm2d])
    with mode(), DispatchCounterMode([counter]) as counting:
        model.eval()(images)
    return counter.get_total(), " ".join(counting.get_unsupported(counter))


def unfuse(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def vit_block(N, D, ratio=2):
    "MACs of a ViT block: four projections, two products of attention, two layers."
    return 4 * N * D**2 + 2 * N**2 * D + 2 * ratio * N * D**2


def test_closed_forms():
    assert count_macs(nn.Linear(12, 7), torch.rand(3, 5, 12)) == 5 * 12 * 7
    assert count_macs(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), torch.rand(1, 6, 10, 10)) == 5 * 5 * 8 * 3 * 9
    block = create_backbone("pocket_vit").model.blocks[0]
    fused = count_macs(block, torch.rand(1, 17, 128))
    unfuse(block)
    assert fused == count_macs(block, torch.rand(1, 17, 128)) == vit_block(17, 128)


@pytest.mark.parametrize("name", pocket_names)
def test_equal_to_spikingjelly_with_unfused_attention(name, images):
    backbone = create_backbone(name)
    ours = count_macs(backbone, images)
    unfuse(backbone)
    theirs, missed = spikingjelly(backbone, images[:2])
    assert ours == count_macs(backbone, images) == theirs / 2
    assert "attention" not in missed and "linear" not in missed and "conv" not in missed


def test_inference_mode_counts_nothing_in_spikingjelly_and_everything_here(images):
    backbone = create_backbone("pocket_vit")
    theirs, missed = spikingjelly(backbone, images, torch.inference_mode)
    assert theirs == 0 and "linear" in missed and "conv2d" in missed
    expected = count_macs(backbone, images)
    with torch.inference_mode():
        assert count_macs(backbone, images) == expected


def test_fused_attention_is_missing_in_spikingjelly(images):
    backbone = create_backbone("pocket_vit")
    theirs, missed = spikingjelly(backbone, images[:1])
    assert count_macs(backbone, images) - theirs == 4 * 2 * 17**2 * 128 and "attention" in missed


def test_a_head_of_zeros_is_missing_in_spikingjelly():
    head, features = nn.Linear(64, 10), torch.rand(1, 64)
    nn.init.zeros_(head.weight)
    assert spikingjelly(head, features)[0] == 0 and count_macs(head, features) == 640


class Score(nn.Module):
    def forward(self, x):
        return x[0] @ x[0, 0]


@pytest.mark.parametrize("model, operator", [
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "_transformer_encoder_layer_fwd"),
    (nn.LSTM(8, 8), "rnn"), (Score(), "aten.mv")])
def test_an_uncounted_product_is_an_error(model, operator):
    with pytest.raises(NotImplementedError, match=f"no MAC formula for .*{operator}"):
        count_macs(model, torch.rand(2, 5, 8))


def test_lorsp_operations_by_brute_force(prompted, images):
    prompt = prompted("pocket_resnet", "lorsp", rank=3, pooled=8).prompt
    s_b, s_a = prompt.spikes(images[:1])
    pairs = 0
    for k in range(3):
        for c in range(3):
            for row in s_b[k, 0, c].tolist():
                for column in s_a[k, 0, c].tolist():
                    pairs += row * column
    assert pairs > 0
    currents = sum(8 * 8 + 32 for _ in range(3 * 3) for _ in "ba")  # a product with the pooled picture, then times g
    statistics = 3 * 32 * 32  # a square for the variance and an addition for the pooled mean
    made = prompt.operations(images[:1])
    assert made["macs"] == statistics + pairs + currents
    assert made["acs"] == pytest.approx(statistics + (prompt.prompt(images[:1]) != 0).sum().item())
    assert made["membrane_updates"] == s_b.numel() + s_a.numel()


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_resnet"])
@pytest.mark.parametrize("method", ["linear_probe", "lor_vp", "lorsp", "vpt", "spike_nvpt", "smm", "lorsp_random_mask"])
def test_system_is_backbone_and_prompt(name, method, prompted, images):
    model = prompted(name, method)
    cost = footprint(model, images)
    assert set(cost) == NAMES
    assert cost["effective_macs"] == cost["backbone_macs"] + cost["prompt_macs"]
    assert cost["backbone_macs"] == count_macs(nn.Sequential(create_backbone(name), model.head), images)
    assert cost["system_pj"] == pytest.approx(cost["backbone_macs"] * MAC_PJ + cost["prompt_pj"])
    if method == "lorsp":
        assert cost["prompt_pj"] == pytest.approx(picojoules(**model.prompt.operations(images))) and cost["membrane_updates"] == 768
        assert cost["activation_sparsity"] == pytest.approx(0.7, abs=0.02)
    else:
        assert cost["membrane_updates"] == cost["effective_acs"] == 0 and np.isnan(cost["activation_sparsity"])
    if method in ("linear_probe", "lor_vp", "lorsp_random_mask") or (name == "pocket_resnet" and method not in ("lorsp", "smm")):
        assert cost["prompt_macs"] == cost["prompt_pj"] == cost["prompt_percent"] == 0


def test_a_static_pixel_prompt_folds_into_the_mean(prompted, images):
    model = prompted("pocket_resnet", "lor_vp")
    nn.init.normal_(model.prompt.B)
    folded = create_backbone("pocket_resnet")
    folded.mean = fold_into_mean(folded.model, model.prompt.pattern().detach(), folded.mean, folded.std)
    with torch.no_grad():
        assert torch.allclose(folded(images), model.backbone(model.prompt.pixels(images)), atol=1e-4)
    assert count_macs(folded, images) == count_macs(model.backbone, images)


@pytest.mark.parametrize("method", ["vpt", "spike_nvpt"])
def test_tokens_cost_what_the_closed_form_says(method, prompted, images):
    p, N, D = 10, 17, 128
    extra = footprint(prompted("pocket_vit", method, tokens=p), images)["prompt_macs"]
    assert extra == 4 * (vit_block(N + p, D) - vit_block(N, D))


def test_swin_pays_for_extra_keys_alone(prompted, images):
    model = prompted("pocket_swin", "vpt", tokens=10)
    grids = [16 * 16 // 4**(stage + 1) for stage in range(3) for _ in range(2)]
    widths = [width for _, width in token_places(model.backbone)]
    assert footprint(model, images)["prompt_macs"] == sum(2 * 10 * L * C for L, C in zip(grids, widths, strict=True))


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_unprompted_is_the_bare_backbone(name, prompted, images):
    model = prompted(name, "vpt")
    with torch.no_grad():
        assert torch.equal(unprompted(model.backbone)(images), create_backbone(name)(images))
        assert not torch.equal(model.backbone(images), create_backbone(name)(images))


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_resnet"])
def test_spike_nvpt_stores_packed_bits_and_scales(name, prompted, images):
    model = prompted(name, "spike_nvpt")
    prompt = model.prompt
    packed = [np.packbits(prompt.bits(layer).detach().numpy() > 0.5) for layer in range(len(prompt.latents))]
    scales = 2 * (3 if prompt.frame else sum(width for _, width in prompt.shapes))  # α and β: a channel, or a dimension and block
    assert footprint(model, images)["deployed_bytes"] == sum(bits.nbytes for bits in packed) + 4 * scales


def test_twins_without_membranes(images):
    backbone = create_backbone("pocket_resnet")
    prompt = LoRSP(LoRSPConfig(), backbone)
    prompt.start(images, backbone)
    twin = quantised_twin(prompt, images)
    updates = prompt.operations(images)["membrane_updates"]
    assert twin["spiking"] - twin["gated"] == pytest.approx(updates * (MEMBRANE_PJ - 0.9))  # all that the membrane adds
    prompt.thresholds.data.zero_()  # every row and column fires at every step: both skip nothing
    twin, made = quantised_twin(prompt, images), prompt.operations(images)
    assert twin["firing_rate"] == 1
    scaled = 3 * 32 * 32 * (2 * 3.7 + 10)  # the stored pattern, from 32 KB, times both values
    asked = (4 + 3) * 192 * 0.9            # additions and comparisons of each row and column
    currents = made["macs"] - 4 * 3 * 32 * 32
    assert twin["counted"] == pytest.approx(picojoules(currents, made["acs"]) + scaled + asked + 3 * 192 * 10 / 32)
