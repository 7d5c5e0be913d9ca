"Prompt tokens in the kinds of ViT and Swin that timm builds, and what those are told that cannot take them."

from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from spikeprompt.backbones.loader import Backbone, create_backbone
from spikeprompt.baselines.vpt import VPT, VPTConfig
from spikeprompt.config import ConfigError
from spikeprompt.prompts.padding import Padding
from spikeprompt.prompts.tokens import TokenPromptConfig, attach_prefix, attach_tokens, takes_tokens, token_blocks, token_statistics

SMALL = {
    "vision_transformer": {"embed_dim": 32, "num_heads": 2, "depth": 2},
    "deit": {"embed_dim": 32, "num_heads": 2, "depth": 2},
    "swin_transformer": {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)},
}
KINDS = [  # plain, registers, distillation token, pre-norm, norm of queries and keys, parallel blocks, windows with a mask
    ("vit_tiny_patch16_224", "vision_transformer"),
    ("vit_small_patch14_reg4_dinov2", "vision_transformer"),
    ("deit_tiny_distilled_patch16_224", "deit"),
    ("vit_base_patch32_clip_224", "vision_transformer"),
    ("test_vit2", "vision_transformer"),
    ("vit_small_patch16_18x2_224", "vision_transformer"),
    ("swin_tiny_patch4_window7_224", "swin_transformer"),
]


def small(name, family):
    "A small random model of one kind."
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[family])
    for key, p in model.named_parameters():
        if key.endswith(("gamma", "norm1.weight", "norm2.weight")):  # some start near zero, where nothing would be seen
            nn.init.ones_(p)
    return Backbone(model, name=name).eval()


def random_tokens(backbone, depth="deep", count=3):
    "Functions of no argument, one a block: tokens [p, D]."
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randn(count, width, generator=draw) for _, width in token_blocks(backbone)]
    return [lambda P=P: P for P in tokens[: 1 if depth == "shallow" else None]]


@contextmanager
def attached(backbone, depth="deep", count=3, tokens=None):
    "A backbone with tokens inside a `with` block."
    handles = attach_tokens(backbone, tokens or random_tokens(backbone, depth, count), count, depth)
    try:
        yield backbone
    finally:
        for handle in handles:
            handle.remove()


def traces(backbone):
    "Whatever attaching may leave behind."
    return [name for name, m in backbone.named_modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]


@torch.no_grad()
def check(name, family):
    "What must hold for every kind; returns whether it merged."
    backbone = small(name, family)
    images = torch.rand(3, 3, *backbone.input_size)
    features = backbone(images)
    size = features.abs().max()
    for depth in "deep", "shallow":
        with attached(backbone, depth, 0):
            assert (backbone(images) - features).abs().max() <= 1e-5 * size, (name, depth)
        with attached(backbone, depth):
            prompted = backbone(images)
            assert (prompted - features).abs().max() > 1e-4 * size, (name, depth)
            assert (prompted[1:2] - backbone(images[1:2])).abs().max() <= 1e-5 * size, (name, depth)
        assert not traces(backbone) and torch.equal(backbone(images), features), (name, depth)
    with attached(backbone):
        prompted = backbone(images)
    merged = deepcopy(backbone)
    try:
        attach_prefix(merged.model, [of() for of in random_tokens(backbone)])
    except ValueError as error:
        block = backbone.model.blocks[0]
        assert "prefix keys and values need timm's Block with its Attention" in str(error)
        assert type(block) is not Block or type(block.attn) is not Attention, name
        return False
    assert (merged(images) - prompted).abs().max() <= 1e-5 * size, name
    assert torch.equal(backbone(images), features), name
    return True


@pytest.mark.parametrize("name, family", KINDS)
def test_tokens_enter_leave_and_merge(name, family):
    assert check(name, family) == (name != "vit_small_patch16_18x2_224")


