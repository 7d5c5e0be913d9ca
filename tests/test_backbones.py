"Backbones: torchvision's, options of each, folded batch normalisation; what does not fit is named in one line."

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from spikeprompt.backbones.loader import Backbone, create_backbone, fingerprint, recorded_backbone
from spikeprompt.config import BackbonesConfig, ConfigError, TrainConfig, parse_config
from spikeprompt.datasets.splits import Split
from spikeprompt.model import PromptedModel, get_prompted_model, read_adapter
from spikeprompt.prompts.base import create_prompt, method_class
from spikeprompt.training.loop import train


@pytest.fixture
def folder(tmp_path):
    "A folder of weights, which gets random ones of any model."

    def put(name, model):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # as after training, not the identity
                nn.init.uniform_(module.running_var, 0.5, 2), nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.weight, 0.5, 2), nn.init.normal_(module.bias, std=0.1)
        save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
        return model.eval()

    put.path = tmp_path
    return put


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, features", [("squeezenet1_1", 1000), ("resnet18", 512), ("mobilenet_v3_small", 1024), ("swin_t", 768)])
def test_a_torchvision_model_gives_features_and_its_classifier(name, features, folder, pictures):
    whole = folder(f"torchvision_{name}", torchvision.models.get_model(name))
    backbone = create_backbone(f"torchvision_{name}", folder.path, 64)
    normalised = (pictures - backbone.mean) / backbone.std
    assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert (backbone.num_features, backbone.classifier.out_features, backbone.input_size) == (features, 1000, (64, 64))
    assert torch.allclose(backbone.classifier(backbone(pictures)), whole(normalised), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_label_mapping_works_on_a_torchvision_model(folder, pictures):
    folder("torchvision_squeezenet1_1", torchvision.models.squeezenet1_1())
    backbone = create_backbone("torchvision_squeezenet1_1", folder.path, 64)
    before = fingerprint(backbone, classifier=True)
    prompt = create_prompt(method_class("vp").config_class(template="full", lr=0.1), backbone)
    images, labels = (255 * pictures).byte().repeat(4, 1, 1, 1), torch.arange(12) % 3
    parts, config = Split((images, labels), (images, labels)), TrainConfig(epochs=2, batch_size=4)
    model, history, _ = train(backbone, prompt, parts, config, "label", 0, report=lambda line: None)
    assert fingerprint(backbone, classifier=True) == before and model.head.linear.out_features == 3
    assert history.loss.iloc[-1] < history.loss.iloc[1] and prompt.values.abs().max() > 0


def test_a_fingerprint_covers_the_classifier_of_a_torchvision_model(folder):
    folder("torchvision_resnet18", torchvision.models.resnet18())
    backbone = create_backbone("torchvision_resnet18", folder.path)
    features, everything = fingerprint(backbone), fingerprint(backbone, classifier=True)
    with torch.no_grad():
        backbone.classifier.weight[0, 0] += 1
    assert fingerprint(backbone) == features and fingerprint(backbone, classifier=True) != everything


@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet10t", "tf_efficientnet_lite0"])
def test_folded_batch_normalisation_gives_the_same_features_and_gradients(name, folder, pictures):
    folder(name, timm.create_model(name))
    whole, folded = (create_backbone(name, folder.path, 64, fold_batch_norm=fold) for fold in (False, True))
    assert any(isinstance(module, nn.BatchNorm2d) for module in whole.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    found = []
    for backbone in whole, folded:
        x = pictures.clone().requires_grad_()
        features = backbone(x)
        features.square().sum().backward()
        found.append((features.detach(), x.grad))
    (features, gradient), (same, near) = found
    assert torch.allclose(features, same, rtol=1e-3, atol=1e-4 * features.abs().max())
    assert torch.cosine_similarity(gradient.flatten(), near.flatten(), 0) > 0.999  # a rounding error may open or close a ReLU


def test_options_reach_the_model_and_its_adapter_brings_them_back(folder, tmp_path, pictures):
    folder("mobilenetv2_050", timm.create_model("mobilenetv2_050"))
    options = {"pad_type": "same", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5)}
    backbone = create_backbone("mobilenetv2_050", folder.path, 64, **options)
    plain = create_backbone("mobilenetv2_050", folder.path, 64)
    assert not torch.allclose(backbone(pictures), plain(pictures), atol=1e-3)
    model = get_prompted_model(backbone, method_class("lor_vp").config_class(), 3)
    nn.init.normal_(model.head.linear.weight)
    logits = model.eval()(pictures)
    model.save_pretrained(tmp_path / "adapter")
    again = recorded_backbone(read_adapter(tmp_path / "adapter")[0]["backbone"], folder.path)
    assert again.options == {"pad_type": "same"} and again.std.flatten().tolist() == [0.25, 0.5, 0.5]
    assert torch.equal(PromptedModel.from_pretrained(tmp_path / "adapter", again)(pictures), logits)


def test_an_adapter_of_a_packaged_model_remembers_its_size(tmp_path):
    model = get_prompted_model(create_backbone("pocket_vit", img_size=48), method_class("lor_vp").config_class(), 3)
    model.save_pretrained(tmp_path)
    assert PromptedModel.from_pretrained(tmp_path).backbone.input_size == (48, 48)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("pocket_resnet", {"no_such": 1}, "backbone 'pocket_resnet': its constructor refuses {'no_such': 1}: TypeError"),
        ("resnet18.foo", {}, "backbone 'resnet18.foo': its constructor refuses {}: RuntimeError Invalid pretrained tag"),
        ("resnet18", {"act_layer": "foo"}, "its constructor refuses {'act_layer': 'foo'}: KeyError"),
        ("mobilenetv2_100", {"pad_type": "smae"}, "pad_type = 'smae': allowed are 'same' and 'valid', and '' for symmetric padding"),
        ("torchvision_resnet99", {}, "torchvision_<name>; did you mean torchvision_resnet"),
        ("torchvision_fcn_resnet50", {}, "torchvision_<name>"),
        ("pocket_resnet", {"mean": (0.5, 0.5)}, "mean = (0.5, 0.5): a tuple of 3 numbers is needed"),
        ("torchvision_resnet18", {}, "torchvision_resnet18.safetensors is missing; `spikeprompt download torchvision_resnet18"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, options, said):
    with pytest.raises(ConfigError) as error:
        create_backbone(name, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused_with_their_path(folder):
    folder("torchvision_resnet18", timm.create_model("resnet10t"))
    with pytest.raises(ConfigError, match=r"torchvision_resnet18.safetensors does not fit the model: .*Missing key") as error:
        create_backbone("torchvision_resnet18", folder.path)
    assert "\n" not in str(error.value)


def test_a_model_of_ones_own_may_bring_its_classifier(pictures):
    own = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_features": 12}
    assert Backbone(own, **settings).classifier is None
    assert Backbone(own, **settings, classifier=nn.Linear(12, 7)).classifier.out_features == 7
    assert Backbone(own, **settings, classifier=nn.Linear(5, 7)).classifier is None  # of other features


@pytest.mark.parametrize(
    "values, said",
    [
        (
            {"pocket_vi": {"img_size": 48}},
            "backbones.options.pocket_vi is of no backbone; allowed are pocket_vit; did you mean pocket_vit?",
        ),
        ({"pocket_vit": {"pretrained": True}}, "backbones.options: pretrained cannot be an option of one backbone"),
        ({"pocket_vit": {"img_size": 4}}, "backbones.options.pocket_vit.img_size = 4: input should be greater than or equal to 8"),
        ({"pocket_vit": {"mean": [0.5]}}, "backbones.options.pocket_vit.mean = [0.5]: list should have at least 3 items"),
        ({"pocket_vit": {"std": [0.0, 1.0, 1.0]}}, "backbones.options.pocket_vit.std.0 = 0.0: input should be greater than 0"),
    ],
)
def test_options_are_checked(values, said):
    with pytest.raises(ConfigError) as error:
        parse_config(BackbonesConfig, {"names": ["pocket_vit"], "options": values}, "backbones")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_option_takes_the_place_of_what_holds_for_all():
    config = parse_config(BackbonesConfig, {"names": ["a", "b"], "img_size": 32, "options": {"b": {"img_size": 64, "pad_type": "same"}}})
    assert config.arguments("a") == {"weights": "", "img_size": 32, "fold_batch_norm": False}
    assert config.arguments("b") == {"weights": "", "img_size": 64, "fold_batch_norm": False, "pad_type": "same"}
