"Counts of operations against closed forms, brute force and spikingjelly's counter; energies that add up."

import numpy as np
import pytest
import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter
from torch import nn

from spikeprompt.backbones.loader import create_backbone
from spikeprompt.backbones.pocket import pocket_names
from spikeprompt.baselines.vpt import VPT
from spikeprompt.evaluation.energy import (
    MAC_PJ,
    MEMBRANE_PJ,
    attention_shapes,
    count_macs,
    deployed_bytes,
    footprint,
    non_spiking_counterparts,
    operations,
    picojoules,
)
from spikeprompt.methods.lorsp import LoRSP, LoRSPConfig
from spikeprompt.prompts.base import Prompt, method_class
from spikeprompt.prompts.tokens import attach_prefix, token_blocks


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


def test_a_head_of_zeros_is_counted():
    head, features = nn.Linear(64, 10), torch.rand(1, 64)
    nn.init.zeros_(head.weight)
    assert spikingjelly(head, features)[0] == 0 and count_macs(head, features) == 640


class Score(nn.Module):
    def forward(self, x):
        return x[0] @ x[0, 0]


@pytest.mark.parametrize(
    "model, operator",
    [
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "_transformer_encoder_layer_fwd"),
        (nn.LSTM(8, 8), "rnn"),
        (Score(), "aten.mv"),
    ],
)
def test_an_uncounted_product_is_an_error(model, operator):
    with pytest.raises(NotImplementedError, match=f"no MAC formula for .*{operator}"):
        count_macs(model.eval(), torch.rand(2, 5, 8))


@pytest.mark.parametrize("variant", ["factor", "binary"])
def test_lorsp_operations_by_brute_force(variant, prompted, images):
    prompt = prompted("pocket_resnet", "lorsp", rank=3, pool_size=8, variant=variant).prompt.eval()
    s_b, s_a = prompt.spikes(images[:1])
    pairs = 0
    for k in range(3):
        for c in range(3):
            for row in s_b[k, 0, c].tolist():
                for column in s_a[k, 0, c].tolist():
                    pairs += row * column
    assert pairs > 0
    currents = sum(8 * 8 + 32 for _ in range(3 * 3) for _ in "ba")  # a product with the pooled image, then times g
    statistics = 3 * 32 * 32  # a square for the variance and an addition for the pooled mean
    added = (prompt.prompt(images[:1]) != 0).sum().item()
    cost = operations(prompt, images[:1])
    assert cost["macs"] == statistics + currents + (pairs if variant == "factor" else 0)
    assert cost["acs"] == pytest.approx(statistics + added + (pairs if variant == "binary" else 0))
    assert cost["membrane_updates"] == s_b.numel() + s_a.numel()


def test_a_static_lorsp_is_made_once(prompted, images):
    assert set(operations(prompted("pocket_resnet", "lorsp", variant="static").prompt, images).values()) == {0.0}


def test_controls_of_lorsp_have_no_membrane(prompted, images):
    spiking = operations(prompted("pocket_resnet", "lorsp").prompt, images)
    plain = operations(prompted("pocket_resnet", "lorsp_no_carry").prompt, images)
    sort = operations(prompted("pocket_resnet", "lorsp_magnitude_mask").prompt, images)
    assert spiking["membrane_updates"] == 4 * 3 * 64 and plain["membrane_updates"] == sort["membrane_updates"] == 0
    assert spiking["acs"] < plain["acs"] < sort["acs"]


class Filtered(Prompt):
    "A method of one's own that makes a prompt for each image."

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.filter = nn.Conv2d(3, 3, 3, padding=1)

    def pixels(self, images):
        return images + self.filter(images)


def test_the_default_counts_the_products_of_a_prompt_of_ones_own(images):
    prompt = Filtered(None, create_backbone("pocket_resnet"))
    assert operations(prompt, images) == {"macs": 32 * 32 * 3 * 3 * 9, "acs": 0, "membrane_updates": 0}
    assert set(operations(Prompt(None, None), images).values()) == {0.0}


METHODS = ["no_prompt", "lor_vp", "lorsp", "vpt", "spike_nvpt", "smm", "full_finetuning"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["pocket_vit", "pocket_resnet"])
def test_system_is_backbone_and_prompt(name, method, prompted, images):
    model = prompted(name, method).train()
    cost = footprint(model, images)
    assert model.training and model.prompt.training  # a query leaves the mode
    assert cost["backbone_macs"] == count_macs(nn.Sequential(create_backbone(name), model.head).eval(), images)
    for way in "tokens", "prefix":
        assert cost[f"effective_macs_{way}"] == cost["backbone_macs"] + cost[f"prompt_macs_{way}"]
        assert cost[f"system_pj_{way}"] == pytest.approx(cost["backbone_macs"] * MAC_PJ + cost[f"prompt_pj_{way}"])
    tokens = name == "pocket_vit" and method in ("vpt", "spike_nvpt")
    assert (
        (cost["prompt_macs_tokens"] > cost["prompt_macs_prefix"] > 0)
        if tokens
        else cost["prompt_macs_tokens"] == cost["prompt_macs_prefix"]
    )
    if method == "lorsp":
        model.eval()
        assert cost["prompt_pj_prefix"] == pytest.approx(picojoules(**operations(model.prompt, images)))
        assert cost["activation_sparsity"] == pytest.approx(0.7, abs=0.02) and cost["membrane_updates"] == 768
    else:
        assert cost["membrane_updates"] == cost["effective_acs"] == 0 and np.isnan(cost["activation_sparsity"])
    if method in ("no_prompt", "lor_vp", "full_finetuning") or (name == "pocket_resnet" and method not in ("lorsp", "smm")):
        assert cost["prompt_macs_tokens"] == cost["prompt_pj_prefix"] == cost["prompt_percent_tokens"] == 0