@pytest.mark.slow
def test_every_kind_of_vit_and_swin_takes_tokens():
    def kind(model):
        "What can matter to a prompt."
        if not isinstance(model, VisionTransformer):
            return type(model).__name__, model.layers[0].blocks[0].attn.window_area
        block = model.blocks[0]
        attn = getattr(block, "attn", None)
        norms = (getattr(attn, part, None) for part in ("q_norm", "norm", "gate"))
        parts = (block, attn, getattr(block, "ls1", None), model.norm_pre, model.attn_pool, *norms)
        return model.num_prefix_tokens, model.no_embed_class, model.global_pool, *(type(part).__name__ for part in parts)

    kinds = {}
    for family in SMALL:
        for name in timm.list_models(module=family):
            kinds.setdefault((family, *map(str, kind(small(name, family).model))), (name, family))
    merged = [check(name, family) for name, family in kinds.values()]
    assert len(merged) >= 20 and sum(merged) >= 15


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
        ("eva02_tiny_patch14_224", {"depth": 1}),
        ("swinv2_tiny_window8_256", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)}),
        ("test_vit_relpos", {}),
        ("levit_128s", {}),
    ],
)
def test_other_transformers_are_refused_but_take_a_padding(name, kwargs):
    backbone = Backbone(timm.create_model(name, **kwargs), name=name)
    with pytest.raises(ConfigError, match=f"backbone '{name}': {type(backbone.model).__name__} takes no prompt tokens here; allowed are"):
        VPT(VPTConfig(), backbone)
    assert not takes_tokens(TokenPromptConfig(placement="padding"), backbone)


def test_placement():
    vit, resnet = create_backbone("pocket_vit"), create_backbone("pocket_resnet")
    assert VPT(VPTConfig(), vit).padding is None and VPT(VPTConfig(placement="padding"), vit).padding is not None
    assert VPT(VPTConfig(), resnet).padding is not None
    assert VPT(VPTConfig(placement="padding"), vit).placement == VPT(VPTConfig(), resnet).placement == "padding"
    assert VPT(VPTConfig(placement="tokens"), vit).placement == "tokens"
    with pytest.raises(ConfigError, match="takes no prompt tokens here; .*placement = 'padding'"):
        VPT(VPTConfig(placement="tokens"), resnet)
    with pytest.raises(ConfigError, match="pad_width = 16: allowed is less than half of the image's 32 px"):
        VPT(VPTConfig(pad_width=16), resnet)


