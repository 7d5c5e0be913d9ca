"""What a prompt costs, as ratios of medians of interleaved runs: `uv run python benchmarks/prompt_step.py [backbone ...]`.

Training: one forward and backward pass of prompt and head, relative to the same pass with no prompt but the pixels' gradient.
Inference: one forward pass, relative to the bare backbone with its head.
"""

import statistics
import sys
import time

import torch
from spikeprompt.pocket import pocket_names
from torch.nn.functional import cross_entropy

from spikeprompt.backbones import create_backbone
from spikeprompt.prompts import Head, Prompt, PromptedModel, method_class

METHODS, ROUNDS, BATCH = ["lor_vp", "lorsp", "smm", "vpt", "spike_nvpt"], 15, 64


class Pixels(Prompt):
    "One number added to every pixel: the cheapest prompt that needs the gradient of the pixels."

    def __init__(self):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.zeros(1))

    def pixels(self, images):
        return images + self.offset


def build(name: str, method: str | None) -> PromptedModel:
    "A prompted model with an untrained head."
    backbone = create_backbone(name)
    D = backbone.num_features
    head = Head(torch.zeros(D), torch.ones(D), torch.randn(10, D) / D**0.5, torch.zeros(10))
    if method is None:
        return PromptedModel(backbone, Pixels(), head)
    cls = method_class(method)
    prompt = cls(cls.config_class(), backbone)
    prompt.start(torch.rand(BATCH, 3, *backbone.input_size), backbone)
    return PromptedModel(backbone, prompt, head)


def seconds(work) -> float:
    "Time of one call."
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(name: str) -> dict[str, tuple[float, float]]:
    "Training and inference time of each method relative to the reference, measured in turn."
    torch.manual_seed(0)
    models = {method: build(name, method) for method in [None, *METHODS]}
    images, labels = torch.rand(BATCH, 3, *models[None].backbone.input_size), torch.randint(10, (BATCH,))

    def step(model):
        model.train().zero_grad(set_to_none=True)
        cross_entropy(model(images), labels).backward()

    @torch.inference_mode()
    def look(model):
        model.eval()(images)

    times = {method: ([], []) for method in models}
    for _ in range(ROUNDS + 3):
        for method, model in models.items():
            times[method][0].append(seconds(lambda: step(model)))
            times[method][1].append(seconds(lambda: look(model)))
    medians = {method: [statistics.median(part[3:]) for part in parts] for method, parts in times.items()}
    return {method: tuple(a / b for a, b in zip(medians[method], medians[None])) for method in METHODS}


if __name__ == "__main__":
    print("| backbone | " + " | ".join(f"{method}: training, inference" for method in METHODS) + " |")
    print("|---" * (len(METHODS) + 1) + "|")
    for name in sys.argv[1:] or pocket_names:
        print(f"| {name} | " + " | ".join(f"{train:.2f}, {test:.2f}" for train, test in ratios(name).values()) + " |", flush=True)
