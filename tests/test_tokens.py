"Prompt tokens in every kind of ViT and Swin that timm builds, and what those are told that cannot take them."
from copy import deepcopy

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from spikeprompt.backbones import Backbone, create_backbone
from spikeprompt.data import read_digits
from spikeprompt.deployment import deployed, export_tokens, fold_tokens, load_tokens
from spikeprompt.energy import count_macs
from spikeprompt.experiments import prepared_split, run
from spikeprompt.export import traced
from spikeprompt.methods.spike_nvpt import SpikeNVPT, SpikeNVPTConfig
from spikeprompt.methods.vpt import VPT, VPTConfig
from spikeprompt.prompts import Head, PromptedModel, method_class
from spikeprompt.settings import SettingsError, TargetSettings, TrainSettings, parse
from spikeprompt.tokens import TokenPromptConfig, attach_tokens, takes_tokens, token_places, token_statistics, unprompted, with_rows
from spikeprompt.training import linear_probe

SMALL = {"vision_transformer": {"embed_dim": 32, "num_heads": 2, "depth": 2}, "deit": {"embed_dim": 32, "num_heads": 2, "depth": 2},
         "swin_transformer": {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}}


def small(name, family):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[family])
    for key, p in model.named_parameters():
        if key.endswith(("gamma", "norm1.weight", "norm2.weight")):  # some start near zero, where nothing would be seen
            nn.init.ones_(p)
    return Backbone(name, model)


def kind(model):
    "What can matter to a prompt."
    if not isinstance(model, VisionTransformer):
        return type(model).__name__, model.layers[0].blocks[0].attn.window_area
    block = model.blocks[0]
    attn = getattr(block, "attn", None)
    parts = (block, attn, getattr(block, "ls1", None), model.norm_pre, model.attn_pool,
             *(getattr(attn, part, None) for part in ("q_norm", "norm", "gate")))
    return type(model).__name__, model.num_prefix_tokens, model.no_embed_class, model.global_pool, *(type(part).__name__ for part in parts)


@pytest.fixture(scope="module")
def families():
    "One small model of every kind, random weights."
    found = {}
    for family in SMALL:
        for name in timm.list_models(module=family):
            backbone = small(name, family)
            found.setdefault(kind(backbone.model), (name, family))
    return [*found.values()]


def drawn(backbone, depth="deep", count=3):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(count, D, generator=draw) for _, D in token_places(backbone)][:1 if depth == "shallow" else None]


@torch.no_grad()
def test_every_kind_of_vit_and_swin_takes_tokens(families):
    assert len(families) >= 20 and {"vision_transformer", "deit", "swin_transformer"} <= {family for _, family in families}
    folded = 0
    for name, family in families:
        bare = small(name, family)
        images = torch.rand(3, 3, *bare.input_size)
        features = bare(images)
        for depth in "deep", "shallow":
            prompts, prompted, empty = drawn(bare, depth), small(name, family), small(name, family)
            attach_tokens(prompted, [lambda p=p: p for p in prompts], 3, depth)
            attach_tokens(empty, [lambda p=p: p[:0] for p in prompts], 0, depth)
            made = prompted(images)
            size = features.abs().max()
            assert (empty(images) - features).abs().max() <= 1e-5 * size, (name, depth)
            assert (made - features).abs().max() > 1e-4 * size, (name, depth)
            assert (made[1:2] - prompted(images[1:2])).abs().max() <= 1e-5 * size, (name, depth)
            assert torch.equal(unprompted(prompted)(images), features), (name, depth)
            if depth == "deep":
                try:
                    gap = (with_rows(bare, prompts)(images) - made).abs().max()
                    assert gap <= 1e-5 * size, name
                    folded += 1
                except SettingsError as error:
                    block = bare.model.blocks[0]
                    assert "keys and values fold into timm's Block with its Attention" in str(error)
                    assert type(block) is not Block or type(block.attn) is not Attention, name
    assert folded >= 15


@pytest.mark.parametrize("name, kwargs", [
    ("beit_base_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}), ("eva02_tiny_patch14_224", {"depth": 1}),
    ("swinv2_tiny_window8_256", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)}), ("test_vit_relpos", {}), ("levit_128s", {})])
def test_other_transformers_are_refused_but_take_a_border(name, kwargs):
    backbone = Backbone(name, timm.create_model(name, **kwargs))
    with pytest.raises(SettingsError, match=f"backbone '{name}': timm's {type(backbone.model).__name__} takes no prompt tokens here"):
        SpikeNVPT(SpikeNVPTConfig(), backbone)
    assert not takes_tokens(TokenPromptConfig(place="border"), backbone)


@pytest.mark.parametrize("name", ["pocket_resnet", "pocket_convnext", "pocket_mixer"])
def test_backbones_without_tokens_get_a_border_unless_tokens_are_asked_for(name):
    backbone = create_backbone(name)
    assert SpikeNVPT(SpikeNVPTConfig(), backbone).frame
    with pytest.raises(SettingsError, match="takes no prompt tokens here; allowed are its VisionTransformer and SwinTransformer"):
        SpikeNVPT(SpikeNVPTConfig(place="tokens"), backbone)


