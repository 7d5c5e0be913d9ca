"What must hold for every registered method, on a ViT, a Swin and a CNN; a new method is tested without being listed."

import re
from copy import deepcopy

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from spikeprompt.backbones.loader import fingerprint
from spikeprompt.config import ConfigError, parse_config
from spikeprompt.model import PromptedModel
from spikeprompt.prompts.base import method_class, num_parameters, packaged_methods

BACKBONES = ["pocket_vit", "pocket_swin", "pocket_resnet"]
METHODS = packaged_methods()
every = pytest.mark.parametrize("name", BACKBONES)
method_of_all = pytest.mark.parametrize("method", METHODS)


def step(model, images):
    "One training step of prompt and head; returns the gradients of the prompt."
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.prompt.on_step(0.5)
    logits, penalty = model(images, return_penalty=True)
    (cross_entropy(logits, torch.arange(len(images)) % 10) + penalty).backward()
    optimizer.step()
    return {key: p.grad for key, p in model.prompt.named_parameters() if p.requires_grad}


@every
@method_of_all
def test_batched_equals_one_by_one(name, method, prompted, images):
    mixes = method_class(method).mixes_images  # a control that says so mixes them; its prompt has to be large enough to show it
    model = prompted(name, method, **{"init_std": 0.3} if mixes else {}).eval()
    with torch.no_grad():
        together, alone = model(images[:4]), torch.cat([model(image[None]) for image in images[:4]])
    difference = (together - alone).abs().max() / together.abs().max()
    assert difference > 1e-3 if mixes else difference < 1e-4


@every
@method_of_all
def test_gradients_reach_every_trainable_tensor_and_no_other(name, method, prompted, images):
    model = prompted(name, method)
    before = fingerprint(model.backbone)
    step(model, images)  # tensors that start at zero let gradients through from the second step on
    gradients = step(model, images)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values()), gradients.keys()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert fingerprint(model.backbone) == before


TRAINABLE = [m for m in METHODS if m != "no_prompt"]  # it has no parameters


@pytest.mark.parametrize("method", TRAINABLE)
@every
def test_an_untrained_control_stays_as_it_was_drawn(name, method, prompted, images, tmp_path):
    model = prompted(name, method, trainable=False)
    before = {key: value.clone() for key, value in model.prompt.named_parameters()}
    assert step(model, images) == {} and num_parameters(model.prompt) == model.num_trainable_parameters()["prompt"] == 0
    assert before and all(torch.equal(value, before[key]) for key, value in model.prompt.named_parameters())
    model.save_pretrained(tmp_path)
    assert num_parameters(PromptedModel.from_pretrained(tmp_path).prompt) == 0


@every
@method_of_all
def test_saved_and_loaded_it_gives_the_same_logits_to_the_bit(name, method, prompted, images, tmp_path, weights):
    model = prompted(name, method)
    step(model, images)
    model.eval().save_pretrained(tmp_path)
    backbone = timm.create_model(name)
    backbone.load_state_dict(weights(name))
    again = PromptedModel.from_pretrained(tmp_path, backbone)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@every
@method_of_all
def test_unload_gives_the_model_back_as_it_was(name, method, prompted, images, weights):
    def facts(model):
        hooks = [len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        keys = [sorted(vars(m)) for m in model.modules()]
        return hooks, keys, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    fresh = timm.create_model(name)
    fresh.load_state_dict(weights(name))
    expected, features = facts(fresh), fresh(images)
    model = prompted(name, method)
    step(model, images)
    unloaded = model.unload()
    assert facts(unloaded) == expected
    assert all(torch.equal(unloaded.state_dict()[key], value) for key, value in weights(name).items() if "num_batches" not in key)
    assert torch.equal(unloaded.eval()(images), fresh.load_state_dict(weights(name)) and fresh.eval()(images))
    assert features.shape == unloaded(images).shape


@method_of_all
def test_a_copy_after_a_training_step_is_independent(method, prompted, images):
    model = prompted("pocket_vit", method)
    step(model, images)
    copy = deepcopy(model)
    before = model.eval()(images).detach()
    assert torch.equal(copy.eval()(images), before)
    with torch.no_grad():
        for tensor in [*copy.prompt.parameters(), *copy.head.parameters()]:
            tensor.add_(1.0)
    assert not torch.equal(copy(images), before) and torch.equal(model(images), before)
    copy.unload()
    assert torch.equal(model(images), before)


@method_of_all
def test_a_query_has_no_side_effect(method, prompted, images):
    prompt = prompted("pocket_vit", method).prompt.eval()
    state = {key: value.clone() for key, value in prompt.state_dict().items()}
    first = prompt.measures(images)
    assert prompt.measures(images) == first
    assert all(torch.equal(prompt.state_dict()[key], value) for key, value in state.items())


@method_of_all
def test_a_wrong_config_is_refused_in_one_line(method):
    kind = method_class(method).config_class
    with pytest.raises(
        ConfigError, match="^here.no_such is not a setting; allowed: .*$|^here.no_such is not a setting; allowed: $"
    ) as error:
        parse_config(kind, {"no_such": 1}, "here")
    assert "\n" not in str(error.value)
    if "lr" in kind.model_fields:
        with pytest.raises(ConfigError, match=re.escape("here.lr = -1: input should be")):
            parse_config(kind, {"lr": -1}, "here")


@pytest.mark.parametrize("method", TRAINABLE)
@every
def test_training_state_is_complete(name, method, prompted, images):
    "A prompt continued from its state dict takes the same step as the one that was never stopped."
    model = prompted(name, method)
    step(model, images)
    other = prompted(name, method)
    other.prompt.load_state_dict(model.prompt.state_dict())
    other.head.load_state_dict(model.head.state_dict())
    for each in model, other:
        each.zero_grad()
        torch.manual_seed(3)
        step(each, images)
    assert all(torch.equal(a, b) for a, b in zip(model.prompt.state_dict().values(), other.prompt.state_dict().values()))


def test_every_method_has_a_label_of_its_own():
    labels = [method_class(method).label for method in METHODS]
    assert len(set(labels)) == len(labels), labels
    for reference in (method_class(method).reference for method in METHODS):
        assert {reference} <= {*METHODS} if isinstance(reference, str) else {*reference} <= {*METHODS}


@pytest.mark.parametrize("bad", [{"image_noise": -0.1}, {"trainable": "maybe"}, {"padding_lr": 0.1}])
def test_settings_of_all_methods(bad):
    for kind in (method_class(method).config_class for method in METHODS):
        assert kind().image_noise == 0.0 and kind(image_noise=0.2).image_noise == 0.2
        with pytest.raises(ConfigError, match=f"here.{next(iter(bad))} "):
            parse_config(kind, bad, "here")


@pytest.mark.parametrize(
    "method, placements",  # on a ViT, a Swin and a CNN
    [
        ("no_prompt", ["none"] * 3),
        ("lorsp", ["pixels"] * 3),
        ("vpt", ["tokens", "tokens", "padding"]),
        ("spike_nvpt", ["tokens", "tokens", "padding"]),
        ("full_finetuning", ["weights"] * 3),
    ],
)
def test_placements(method, placements, prompted):
    assert [prompted(name, method).prompt.placement for name in BACKBONES] == placements
