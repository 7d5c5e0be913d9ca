"The API as a user of timm and peft would use it."

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import spikeprompt
from spikeprompt.backbones.loader import Backbone, create_backbone, fingerprint
from spikeprompt.backbones.pocket import pocket_names
from spikeprompt.baselines.bias_tuning import BiasTuningConfig
from spikeprompt.baselines.full_finetuning import FullFinetuningConfig
from spikeprompt.baselines.lor_vp import LoRVPConfig
from spikeprompt.baselines.vpt import VPTConfig
from spikeprompt.config import ConfigError, project_root
from spikeprompt.methods.lorsp import LoRSPConfig
from spikeprompt.methods.spike_nvpt import SpikeNVPTConfig
from spikeprompt.model import Head, PromptedModel, get_prompted_model
from spikeprompt.prompts.base import METHODS, Prompt, PromptConfig, register_method

SNIPPET = """
import timm
import torch

from spikeprompt import LoRSPConfig, PromptedModel, get_prompted_model

backbone = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64)
before = {key: value.clone() for key, value in backbone.state_dict().items()}
images = torch.rand(2, 3, 64, 64)
model = get_prompted_model(backbone, LoRSPConfig(rank=2), num_classes=37)
model.print_trainable_parameters()
logits = model(images)
assert logits.shape == (2, 37)
model.eval().save_pretrained("adapter")
expected = model(images)
backbone = model.unload()
assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
model = PromptedModel.from_pretrained("adapter", backbone)
assert torch.equal(model(images), expected)
with model.disable_adapter():
    bare = model.features(images)
assert torch.equal(bare, model.backbone.model.forward_head(
    model.backbone.model.forward_features((images - model.backbone.mean) / model.backbone.std), pre_logits=True))
pocket = timm.create_model("pocket_vit", pretrained=True)
print("done", sum(p.numel() for p in pocket.parameters()), pocket.num_classes)
"""


