"What the tests of more than one file start from."
import pytest
import torch

from spikeprompt.backbones import create_backbone
from spikeprompt.data import read_digits
from spikeprompt.prompts import Head, PromptedModel, method_class


@pytest.fixture(scope="session")
def images():
    "Digits, [64, 3, 32, 32] in [0, 1]."
    return torch.from_numpy(read_digits().x_train[:64]).expand(-1, 3, -1, -1) / 255


@pytest.fixture
def prompted(images):
    "Makes a fresh backbone with an untrained prompt on it and a head of zeros."
    def make(name, method, **settings):
        torch.manual_seed(0)
        cls, backbone = method_class(method), create_backbone(name)
        prompt, D = cls(cls.config_class(**settings), backbone), backbone.num_features
        prompt.start(images, backbone)
        return PromptedModel(backbone, prompt, Head(torch.zeros(D), torch.ones(D), torch.zeros(10, D), torch.zeros(10)))
    return make