@pytest.mark.parametrize("current", ["noisy", "constant", "separate", "carried"])
@pytest.mark.parametrize("scaling", ["matched", "fixed", "raw", "learned"])
@pytest.mark.parametrize("name, depth", [("pocket_vit", "deep"), ("pocket_vit", "shallow"), ("pocket_swin", "shallow"),
                                         ("pocket_resnet", "deep")])
def test_every_reading_trains_and_deploys(name, depth, current, scaling, prompted, images, tmp_path):
    model = prompted(name, "spike_nvpt", current=current, scaling=scaling, depth=depth, rate_penalty=1.0).train()
    torch.nn.init.normal_(model.head.linear.weight)
    (model(images[:8]).square().sum() + model.prompt.penalty()).backward()
    grads = {key: p.grad for key, p in model.prompt.named_parameters() if p.requires_grad}
    assert all((grad != 0).any() for grad in grads.values()), grads.keys()
    assert torch.equal(model.prompt.bits(0).unique(), torch.tensor([0.0, 1.0]))
    with torch.no_grad():
        expected = model.eval()(images)
        assert torch.equal(expected, model(images))
        export_tokens(model.prompt, tmp_path / "prompt.safetensors")
        fixed = PromptedModel(unprompted(model.backbone), load_tokens(tmp_path / "prompt.safetensors"), model.head).eval()
        for made in deployed(model), fixed:
            assert (made(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert not [*made.prompt.parameters()] and "latent" not in " ".join(made.prompt.state_dict())


def operators(model, images):
    return {str(node.target) for node in traced(model, images).graph.nodes if node.op == "call_function"}


@torch.no_grad()
@pytest.mark.parametrize("method", [VPT, SpikeNVPT])
@pytest.mark.parametrize("name, family", [
    ("vit_tiny_patch16_224", "vision_transformer"), ("vit_base_patch16_clip_224", "vision_transformer"),
    ("vit_small_patch14_reg4_dinov2", "vision_transformer"), ("deit_tiny_distilled_patch16_224", "deit"),
    ("swin_tiny_patch4_window7_224", "swin_transformer")])
def test_folded_tokens_are_timm_models_without_spikes(method, name, family):
    backbone = small(name, family)
    D, images = backbone.num_features, torch.rand(3, 3, *backbone.input_size)
    prompt = method(method.config_class(), backbone)
    prompt.start(images, backbone)
    model = PromptedModel(backbone, prompt, Head(torch.zeros(D), torch.ones(D), torch.randn(5, D), torch.randn(5))).eval()
    exported, preprocessing = fold_tokens(model)
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = model(images)
    for made in exported, traced(exported, (images - mean) / std).module():
        assert (made((images - mean) / std) - expected).abs().max() <= 1e-5 * expected.abs().max()
    spiking = {"aten.ge.Scalar", "wrap_with_autocast"}
    assert bool(spiking & operators(model, images)) == (method is SpikeNVPT)
    assert not spiking & operators(exported, images) and not spiking & operators(deployed(model), images)
    bare = count_macs(nn.Sequential(small(name, family), model.head), images)
    if family != "swin_transformer":  # ten rows are a quarter of a window's keys
        assert bare < count_macs(exported, images) <= 1.05 * bare
    assert count_macs(deployed(model), images) == count_macs(model, images)


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_a_model_that_has_trained_or_was_traced_can_be_copied_and_deployed(name, depth, prompted, images):
    model, few = prompted(name, "spike_nvpt", depth=depth, rate_penalty=1.0).train(), images[:4]
    nn.init.normal_(model.head.linear.weight)
    (model(few).square().sum() + model.prompt.penalty()).backward()
    traced(model, few)
    copied = deepcopy(model.eval())
    with torch.no_grad():
        expected = model(few)
        assert torch.equal(deployed(model)(few), expected) and torch.equal(copied(few), expected)
        for latent in copied.prompt.latents:
            latent.fill_(5.0)
        assert not torch.equal(copied(few), expected) and torch.equal(model(few), expected)


@torch.no_grad()
@pytest.mark.parametrize("depth, same", [("deep", True), ("shallow", False)])
def test_a_layernorm_takes_a_scalar_scale_away_from_deep_tokens(depth, same, prompted, images):
    "Fact: a learned scalar is no freedom there."
    features = []
    for scale in 1.0, 30.0:
        model = prompted("pocket_vit", "spike_nvpt", depth=depth, scaling="raw").eval()
        model.prompt.scale.fill_(scale)
        features.append(model.backbone(images))
    assert ((features[0] - features[1]).abs().max() < 1e-3 * features[0].abs().max()) == same


@torch.no_grad()
def test_vpts_own_start_would_never_fire(prompted):
    prompt = prompted("pocket_vit", "spike_nvpt").prompt.eval()
    for latent in prompt.latents:
        latent.uniform_(-0.0625, 0.0625)
    assert prompt.measures(None)["density"] == 0


def test_random_bits_get_a_head_of_their_own(images):
    frozen, train = create_backbone("pocket_vit"), TrainSettings(epochs=1, probe_c=[0.01])
    pixels = prepared_split(read_digits(), TargetSettings(n_train=200, n_val=100), 0, frozen, "digits")
    probe = linear_probe(frozen, pixels, train.probe_c)
    heads = [run("pocket_vit", method, method_class(method).config_class(), pixels, train, 0, report=lambda line: None)[1]
             for method in ("linear_probe", "spike_nvpt_random_bits")]
    assert heads[0].val_accuracy[0] == pytest.approx(probe[1]) and heads[1].val_accuracy[0] > 0.9
    with pytest.raises(SettingsError, match="rate_penalty = 1.0"):
        parse(method_class("spike_nvpt_random_bits").config_class, {"rate_penalty": 1.0}, "here")


def test_what_does_not_fold_says_why(prompted, tmp_path):
    with pytest.raises(SettingsError, match="SpikeNVPT does not fold into keys and values: allowed are deep tokens"):
        fold_tokens(prompted("pocket_vit", "spike_nvpt", depth="shallow"))
    with pytest.raises(SettingsError, match="LoRVP does not fold into keys and values"):
        fold_tokens(prompted("pocket_vit", "lor_vp"))
    with pytest.raises(SettingsError, match="LoRVP is no prompt of tokens"):
        deployed(prompted("pocket_vit", "lor_vp"))
    with pytest.raises(SettingsError, match="LoRVP does not export as tokens"):
        export_tokens(prompted("pocket_vit", "lor_vp").prompt, tmp_path / "prompt.safetensors")
    assert not (tmp_path / "prompt.safetensors").exists()


@pytest.mark.parametrize("scaling, numbers", [("fixed", 1), ("matched", 2 * 768)])
@pytest.mark.parametrize("depth, kilobytes", [("shallow", 0.94), ("deep", 11.25)])
def test_bits_are_packed(depth, kilobytes, scaling, numbers, tmp_path):
    vit = Backbone("vit_base_patch16_224", timm.create_model("vit_base_patch16_224"))
    export_tokens(SpikeNVPT(SpikeNVPTConfig(depth=depth, scaling=scaling), vit), tmp_path / "prompt.safetensors")
    assert load_file(tmp_path / "prompt.safetensors")["bits"].nbytes / 1024 == pytest.approx(kilobytes, abs=0.005)
    places = 1 if depth == "shallow" else 12
    assert load_tokens(tmp_path / "prompt.safetensors").stored_bits == places * (10 * 768 + 32 * numbers)


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_matched_tokens_start_with_mean_and_spread_of_the_patches(name, images):
    backbone = create_backbone(name)
    torch.manual_seed(0)
    for prompt in SpikeNVPT(SpikeNVPTConfig(tokens=2000), backbone).eval(), VPT(VPTConfig(tokens=2000, init="matched"), backbone):
        prompt.start(images, backbone)
        for layer, (mean, std) in enumerate(token_statistics(backbone, images)):
            tokens = prompt.entering(layer).detach()
            assert ((tokens.mean(0) - mean).abs() < 0.15 * std + 1e-6).all()
            assert (tokens.std(0) / std).sub(1).abs().max() < 0.15


def test_contrast_is_what_a_border_starts_with_and_how_fast_its_colours_move(images):
    torch.manual_seed(0)
    loud, soft = (SpikeNVPT(SpikeNVPTConfig(contrast=contrast), create_backbone("pocket_resnet")) for contrast in (1.0, 0.1))
    soft.load_state_dict(loud.state_dict())
    torch.testing.assert_close(soft.eval().entering(0), 0.1 * loud.eval().entering(0))
    for prompt in loud, soft:
        prompt.entering(0).sum().backward()
    torch.testing.assert_close(soft.alpha.grad, 0.1 * loud.alpha.grad)


def test_a_carried_bit_flips_beyond_its_margin_alone():
    prompt = SpikeNVPT(SpikeNVPTConfig(current="carried", margin=0.2), create_backbone("pocket_vit")).train()
    with torch.no_grad():
        for value, expected in ((0.0, 0), (0.69, 0), (0.71, 1), (0.31, 1), (0.29, 0)):
            prompt.latents[0].fill_(value)
            assert (prompt.bits(0) == expected).all(), value
    prompt.latents[0].data.fill_(0.69)
    assert (prompt.eval().bits(0) == 0).all()  # deployed as it was trained
    with pytest.raises(SettingsError, match="margin = 0.5: allowed is less than 0.5"):
        SpikeNVPT(SpikeNVPTConfig(current="carried", margin=0.5), create_backbone("pocket_vit"))
    with pytest.raises(SettingsError, match="timesteps = 1: .*allowed are more steps or a smaller kappa"):
        SpikeNVPT(SpikeNVPTConfig(current="carried", timesteps=1), create_backbone("pocket_vit"))