def test_the_snippet_runs_in_a_folder_that_is_not_the_checkout(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(spikeprompt.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", SNIPPET], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "trainable params: " in ran.stdout and "done 624864 200" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("name", pocket_names)
def test_timm_loads_the_packaged_weights(name, images):
    packaged = create_backbone(name)
    model = timm.create_model(name, pretrained=True, num_classes=7).eval()
    assert model(images).shape == (len(images), 7)
    headless = timm.create_model(name, pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.allclose(headless((images - 0.5) / 0.5), packaged(images), atol=1e-5)


class Features(nn.Module):
    "Somebody's own model."

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


def test_any_module_that_is_described_takes_a_prompt(tmp_path):
    own, images = Features(), torch.rand(3, 3, 20, 24)
    described = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "num_features": 8, "input_size": (20, 24)}
    model = get_prompted_model(own, LoRSPConfig(rank=1), 5, **described)
    assert not own.norm.training and not own.conv.weight.requires_grad
    expected = model.eval()(images)
    model.save_pretrained(tmp_path)
    assert model.unload() is own and own.norm.training and own.conv.weight.requires_grad
    assert torch.equal(PromptedModel.from_pretrained(tmp_path, own)(images), expected)
    with pytest.raises(ConfigError, match="Features: not a timm model, so mean=, std= and num_features= are needed"):
        get_prompted_model(Features(), LoRSPConfig(), 5)


def test_a_second_prompt_on_one_backbone_is_refused(images):
    backbone = timm.create_model("pocket_vit", pretrained=True)
    first = get_prompted_model(backbone, SpikeNVPTConfig(), 10)
    with pytest.raises(ValueError, match="a prompt is attached already"):
        get_prompted_model(backbone, LoRVPConfig(), 10)
    first.unload()
    get_prompted_model(backbone, LoRVPConfig(), 10)
    with pytest.raises(ValueError, match="was unloaded"):
        first(images)


def test_the_classifier_stays_where_it_is(images):
    backbone = timm.create_model("pocket_resnet", pretrained=True, num_classes=6)
    before = backbone.fc.weight.clone()
    model = get_prompted_model(backbone, LoRVPConfig(), 10)
    assert model(images).shape == (len(images), 10)
    assert torch.equal(backbone.fc.weight, before) and backbone(images).shape == (len(images), 6)


def test_an_adapter_refuses_another_backbone(prompted, tmp_path):
    prompted("pocket_vit", "spike_nvpt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on pocket_vit with fingerprint .*, not on this pocket_resnet with") as error:
        PromptedModel.from_pretrained(tmp_path, timm.create_model("pocket_resnet", pretrained=True))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not on this pocket_vit"):
        PromptedModel.from_pretrained(tmp_path, timm.create_model("pocket_vit"))
    assert PromptedModel.from_pretrained(tmp_path).backbone.name == "pocket_vit"  # packaged: needs no model


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: "),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json is damaged"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345678"), "adapter_model.safetensors is damaged"),
    ],
)
def test_a_damaged_adapter_is_one_line(damage, message, prompted, tmp_path):
    prompted("pocket_resnet", "lor_vp").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        PromptedModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_an_adapter_holds_no_backbone_and_bits_are_packed(prompted, tmp_path):
    prompted("pocket_vit", "spike_nvpt").save_pretrained(tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["method"] == "spike_nvpt" and record["config"]["num_tokens"] == 10
    assert record["backbone"]["input_size"] == [32, 32] and record["spikeprompt_version"] == spikeprompt.__version__
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["prompt.bits"].dtype == torch.uint8 and tensors["prompt.bits"].numel() == 4 * 10 * 128 / 8
    assert not any("latent" in key for key in tensors)


def test_a_method_of_ones_own_registers_from_a_users_module(images, tmp_path):
    class OffsetConfig(PromptConfig):
        "Config of the offset."

    try:

        @register_method("offset")
        class Offset(Prompt):
            "One learned colour added to every pixel."

            config_class, label = OffsetConfig, "Offset"

            def __init__(self, config, backbone):
                super().__init__(config, backbone)
                self.colour = nn.Parameter(torch.zeros(3, 1, 1))

            def pixels(self, images):
                return images + self.colour

        model = get_prompted_model(timm.create_model("pocket_resnet", pretrained=True), OffsetConfig(), 4).eval()
        nn.init.normal_(model.prompt.colour), nn.init.normal_(model.head.linear.weight)
        model.save_pretrained(tmp_path)
        assert torch.allclose(PromptedModel.from_pretrained(tmp_path)(images), model(images), atol=1e-4)
    finally:
        METHODS.pop("offset")
    with pytest.raises(ConfigError, match="method 'offset': allowed are .*, and methods that an imported module registers"):
        PromptedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, config",
    [
        ("pocket_resnet", LoRSPConfig()),
        ("pocket_vit", SpikeNVPTConfig()),
        ("pocket_swin", VPTConfig()),
        ("pocket_mixer", SpikeNVPTConfig()),
    ],
)
def test_compile_and_export_give_the_same_logits(name, config, images):
    torch.manual_seed(0)
    model = get_prompted_model(timm.create_model(name, pretrained=True), config, 10).eval()
    nn.init.normal_(model.head.linear.weight)
    with torch.no_grad():
        expected = model(images)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(model, backend="eager")(images), expected, atol=1e-4)
        program = torch.export.export(model, (images[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert torch.allclose(program.module()(images), expected, atol=1e-4 * expected.abs().max().item())


def test_a_compiled_model_trains(images):
    torch._dynamo.reset()
    model = get_prompted_model(timm.create_model("pocket_resnet", pretrained=True), LoRSPConfig(), 10)
    torch.nn.init.normal_(model.head.linear.weight)  # as built, it is zero and lets no gradient pass
    logits, penalty = torch.compile(model, backend="eager")(images, return_penalty=True)
    (logits.sum() + penalty).backward()
    assert model.prompt.b.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name, method", [*[("pocket_vit", method) for method in ("lorsp", "spike_nvpt", "vpt", "lor_vp", "evp")], ("pocket_resnet", "vpt")]
)
def test_half_precision(name, method, dtype, prompted, images, tmp_path):
    model = prompted(name, method).eval().to(dtype)
    logits = model(images.to(dtype))
    assert logits.dtype == dtype and logits.isfinite().all()
    model.save_pretrained(tmp_path)
    again = PromptedModel.from_pretrained(tmp_path).to(dtype)
    assert (again(images.to(dtype)) - logits).abs().max() < 0.05 * logits.abs().max()  # convolutions of another memory format
    with pytest.raises(ValueError, match=f"trained on {name} of dtype {dtype}, not torch.float32"):
        PromptedModel.from_pretrained(tmp_path, timm.create_model(name, pretrained=True))


def test_gradient_checkpointing_is_refused_where_it_would_compute_with_other_weights(images):
    model = get_prompted_model(timm.create_model("pocket_vit", pretrained=True), BiasTuningConfig(), 3)
    model.backbone.model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(images)
    with torch.no_grad():
        assert model(images).shape == (16, 3)


def test_printed_a_model_shows_the_settings_of_its_prompt():
    model = get_prompted_model(timm.create_model("pocket_resnet"), LoRSPConfig(rank=2), 3)
    assert "LoRSP(rank=2)" in repr(model)


@pytest.mark.parametrize(
    "name, method",
    [
        ("pocket_resnet", "lor_vp"),
        ("pocket_mixer", "no_prompt"),
        ("pocket_vit", "spike_nvpt"),
        ("pocket_swin", "vpt"),
        ("test_vit", "lor_vp"),
    ],
)
def test_a_merged_model_is_timms_and_gives_the_same_logits(name, method, images):
    torch.manual_seed(0)
    config = METHODS[method].config_class()
    backbone = timm.create_model(name, pretrained=name != "test_vit")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model = get_prompted_model(backbone, config, 10).eval()
    for tensor in model.adapter_state() and [*model.prompt.parameters(), model.head.linear.weight]:
        nn.init.normal_(tensor)
    x = torch.rand(4, 3, *model.backbone.input_size)
    expected = model(x)
    plain = model.merge_and_unload()
    mean, std = (torch.tensor(plain.pretrained_cfg[key]) for key in ("mean", "std"))
    assert mean.shape == ((3, 32, 32) if method == "lor_vp" and name == "pocket_resnet" else (3,))  # a ViT keeps its normalisation
    logits = plain((x - (mean if mean.dim() == 3 else mean.view(3, 1, 1))) / std.view(3, 1, 1))
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert type(plain) is type(backbone)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", pocket_names)
def test_a_fine_tuned_model_is_its_backbone_with_other_weights(name, prompted, images):
    model = prompted(name, "full_finetuning").eval()
    backbone = model.backbone
    before, classifier = fingerprint(backbone, classifier=True), {id(p) for p in backbone.classifier.parameters()}
    copied = {key: p.numel() for key, p in backbone.model.named_parameters() if id(p) not in classifier}
    assert {key: p.numel() for key, p in model.prompt.weights().items()} == copied
    assert model.num_trainable_parameters()["prompt"] == sum(copied.values())
    with model.disable_adapter():
        bare = model.features(images)
    assert torch.allclose(model.features(images), bare, atol=1e-5)  # the copies start as the backbone's own
    with torch.no_grad():
        for values in model.prompt.parameters():
            values.mul_(1.05)
    with torch.no_grad():
        expected = model(images)
        assert not torch.allclose(model.features(images), bare, rtol=0.01)
        with model.disable_adapter():
            assert torch.equal(model.features(images), bare)
    assert fingerprint(backbone, classifier=True) == before
    plain = model.merge_and_unload()
    assert torch.allclose(plain((images - 0.5) / 0.5), expected, atol=1e-4 * expected.abs().max().item())
    assert torch.allclose(backbone.eval()(images), bare, atol=1e-5) and fingerprint(backbone, classifier=True) == before


def test_fine_tuning_takes_any_module_and_leaves_out_what_its_features_do_not_use(images):
    own = Features()
    own.unused = nn.Linear(8, 8)
    described = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_features": 8, "input_size": (32, 32)}
    model = get_prompted_model(own, FullFinetuningConfig(), 5, **described).train()
    assert list(model.prompt.weights()) == ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]
    statistics = own.norm.running_mean.clone()
    model.features(images).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.prompt.parameters()) and own.conv.weight.grad is None
    assert torch.equal(own.norm.running_mean, statistics)
    half = model.eval().to(torch.bfloat16)
    assert half(images.bfloat16()).isfinite().all() and model.unload().conv.weight.dtype == torch.bfloat16


