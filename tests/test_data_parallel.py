"Two processes that share each batch train what one process trains."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spikeprompt.model import PromptedModel

pytestmark = pytest.mark.slow

WORK = """
import json, sys
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from spikeprompt.backbones.loader import create_backbone
from spikeprompt.config import DatasetConfig, TrainConfig
from spikeprompt.datasets.readers import read_dataset
from spikeprompt.datasets.splits import split
from spikeprompt.prompts.base import create_prompt, method_class
from spikeprompt.training.loop import train

torch.set_num_threads(1)
found = {}
for mapping, method, settings in ("label", "lor_vp", {"lr": 0.1}), ("label_once", "vp", {"lr": 0.1}), ("linear", "vpt", {}):
    set_seed(0)
    backbone = create_backbone("pocket_vit")
    prompt = create_prompt(method_class(method).config_class(**settings), backbone)
    config = DatasetConfig(n_train=65, n_val=32)  # one image is left for the last batch, and none for the second process
    parts = split(read_dataset("sprites_position", config), config, 0, resize=backbone.resize)
    model, history, validated = train(backbone, prompt, parts, TrainConfig(epochs=2, batch_size=16), mapping, 0, report=lambda line: None)
    flat = torch.cat([p.detach().flatten() for p in prompt.parameters()])
    found[method] = {"loss": history.loss[1:].tolist(), "share": history.train_accuracy[1:].tolist(), "validated": validated}
    found[method]["prompt"] = flat.tolist()
if PartialState().is_main_process:
    json.dump(found, open(sys.argv[1], "w"))
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--num_cpu_threads_per_process", "1", "--num_processes"]


def test_two_processes_train_what_one_trains(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    found = []
    for number in 1, 2:
        out = tmp_path / f"{number}.json"
        done = subprocess.run([*LAUNCH, str(number), tmp_path / "work.py", out], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    for method, one in found[0].items():
        two = found[1][method]
        assert max(map(abs, one["prompt"])) > 0.01
        for key in "loss", "share", "prompt":
            assert two[key] == pytest.approx(one[key], abs=1e-4), (method, key)
        assert two["validated"] == pytest.approx(one["validated"], abs=1e-4)


def test_the_command_line_shares_a_run_among_processes(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(60, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(60) % 2
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels, class_names=["a", "b"])
    program = Path(sys.executable).parent / "spikeprompt"
    words = ["adapt", "--data", tmp_path / "own.npz", "--backbone", "pocket_resnet", "--method", "lor_vp"]
    words += ["--out", tmp_path / "out", "--epochs", "1", "--batch-size", "8", "--json"]
    done = subprocess.run([*LAUNCH, "2", "--no_python", program, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)) == 3  # one of the two tells clean images and two kinds of noise
    assert PromptedModel.from_pretrained(tmp_path / "out").prompt.B.abs().max() > 0