def running_macs(name, prompt, images):
    "MACs that a model with deep tokens adds as it runs, and as a copy whose attention holds the prefix."
    bare, running, prefixed = (create_backbone(name) for _ in range(3))
    prompt.attach(running)
    attach_prefix(prefixed.model, [prompt.prompt_tokens(layer) for layer in range(len(prompt.shapes))])
    return [count_macs(model, images) - count_macs(bare, images) for model in (running, prefixed)]


@pytest.mark.parametrize("method", ["vpt", "spike_nvpt"])
def test_deep_tokens_of_a_vit_cost_what_the_running_models_do(method, prompted, images):
    model, (p, N, D) = prompted("pocket_vit", method, num_tokens=10), (10, 17, 128)
    cost = footprint(model, images)
    assert [cost["prompt_macs_tokens"], cost["prompt_macs_prefix"]] == running_macs("pocket_vit", model.prompt, images)
    assert cost["prompt_macs_tokens"] == 4 * (vit_block(N + p, D) - vit_block(N, D)) and cost["prompt_macs_prefix"] == 4 * 2 * p * N * D


def test_deep_tokens_of_a_swin_are_counted_both_ways(prompted, images):
    model = prompted("pocket_swin", "vpt", num_tokens=10)
    cost = footprint(model, images)
    assert [cost["prompt_macs_prefix"]] * 2 == running_macs("pocket_swin", model.prompt, images)  # it runs with keys and values alone
    grids = [16 * 16 // 4 ** (stage + 1) for stage in range(3) for _ in range(2)]
    widths = [width for _, width in token_blocks(model.backbone)]
    assert cost["prompt_macs_prefix"] == sum(2 * 10 * L * C for L, C in zip(grids, widths, strict=True))
    assert cost["prompt_percent_tokens"] > 10 * cost["prompt_percent_prefix"]


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_shallow_tokens_pay_what_the_formula_of_whole_tokens_says(name, prompted, images):
    "The tokens of a shallow prompt pass every block; a Swin also merges them between stages."
    shallow = footprint(prompted(name, "vpt", num_tokens=10, depth="shallow"), images)
    deep = footprint(model := prompted(name, "vpt", num_tokens=10), images)
    stages = getattr(model.backbone.model, "layers", [])[1:]
    merging = sum(10 * stage.downsample.reduction.weight.numel() for stage in stages)
    assert shallow["prompt_macs_tokens"] == shallow["prompt_macs_prefix"] == deep["prompt_macs_tokens"] + merging


def test_a_merged_model_costs_what_the_prefix_column_says(prompted, images):
    model = prompted("pocket_vit", "vpt")
    cost = footprint(model, images)
    assert count_macs(model.merge_and_unload(), images) == cost["effective_macs_prefix"]


def test_attention_shapes_are_windows_and_tokens_and_leave_no_hook():
    backbone = create_backbone("pocket_swin")
    images = torch.rand(3, 3, 32, 32)
    assert all(windows * N == 4 ** (3 - number // 2) for number, (windows, N) in enumerate(attention_shapes(backbone, images)))
    assert not any(module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_resnet"])
def test_spike_nvpt_stores_packed_bits_and_scales(name, prompted):
    prompt = prompted(name, "spike_nvpt").prompt
    num_bits = sum(rows * columns for rows, columns in prompt.shapes)
    numbers = sum(tensor.numel() for tensor in prompt.scales.state_dict().values())
    assert deployed_bytes(prompt) == -(-num_bits // 8) + 4 * numbers
    dense = VPT(method_class("vpt").config_class(), create_backbone(name))
    assert deployed_bytes(dense) == 4 * num_bits


def test_counterparts_without_membranes(images):
    prompt = LoRSP(LoRSPConfig(), backbone := create_backbone("pocket_resnet")).eval()
    prompt.calibrate(images, backbone)
    energies, updates = non_spiking_counterparts(prompt, images), operations(prompt, images)["membrane_updates"]
    assert energies["spiking"] - energies["gated"] == pytest.approx(updates * (MEMBRANE_PJ - 0.9))  # all that the membrane adds
    prompt.thresholds.data.zero_()  # every row and column fires at every step: neither skips anything
    energies, cost = non_spiking_counterparts(prompt, images[:1]), operations(prompt, images[:1])
    assert energies["firing_rate"] == 1
    scaled = 3 * 32 * 32 * (2 * 3.7 + 10)  # the stored pattern, from 32 KB, times both values
    compared = (4 + 3) * 192 * 0.9  # additions and comparisons of each row and column
    currents = cost["macs"] - 4 * 3 * 32 * 32
    assert energies["counted"] == pytest.approx(picojoules(currents, cost["acs"]) + scaled + compared + 3 * 192 * 10 / 32)
    with pytest.raises(ValueError, match="variant 'static'"):
        non_spiking_counterparts(LoRSP(LoRSPConfig(variant="static"), backbone), images)


def test_a_gate_always_costs_less_than_a_membrane_and_energy_rises_with_the_firing_rate(images):
    backbone, energies = create_backbone("pocket_resnet"), []
    for rate in (0.05, 0.3, 0.8):
        torch.manual_seed(0)
        prompt = LoRSP(LoRSPConfig(firing_rate=rate), backbone)
        prompt.calibrate(images, backbone)
        energies.append(non_spiking_counterparts(prompt, images))
    assert all(one["gated"] < one["spiking"] for one in energies)
    assert [one["spiking"] for one in energies] == sorted(one["spiking"] for one in energies)