def test_a_frozen_head_is_not_counted(prompted):
    model = prompted("pocket_vit", "lor_vp")
    assert model.num_trainable_parameters()["head"] == 10 * (128 + 1)
    model.head.requires_grad_(False)
    assert model.num_trainable_parameters()["head"] == 0


def test_weights_that_replace_the_backbones_are_counted_once():
    backbone = timm.create_model("pocket_vit", num_classes=0)
    own = sum(p.numel() for p in backbone.parameters())
    count = get_prompted_model(backbone, FullFinetuningConfig(), 10).num_trainable_parameters()
    assert count["prompt"] == own and count["all"] == own + count["head"]


def test_a_head_of_another_class_is_not_saved(prompted, tmp_path):
    model = prompted("pocket_vit", "lor_vp")
    model.head = nn.Linear(128, 10)
    with pytest.raises(ValueError, match="head is a Linear"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_of_the_classifiers_rows_is_saved_like_any_other(prompted, images, tmp_path):
    model, rows = prompted("pocket_vit", "lor_vp").eval(), torch.tensor([7, 150, 3])
    classifier, head = model.backbone.classifier, Head(128, 3).requires_grad_(False)
    head.linear.weight.copy_(classifier.weight[rows])
    head.linear.bias.copy_(classifier.bias[rows])
    model.head = head
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        bare = model.backbone.model((images - 0.5) / 0.5)
        assert torch.allclose(model(images), bare[:, rows], atol=1e-4)
    assert torch.allclose(PromptedModel.from_pretrained(tmp_path)(images), model(images), atol=1e-5)


@pytest.mark.parametrize(
    "config, reason",
    [
        (LoRSPConfig(), "LoRSP has no `pattern` that all images share"),
        (SpikeNVPTConfig(depth="shallow"), "shallow tokens or padding"),
        (SpikeNVPTConfig(placement="padding"), "shallow tokens or padding"),
    ],
)
def test_what_cannot_be_merged_says_what_can_be_done(config, reason, images):
    model = get_prompted_model(timm.create_model("pocket_vit", pretrained=True), config, 10)
    with pytest.raises(ValueError, match=f"{reason}.*`save_pretrained` keeps it"):
        model.merge_and_unload()
    assert model(images).shape == (len(images), 10)  # and it is still there


def test_disable_adapter_is_the_bare_backbone_and_the_same_head(prompted, images):
    model = prompted("pocket_vit", "vpt").eval()
    with_prompt = model(images)
    with model.disable_adapter():
        bare = model(images)
        assert torch.equal(bare, model.head(model.backbone(images)))
    assert not torch.equal(bare, with_prompt) and torch.equal(model(images), with_prompt)


def test_saving_leaves_no_half_written_file(prompted, tmp_path, monkeypatch):
    model = prompted("pocket_resnet", "lor_vp")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("spikeprompt.model.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_with_a_penalty_can_be_copied_after_a_step(prompted, images):
    model = prompted("pocket_vit", "spike_nvpt", rate_penalty=1.0).train()
    logits, penalty = model(images, return_penalty=True)
    (logits.sum() + penalty).backward()
    assert penalty > 0
    copy = deepcopy(model)
    assert torch.equal(copy.eval()(images), model.eval()(images))


def test_the_root_is_found_when_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "project/nbs").mkdir(parents=True)
    (tmp_path / "project/data.dvc").touch()
    for folder, root in ("project", "project"), ("project/nbs", "project"), (".", "."):
        monkeypatch.chdir(tmp_path / folder)
        assert project_root() == (tmp_path / root).resolve()


def test_an_attach_that_fails_leaves_nothing_behind():
    class Refusing(Prompt):
        "Cannot enter."

        def attach(self, backbone):
            raise RuntimeError("no room")

    own = timm.create_model("pocket_resnet")
    with pytest.raises(RuntimeError, match="no room"):
        PromptedModel(Backbone(own), Refusing(PromptConfig(), None), nn.Identity())
    assert "has_prompt" not in vars(own) and own.conv1[0].weight.requires_grad and own.training
    with pytest.raises(ValueError, match="num_classes = 0: an integer of at least 1 is needed"):
        get_prompted_model(own, LoRVPConfig(), 0)


def test_blocks_without_the_adapter_nest_and_never_touch_an_unloaded_backbone(prompted, images):
    model = prompted("pocket_vit", "spike_nvpt").eval()
    expected, backbone = model(images), model.backbone.model
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())
    attached = hooks()
    with model.disable_adapter():
        with model.disable_adapter():
            assert hooks() == 0
        assert hooks() == 0 and not torch.equal(model(images), expected)
    assert hooks() == attached and torch.equal(model(images), expected)
    with model.disable_adapter():
        model.unload()
    assert hooks() == 0
    for use in (
        lambda: model.calibrate(images),
        lambda: model.features(images),
        model.merge_and_unload,
        lambda: model.disable_adapter().__enter__(),
    ):
        with pytest.raises(ValueError, match="was unloaded"):
            use()
    assert hooks() == 0


