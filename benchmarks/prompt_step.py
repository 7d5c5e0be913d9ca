"""What a prompt costs, as ratios of medians of interleaved runs: `uv run python benchmarks/prompt_step.py [backbone ...]`.

Training: one forward and backward pass of prompt and head, relative to the same pass of the offset,
the cheapest prompt that needs the pixels' gradient.
Inference: one forward pass, relative to the same.
"""

import statistics
import sys
import time

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from spikeprompt.backbones.pocket import pocket_names
from spikeprompt.model import PromptedModel, get_prompted_model
from spikeprompt.prompts.base import Prompt, PromptConfig, method_class, register_method

METHODS, ROUNDS, BATCH = ["lor_vp", "lorsp", "smm", "vpt", "spike_nvpt"], 15, 64


class OffsetConfig(PromptConfig):
    "Config of the offset."


@register_method("offset")
class Offset(Prompt):
    "One number added to every pixel: the cheapest prompt that needs the gradient of the pixels."

    config_class, label = OffsetConfig, "offset"

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.offset = nn.Parameter(torch.zeros(1))

    def pixels(self, images):
        return images + self.offset


def build(name: str, method: str) -> PromptedModel:
    "A prompted model with a randomly initialised head."
    backbone = timm.create_model(name, pretrained=True).to(memory_format=torch.channels_last)
    model = get_prompted_model(backbone, method_class(method).config_class(), num_classes=10)
    model.calibrate(torch.rand(BATCH, 3, *model.backbone.input_size))
    nn.init.normal_(model.head.linear.weight, std=model.backbone.num_features**-0.5)
    return model


def seconds(work) -> float:
    "Time of one call."
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(name: str) -> dict[str, tuple[float, float]]:
    "Training and inference time of each method relative to the offset, measured in turn."
    torch.manual_seed(0)
    models = {method: build(name, method) for method in ["offset", *METHODS]}
    images, labels = torch.rand(BATCH, 3, *models["offset"].backbone.input_size), torch.randint(10, (BATCH,))

    def step(model):
        model.train().zero_grad(set_to_none=True)
        logits, penalty = model(images, return_penalty=True)
        (cross_entropy(logits, labels) + penalty).backward()

    @torch.inference_mode()
    def look(model):
        model.eval()(images)

    times = {method: ([], []) for method in models}
    for _ in range(ROUNDS + 3):
        for method, model in models.items():
            times[method][0].append(seconds(lambda: step(model)))
            times[method][1].append(seconds(lambda: look(model)))
    medians = {method: [statistics.median(part[3:]) for part in parts] for method, parts in times.items()}
    return {method: tuple(a / b for a, b in zip(medians[method], medians["offset"])) for method in METHODS}


if __name__ == "__main__":
    print("| backbone | " + " | ".join(f"{method}: training, inference" for method in METHODS) + " |")
    print("|---" * (len(METHODS) + 1) + "|")
    for name in sys.argv[1:] or pocket_names:
        print(f"| {name} | " + " | ".join(f"{train:.2f}, {test:.2f}" for train, test in ratios(name).values()) + " |", flush=True)