def test_a_padding_keeps_its_values_and_the_whole_image():
    padding = Padding((20, 28), pad_width=3)
    values = torch.arange(3.0 * padding.num_pixels).view(3, -1)
    images = torch.rand(2, 3, 40, 40)
    padded = padding(images, values)
    assert padding.num_pixels == 20 * 28 - 14 * 22 and padded.shape == (2, 3, 20, 28)
    assert torch.equal(padded[0][:, padding.mask], values) and torch.equal(padded[1][:, padding.mask], values)
    torch.testing.assert_close(padded[:, :, 3:-3, 3:-3].mean((2, 3)), images.mean((2, 3)), atol=0.02, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_a_copy_of_an_attached_backbone_is_independent(name, depth, images):
    backbone = create_backbone(name)
    bare = backbone(images)
    tokens = nn.ParameterList(nn.Parameter(of()) for of in random_tokens(backbone, depth))
    provide = [partial(tokens.__getitem__, i) for i in range(len(tokens))]
    model = nn.ModuleList([backbone, tokens])
    model.handles = attach_tokens(backbone, provide, 3, depth)
    expected = backbone(images)
    copy = deepcopy(model)
    for values in copy[1]:
        values.neg_()
    assert not torch.equal(copy[0](images), expected) and torch.equal(backbone(images), expected)
    for handle in copy.handles:
        handle.remove()
    assert torch.equal(copy[0](images), bare) and not traces(copy[0]) and torch.equal(backbone(images), expected)


def test_shallow_swin_tokens_do_not_outlive_a_forward_pass(images):
    backbone = create_backbone("pocket_swin")
    tokens = nn.Parameter(random_tokens(backbone, "shallow")[0]())
    with attached(backbone, "shallow", tokens=[lambda: tokens]):
        stream = backbone.model.layers[0].blocks[0].attn.forward.args[2]
        expected = backbone(images)
        assert stream.current is None
        broken = backbone.model.layers[1].blocks[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backbone(images)
        broken.remove()
        copy = deepcopy(backbone)  # the interrupted pass has left tensors with a graph, which do not copy
        assert torch.equal(copy(images), expected) and torch.equal(backbone(images), expected)


def test_a_second_prompt_on_a_swin_is_refused_and_module_names_stay():
    backbone = create_backbone("pocket_swin")
    names = [*backbone.state_dict()], [name for name, _ in backbone.named_modules()]
    with attached(backbone):
        assert ([*backbone.state_dict()], [name for name, _ in backbone.named_modules()]) == names
        with pytest.raises(ValueError, match="WindowAttention holds a prompt already"):
            attach_tokens(backbone, random_tokens(backbone), 3, "deep")


@torch.no_grad()
@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_prefix_keys_and_values_are_saved_with_the_model(name, images):
    one, other = create_backbone(name), create_backbone(name)
    attach_prefix(one.model, [of() for of in random_tokens(one)])
    attach_prefix(other.model, [torch.zeros_like(of()) for of in random_tokens(other)])
    assert not torch.equal(one(images), other(images))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(images), other(images))
    assert not any("prefix" in key for key, _ in one.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_shallow_tokens_are_exported_for_any_batch_size(name, images):
    backbone = create_backbone(name)
    with attached(backbone, "shallow"):
        program = torch.export.export(backbone, (images[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False).module()
        for batch in images[:1], images[:5]:
            torch.testing.assert_close(program(batch), backbone(batch))


@torch.no_grad()
def test_shallow_swin_tokens_compile(images):
    backbone = create_backbone("pocket_swin")
    with attached(backbone, "shallow"):
        torch._dynamo.reset()
        compiled = torch.compile(backbone, backend="eager")
        torch.testing.assert_close(compiled(images[:5]), backbone(images[:5]))


@torch.no_grad()
@pytest.mark.parametrize("depth, same", [("deep", True), ("shallow", False)])
def test_a_layernorm_removes_a_scalar_scale_from_deep_tokens(depth, same, images):
    backbone = create_backbone("pocket_vit")
    features = []
    for low, high in (0.0, 1.0), (0.0, 30.0), (-15.0, 15.0):
        with attached(backbone, depth, tokens=[lambda P=of(): low + (high - low) * (P > 0) for of in random_tokens(backbone, depth)]):
            features.append(backbone(images))
    size = features[0].abs().max()
    for other in features[1:]:
        assert ((other - features[0]).abs().max() < 1e-3 * size) == same


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_swin"])
def test_matched_dense_tokens_start_with_the_statistics_of_patch_tokens(name, images):
    torch.manual_seed(0)
    backbone = create_backbone(name)
    prompt = VPT(VPTConfig(num_tokens=2000, init="matched"), backbone)
    prompt.calibrate(images, backbone)
    for layer, (mean, std) in enumerate(token_statistics(backbone, images)):
        tokens = prompt.prompt_tokens(layer).detach()
        assert ((tokens.mean(0) - mean).abs() < 0.15 * std + 1e-6).all()
        assert (tokens.std(0) / std).sub(1).abs().max() < 0.15


def test_sizes_of_vpt_in_a_vit_b():
    vit = Backbone(timm.create_model("vit_base_patch16_224"))
    sizes = [sum(p.numel() for p in VPT(VPTConfig(depth=depth), vit).parameters()) for depth in ("shallow", "deep")]
    assert sizes == [7_680, 92_160]
