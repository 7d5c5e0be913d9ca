"""What a deployed token prompt costs, as ratios of medians of interleaved runs: `uv run python benchmarks/deployment.py [timm name]`.

Random weights of timm's class at 224 px; the prompt is deep, ten tokens a block.
"""

import statistics
import sys

import timm
import torch
from prompt_step import seconds
from spikeprompt.deployment import Normalised, deployed, fold_tokens
from spikeprompt.methods.vpt import VPT, VPTConfig

from spikeprompt.backbones import Backbone
from spikeprompt.methods.spike_nvpt import SpikeNVPT, SpikeNVPTConfig
from spikeprompt.prompts import Head, Prompt, PromptedModel

ROUNDS, BATCH = 41, 4


def forms(name: str) -> dict[str, torch.nn.Module]:
    "The same backbone bare, with dense tokens, and with Spike-NVPT's in every form."

    def model(prompt) -> PromptedModel:
        torch.manual_seed(0)
        backbone = Backbone(name, timm.create_model(name))
        D = backbone.num_features
        return PromptedModel(backbone, prompt(backbone), Head(torch.zeros(D), torch.ones(D), torch.randn(10, D), torch.zeros(10))).eval()

    spiking = model(lambda backbone: SpikeNVPT(SpikeNVPTConfig(), backbone))
    return {
        "bare backbone": model(lambda backbone: Prompt()),
        "dense VPT": model(lambda backbone: VPT(VPTConfig(), backbone)),
        "Spike-NVPT, training graph": spiking,
        "Spike-NVPT, fixed tokens": deployed(spiking),
        "Spike-NVPT, keys and values": Normalised(fold_tokens(spiking)[0], spiking.backbone).eval(),
    }


@torch.inference_mode()
def medians(name: str) -> dict[str, float]:
    "Seconds of one forward pass of each form, measured in turn."
    models = forms(name)
    images = torch.rand(BATCH, 3, *models["bare backbone"].backbone.input_size)
    times = {form: [] for form in models}
    for _ in range(ROUNDS + 3):
        for form, made in models.items():
            times[form].append(seconds(lambda: made(images)))
    return {form: statistics.median(part[3:]) for form, part in times.items()}


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "vit_tiny_patch16_224"
    found = medians(name)
    print(f"| {name} | to the bare backbone | to dense VPT |\n|---|---|---|")
    for form, time in found.items():
        print(f"| {form} | {time / found['bare backbone']:.3f} | {time / found['dense VPT']:.3f} |")
