"Exported models against the graphs that were trained, exported prompts against their closed forms, traced ones against eager."
import io

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import nn
from torchvision.transforms import Normalize
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from spikeprompt.backbones import Backbone, create_backbone
from spikeprompt.data import read_digits
from spikeprompt.energy import count_macs
from spikeprompt.experiments import save_run
from spikeprompt.export import export_prompt, exported_record, load_prompt, prompt_form, to_timm, traced
from spikeprompt.methods.lorsp import LoRSP, LoRSPConfig
from spikeprompt.pocket import pocket_names
from spikeprompt.prompts import METHODS, Head, PromptedModel, method_class
from spikeprompt.settings import SettingsError
from spikeprompt.training import fit_head, outputs

STATIC = [("lor_vp", {}), ("lorsp", {"reading": "static"}), ("lorsp_random_mask", {})]  # methods and settings whose prompt is one pattern


@pytest.fixture(scope="module")
def digits():
    data = read_digits()
    return torch.from_numpy(data.x_train[:200]).expand(-1, 3, -1, -1) / 255, torch.from_numpy(data.y_train[:200]).long()


@pytest.fixture(scope="module")
def images(digits):
    return digits[0]


def prompted(backbone, method, images, head, **settings):
    torch.manual_seed(0)
    prompt = method_class(method)(method_class(method).config_class(**settings), backbone)
    prompt.start(images, backbone)
    if method == "lor_vp":  # it starts with a pattern of zeros
        nn.init.normal_(prompt.B, std=3)
    return PromptedModel(backbone, prompt, head).eval()


def untrained(name, **kwargs):
    "timm's class with random weights, a drawn head, and pictures of its size."
    torch.manual_seed(0)
    backbone = Backbone(name, timm.create_model(name, **kwargs))
    D = backbone.num_features
    head = Head(torch.randn(D), torch.rand(D) + 0.5, torch.randn(7, D), torch.randn(7))
    return backbone, head, torch.rand(3, 3, *backbone.input_size)


def normalised(images, preprocessing):
    mean, std = (torch.tensor(preprocessing[name], dtype=images.dtype) for name in ("mean", "std"))
    return Normalize(mean, std)(images)


@torch.no_grad()
def assert_equal(model, exported, preprocessing, images, tolerance=1e-5):
    "Logits differ by no more than a share of the largest, and do depend on the prompt."
    expected = model(images)
    assert (exported(normalised(images, preprocessing)) - expected).abs().max() <= tolerance * expected.abs().max()
    if model.prompt.pattern() is not None:
        assert (model.head(model.backbone(images)) - expected).abs().max() > 10 * tolerance * expected.abs().max()


@pytest.mark.parametrize("name", pocket_names)
@pytest.mark.parametrize("method, settings", [("linear_probe", {}), *STATIC])
def test_pocket_backbones_become_plain_timm_models(name, method, settings, digits):
    images, labels = digits
    backbone = create_backbone(name)
    head, _ = fit_head(*[(outputs(backbone, images), labels)] * 2, [1.0])
    model = prompted(backbone, method, images, head, **settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported, preprocessing = to_timm(model)
    assert_equal(model, exported, preprocessing, images)
    assert {type(module).__module__.split(".")[0] for module in exported.modules()} == {"timm", "torch"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in exported.modules())
    assert torch.tensor(preprocessing["mean"]).shape == ((3,) if method == "linear_probe" else (3, 32, 32))

    fresh = timm.create_model(name, num_classes=10).eval()
    fresh.load_state_dict(exported.state_dict())
    assert_equal(model, fresh, preprocessing, images)
    assert count_macs(exported, images) == count_macs(nn.Sequential(create_backbone(name), head), images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name, kwargs", [
    ("resnet18", {}), ("convnext_atto", {}), ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}), ("dla46_c", {}),
    ("mixer_s32_224", {}), ("test_efficientnet", {}), ("vit_tiny_patch16_224", {"depth": 1})])
@pytest.mark.parametrize("method, settings", STATIC)
def test_timms_own_backbones(name, kwargs, method, settings):
    backbone, head, images = untrained(name, **kwargs)
    model = prompted(backbone, method, images, head, **settings)
    exported, preprocessing = to_timm(model)
    assert_equal(model, exported, preprocessing, images)
    timm.create_model(name, num_classes=7, **kwargs).load_state_dict(exported.state_dict())


