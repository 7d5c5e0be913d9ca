"""What a deployed token prompt costs, as ratios of medians of interleaved runs: `uv run python benchmarks/deployment.py [timm name]`.

Random weights of timm's class at 224 px; the prompt is deep, ten tokens a block.
"""

import statistics
import sys

import timm
import torch
from prompt_step import seconds

from spikeprompt import NoPromptConfig, SpikeNVPTConfig, VPTConfig, get_prompted_model

ROUNDS, BATCH = 41, 4


def forms(name: str) -> dict[str, torch.nn.Module]:
    "The same backbone without a prompt, with VPT's tokens, and with Spike-NVPT's tokens in both forms."

    def model(config):
        torch.manual_seed(0)
        return get_prompted_model(timm.create_model(name), config, num_classes=10).eval()

    return {
        "bare backbone": model(NoPromptConfig()),
        "VPT-deep": model(VPTConfig()),
        "Spike-NVPT": model(SpikeNVPTConfig()),
        "Spike-NVPT, merged: prefix keys and values": model(SpikeNVPTConfig()).merge_and_unload(),
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
    print(f"| {name} | to the bare backbone | to VPT-deep |\n|---|---|---|")
    for form, time in found.items():
        print(f"| {form} | {time / found['bare backbone']:.3f} | {time / found['VPT-deep']:.3f} |")
