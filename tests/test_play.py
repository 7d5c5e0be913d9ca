"The page to play with shows what the models do, and its controls reach every scene."

import base64
import io
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from spikeprompt.methods.lorsp import LoRSPConfig
from spikeprompt.methods.spike_nvpt import SpikeNVPTConfig
from spikeprompt.model import get_prompted_model
from spikeprompt.play import page, player, scene, time_steps

NAMES = ["</script>", "b", "c"]


@pytest.fixture(scope="module")
def models():
    "Two untrained prompts whose heads answer something."
    torch.manual_seed(0)
    found = {}
    for name, config in ("pocket_resnet", LoRSPConfig(rank=3, init_std=0.3)), ("pocket_vit", SpikeNVPTConfig(variant="constant")):
        found[name] = get_prompted_model(timm.create_model(name, pretrained=True), config, num_classes=3).eval()
        torch.nn.init.normal_(found[name].head.linear.weight, std=0.1)
    return found


@pytest.fixture(scope="module")
def images():
    return {name: torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("xy")}


def test_the_last_step_is_the_prompt(models, images):
    pixels, tokens = (model.prompt for model in models.values())
    steps = time_steps(pixels, images["x"][None])
    assert len(steps) == 3 and torch.equal([*steps.values()][-1], pixels.prompt(images["x"][None])[0])
    steps = time_steps(tokens, images["x"][None])
    assert len(steps) == 5 and torch.equal(steps["bits"], tokens.bits(0))
    assert torch.allclose(steps["firing rate after step 4"], tokens.rates(0))


def test_a_scene_without_noise_is_the_image_and_its_answers_are_the_models(models, images):
    model = models["pocket_resnet"]
    found = scene(model, images["x"], 0.0, NAMES)
    assert np.abs(found.noisy / 255 - images["x"].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    with torch.no_grad():
        expected = model(images["x"][None]).softmax(1)[0]
    assert found.answers["with"] == f"{NAMES[expected.argmax()]}, {100 * expected.max():.0f} %"
    assert found.answers["with"] != found.answers["without"]


def test_the_page_holds_every_scene_and_asks_no_host(models, images):
    html = page(models, images, [0.0, 0.2], NAMES)
    assert html.count("</script>") == 1 and "http" not in html
    data = json.loads(re.search(r"const all = (.*), top = ", html)[1])
    assert len(data["pictures"]) == len(set(data["pictures"]))
    for method, model in models.items():
        for name in images:
            for number, sigma in enumerate(data["sigmas"]):
                packed, found = data["scenes"][method][name][number], scene(model, images[name], sigma, NAMES)
                assert packed["answers"] == found.answers and packed["captions"] == found.captions
                for place, expected in zip([packed["noisy"], *packed["steps"]], [found.noisy, *found.steps], strict=True):
                    uri = data["pictures"][place]
                    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
                    assert np.array_equal(np.asarray(shown), expected)


def test_the_live_controls_follow_the_method(models, images):
    (method, _), (_, step) = (box.children for box in player(models, images, NAMES).children[:2])
    assert step.max == 3
    method.value = "pocket_vit"
    assert step.max == 5