@pytest.mark.parametrize("name, kwargs", [
    ("test_vit", {}), ("test_vit", {"no_embed_class": True, "reg_tokens": 4}), ("test_vit", {"reg_tokens": 4}),
    ("test_vit", {"class_token": False, "global_pool": "avg"}), ("test_vit", {"global_pool": "map"}),
    ("test_vit", {"pre_norm": True}), ("test_vit", {"dynamic_img_size": True}),
    ("deit_tiny_distilled_patch16_224", {"depth": 1})], ids=str)
@pytest.mark.parametrize("method, settings", STATIC)
def test_position_embedding_takes_the_pattern(name, kwargs, method, settings):
    backbone, head, images = untrained(name, weight_init="jax", **kwargs)
    model = prompted(backbone, method, images, head, **settings)
    exported, preprocessing = to_timm(model, "position_embedding")
    assert_equal(model, exported, preprocessing, images)
    assert preprocessing["mean"] == tuple(backbone.mean.flatten().tolist())
    timm.create_model(name, num_classes=7, **kwargs).load_state_dict(exported.state_dict())
    moved = (exported.pos_embed - backbone.model.pos_embed)[0].abs().amax(1)
    prefix = len(moved) - backbone.model.patch_embed.num_patches
    assert prefix == (0 if kwargs.get("no_embed_class") else backbone.model.num_prefix_tokens)
    assert (moved[:prefix] == 0).all() and (moved[prefix:] > 0).all()


@pytest.mark.parametrize("into", ["mean", "position_embedding"])
def test_the_algebra_is_exact_in_double_precision(into):
    backbone, head, images = untrained("test_vit", weight_init="jax")
    model = prompted(backbone, "lor_vp", images, head).double()
    assert_equal(model, *to_timm(model, into), images.double(), tolerance=1e-12)


def test_a_folder_that_timm_reads(tmp_path):
    backbone, head, images = untrained("test_resnet")
    model = prompted(backbone, "lor_vp", images, head)
    save_for_hf(to_timm(model)[0], tmp_path, safe_serialization=True)
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    preprocessing = resolve_model_data_config(read, use_test_size=True)
    assert_equal(model, read, preprocessing, images)
    picture = to_pil_image(images[0])
    with torch.no_grad():
        logits, expected = read(create_transform(**preprocessing)(picture)[None]), model(pil_to_tensor(picture)[None] / 255)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name, method, into, message", [
    ("pocket_vit", "lor_vp", "position_embedding", "'position_embedding': the patches of this VisionTransformer .* HybridEmbed"),
    ("pocket_mixer", "lor_vp", "position_embedding", "'position_embedding': this MlpMixer is no ViT"),
    ("pocket_vit", "lor_vp", "bias", "into = 'bias': allowed are mean, position_embedding"),
    ("pocket_vit", "lorsp", "mean", "LoRSP does not fold .* another prompt for each picture"),
    ("pocket_swin", "vpt", "mean", "VPT does not fold .* blocks"),
    ("pocket_resnet", "spike_nvpt", "mean", "SpikeNVPT does not fold .* frames the picture")])
def test_what_cannot_fold_says_why(name, method, into, message, images):
    backbone = create_backbone(name)
    D = backbone.num_features
    model = prompted(backbone, method, images[:8], Head(torch.zeros(D), torch.ones(D), torch.rand(10, D), torch.zeros(10)))
    with pytest.raises(SettingsError, match=message):
        to_timm(model, into)


def test_a_vit_without_positions_or_with_normed_patches_is_refused():
    for kwargs, message in (({"pos_embed": "none"}, "no ViT with a position embedding"), ({"embed_norm_layer": "layernorm"}, "PatchEmbed")):
        backbone, head, images = untrained("test_vit", **kwargs)
        model = prompted(backbone, "lor_vp", images, head)
        with pytest.raises(SettingsError, match=message):
            to_timm(model, "position_embedding")
        assert_equal(model, *to_timm(model), images)


@pytest.mark.parametrize("name, classifier", [("levit_128s", "NormLinear"), ("crossvit_tiny_240", "ModuleList")])
def test_a_classifier_that_cannot_hold_the_head_is_refused(name, classifier):
    backbone, head, images = untrained(name)
    with pytest.raises(SettingsError, match=f"backbone '{name}': the classifier .* is a {classifier}"):
        to_timm(prompted(backbone, "linear_probe", images, head))


def test_logits_that_are_more_than_the_classifiers_are_refused():
    backbone, head, images = untrained("test_resnet")

    class Doubled(type(backbone.model)):
        def forward(self, x):
            return 2 * super().forward(x)

    backbone.model.__class__ = Doubled
    with pytest.raises(SettingsError, match="backbone 'test_resnet': timm's Doubled does more than apply its classifier"):
        to_timm(prompted(backbone, "linear_probe", images, head))


