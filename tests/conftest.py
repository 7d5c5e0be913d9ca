"What the tests of more than one file start from."

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run in as many processes as there are cores

import pytest
import timm
import torch

from spikeprompt.model import get_prompted_model
from spikeprompt.prompts.base import method_class

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images():
    "Smooth random images, [16, 3, 32, 32] in [0, 1]."
    noise = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, 32, mode="bilinear")


@pytest.fixture(scope="session")
def weights():
    "State of each pocket model, read once."
    found = {}

    def of(name):
        if name not in found:
            found[name] = timm.create_model(name, pretrained=True).state_dict()
        return found[name]

    return of


@pytest.fixture
def prompted(images, weights):
    "Makes a fresh pocket model with a calibrated, untrained prompt and a drawn head."

    def make(name, method, **settings):
        torch.manual_seed(0)
        model = timm.create_model(name)
        model.load_state_dict(weights(name))
        made = get_prompted_model(model, method_class(method).config_class(**settings), num_classes=10)
        made.calibrate(images)
        torch.nn.init.normal_(made.head.linear.weight, generator=torch.Generator().manual_seed(1))
        return made

    return make