def test_what_is_no_model_no_config_or_no_image_is_said_in_one_line(images):
    backbone = timm.create_model("pocket_resnet", pretrained=True)
    model = get_prompted_model(nn.Flatten(), LoRVPConfig(), 3, (0.5,) * 3, (0.5,) * 3, 3072, (32, 32))
    assert model(images).shape == (len(images), 3)
    for wrong, message in [
        (lambda: get_prompted_model("pocket_vit", LoRVPConfig(), 3), "model is a str: a bare nn.Module is needed"),
        (lambda: get_prompted_model(model, LoRVPConfig(), 3), "model is a PromptedModel"),
        (lambda: get_prompted_model(backbone, "lor_vp", 3), "config = 'lor_vp': an instance of a method's config is needed"),
        (lambda: get_prompted_model(backbone, LoRVPConfig, 3), "an instance of a method's config is needed"),
        (
            lambda: get_prompted_model(backbone, LoRVPConfig(), 3, input_size=(3, 32, 32)),
            r"input_size = \(3, 32, 32\): a tuple of 2 numbers",
        ),
        (lambda: get_prompted_model(backbone, LoRVPConfig(), 3, mean=0.5), "mean = 0.5: a tuple of 3 numbers is needed"),
        (lambda: get_prompted_model(backbone, LoRVPConfig(), 3, std=(0.0, 1.0, 1.0)), r"std = \(0.0, 1.0, 1.0\): numbers above 0"),
        (lambda: get_prompted_model(backbone, LoRVPConfig(), 2.5), "num_classes = 2.5: an integer"),
        (lambda: get_prompted_model(backbone, LoRVPConfig(), True), "num_classes = True: an integer"),
        (lambda: PromptedModel.from_pretrained("nowhere", model), "backbone is a PromptedModel"),
        (lambda: model.calibrate(images[:0]), "images are none"),
        (lambda: model.calibrate(255 * images), r"images have values from .* \[0, 1\] is needed, without mean and std"),
        (lambda: model.calibrate(images * torch.nan), "images have values from nan to nan"),
        (lambda: model.calibrate((255 * images).byte()), "images are torch.uint8"),
        (lambda: model(images.numpy()), "images are ndarray"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_registered_name_is_not_taken_away():
    class Other(Prompt):
        "Another method."

    with pytest.raises(ConfigError, match="method 'lorsp': LoRSP has this name; .*Other needs another"):
        register_method("lorsp")(Other)