def test_forms():
    backbone = create_backbone("pocket_resnet")
    forms = {name: prompt_form(method_class(name)(method_class(name).config_class(), backbone))
             for name in ("linear_probe", "lor_vp", "lorsp", "vpt", "spike_nvpt")}
    assert forms == {"linear_probe": "none", "lor_vp": "static", "lorsp": "instance", "vpt": "tokens", "spike_nvpt": "tokens"}


@pytest.mark.parametrize("K", [1, 2, 4])
def test_an_exported_prompt_is_its_numbers_and_its_price(K, tmp_path):
    H = W = 224
    q = 28
    backbone, _, images = untrained("resnet18")
    torch.manual_seed(0)
    prompt = LoRSP(LoRSPConfig(rank=K, pooled=q), backbone)
    prompt.start(images, backbone)
    record = export_prompt(prompt, tmp_path / "lorsp.safetensors", images)
    assert record == exported_record(tmp_path / "lorsp.safetensors")
    assert record["parameters"] == 3 * K * (H + W) == {1: 1344, 2: 2688, 4: 5376}[K]
    loaded = load_prompt(tmp_path / "lorsp.safetensors")
    fixed = 3 * K + 1 + 2 * 3 * K  # amplitudes, gain, thresholds
    assert sum(value.numel() for value in loaded.state_dict().values()) == record["parameters"] + fixed == record["stored_bits"] / 32
    assert record["dense_macs"] == 3 * H * W + 3 * K * (2 * q**2 + H + W) + 3 * K * H * W < 1.8e6
    assert {name: record[name] for name in ("macs", "acs", "membrane_updates")} == prompt.operations(images)
    assert record["macs"] < record["dense_macs"] and record["pictures"] == len(images)
    assert torch.equal(loaded.pixels(images), prompt.pixels(images))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_prompts_without_a_file_of_their_own_are_refused(images, tmp_path):
    backbone = create_backbone("pocket_resnet")
    D = backbone.num_features
    head = Head(torch.zeros(D), torch.ones(D), torch.zeros(10, D), torch.zeros(10))
    for method in ("linear_probe", "vpt"):
        model = prompted(backbone, method, images, head)
        with pytest.raises(SettingsError, match=f"{type(model.prompt).__name__} does not export"):
            export_prompt(model.prompt, tmp_path / "prompt.safetensors", images)

    class Unregistered(LoRSP):
        pass

    with pytest.raises(SettingsError, match="Unregistered does not export"):
        export_prompt(Unregistered(LoRSPConfig(), backbone), tmp_path / "prompt.safetensors", images)
    assert Unregistered not in METHODS.values() and not (tmp_path / "prompt.safetensors").exists()
    save_run(model, tmp_path / "run.safetensors")
    with pytest.raises(SettingsError, match="run.safetensors: its header names no method"):
        load_prompt(tmp_path / "run.safetensors")


TRACED = [*[(name, "lorsp") for name in pocket_names],
          ("pocket_vit", "lor_vp"), ("pocket_vit", "vpt"), ("pocket_vit", "spike_nvpt"),
          ("pocket_resnet", "smm"), ("pocket_resnet", "vpt"), ("pocket_resnet", "spike_nvpt"), ("pocket_swin", "vpt")]


@torch.no_grad()
@pytest.mark.parametrize("name, method", TRACED)
def test_traced_equals_eager_at_any_batch_size(name, method, images):
    backbone = create_backbone(name)
    D = backbone.num_features
    model = prompted(backbone, method, images, Head(torch.randn(D), torch.ones(D), torch.randn(10, D), torch.zeros(10)))
    program = traced(model, images).module()
    for B in (1, 3, 17):
        expected = model(images[:B])
        assert (program(images[:B]) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_traced_prompt_is_tensor_operators_alone_and_outlives_its_code(images):
    backbone = create_backbone("pocket_resnet")
    prompt = LoRSP(LoRSPConfig(), backbone)
    prompt.start(images, backbone)
    program = traced(prompt, images)
    lowered = program.run_decompositions().graph_module
    assert not [module for module in lowered.modules() if len(list(module.children())) and module is not lowered]
    called = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert all(name.startswith("aten.") or name == "<built-in function mul>" for name in called)
    assert sum(name == "aten.ge.Scalar" for name in called) == 2 * prompt.config.rank  # one comparison a side and factor
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(images), prompt.pixels(images))
