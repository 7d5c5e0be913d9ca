"Runs: same seed, same result; one rule for all methods; nothing but prompt and head changes."

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from spikeprompt.backbones.loader import create_backbone, fingerprint
from spikeprompt.config import BackbonesConfig, DatasetConfig, ExperimentConfig, TrainConfig
from spikeprompt.datasets import read_dataset, save_dataset
from spikeprompt.model import PromptedModel
from spikeprompt.prompts.base import METHODS, Prompt, PromptConfig, method_class, packaged_methods
from spikeprompt.stages import run_folder
from spikeprompt.training.head import accuracy, linear_probe, outputs
from spikeprompt.training.loop import train
from spikeprompt.training.runs import train_run, training_images

packaged_methods()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    "Folder of the digits' training part."
    folder = tmp_path_factory.mktemp("prepared")
    save_dataset(read_dataset("digits", DatasetConfig()), folder / "digits.npz")
    return folder


def experiment(method, name="pocket_vit", settings={}, n_train=128, img_size=None, **train):
    "A configuration of one method."
    return ExperimentConfig(
        backbones=BackbonesConfig(names=[name], img_size=img_size),
        datasets={"digits": DatasetConfig(n_train=n_train, n_val=64)},
        train=TrainConfig(**{"seeds": [0], "epochs": 1, "head_c": [0.01], **train}),
        methods={},
    ).model_copy(update={"methods": {method: {"it": method_class(method).config_class(**settings)}}})


def parts_of(config, prepared, name="pocket_vit"):
    backbone = create_backbone(name, img_size=config.backbones.img_size)
    return backbone, training_images(prepared, config, "digits", backbone, 0)


@pytest.mark.parametrize(
    "name, method",
    [("pocket_vit", "spike_nvpt"), ("pocket_resnet", "lorsp"), ("pocket_swin", "vpt_noise"), ("pocket_resnet", "lorsp_permuted")],
)
def test_same_seed_same_result_to_the_bit_saved_and_loaded(name, method, prepared, tmp_path):
    config = experiment(method, name)
    backbone, parts = parts_of(config, prepared, name)
    logits = []
    for top, seed in (tmp_path / "one", 0), (tmp_path / "two", 0), (tmp_path / "three", 1):
        run = ("digits", name, method, "it", seed)
        train_run(config, run, prepared, top)
        loaded = PromptedModel.from_pretrained(run_folder(top, run), create_backbone(name))
        logits.append(outputs(loaded, parts.val[0]))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_the_probes_head_goes_through_the_same_loop(prepared):
    config = experiment("linear_probe", epochs=2, head_c=[0.001])
    backbone, parts = parts_of(config, prepared)
    _, started = linear_probe(backbone, parts, config.train.head_c)
    record, history = train_run(config, ("digits", "pocket_vit", "linear_probe", "it", 0), prepared)
    assert history.epoch.tolist() == [0, 1, 2] and history.val_accuracy[0] == pytest.approx(started)
    assert record["val_accuracy"] == history.val_accuracy.max() and record["prompt_parameters"] == 0


def test_every_head_starts_on_the_features_of_its_own_prompt(prepared):
    starts = {}
    for amplitude in 0.01, 3.0:
        config = experiment("lorsp", settings={"amplitude": amplitude, "trainable": False}, n_train=256)
        starts[amplitude] = train_run(config, ("digits", "pocket_vit", "lorsp", "it", 0), prepared)[1].val_accuracy[0]
    backbone, parts = parts_of(config, prepared)
    assert starts[0.01] == pytest.approx(linear_probe(backbone, parts, [0.01])[1], abs=0.08) and 0.3 < starts[3.0] < starts[0.01]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_or_the_last_epoch_is_kept(keep, prepared):
    config = experiment("vpt", settings={"lr": 3.0}, epochs=5, keep=keep)  # so high that training gets worse
    backbone, parts = parts_of(config, prepared)
    torch.manual_seed(0)
    prompt = METHODS["vpt"](config.methods["vpt"]["it"], backbone)
    model, history = train(backbone, prompt, parts, config.train, 0, report=lambda line: None)
    best = history.val_accuracy[1:].idxmax()
    kept = history[history.kept].epoch.iloc[-1]
    assert best < 5 and kept == (best if keep == "best" else 5)
    assert accuracy(outputs(model, parts.val[0]), parts.val[1]) == pytest.approx(history.val_accuracy[kept])


def test_bits_that_change_are_counted_by_the_loop(prepared):
    config = experiment("spike_nvpt", settings={"lr": 1.0}, epochs=2)
    _, history = train_run(config, ("digits", "pocket_vit", "spike_nvpt", "it", 0), prepared)
    assert np.isnan(history.bits_moved[0]) and 0 < history.bits_moved[1] == history.bits_flipped[1]
    assert 0 < history.bits_moved[2] < 1


def test_a_method_that_changes_its_backbone_is_stopped(prepared):
    class Vandal(Prompt):
        "Changes the backbone's first tensor."

        def __init__(self):
            super().__init__(PromptConfig(lr=0.1), None)
            self.p = torch.nn.Parameter(torch.zeros(1))

        def attach(self, backbone):
            self.victim = [next(backbone.model.parameters())]
            return []

        def pixels(self, images):
            with torch.no_grad():
                self.victim[0].add_(1e-3)
            return images + self.p

    backbone, parts = parts_of(experiment("lor_vp", n_train=64), prepared)
    with pytest.raises(RuntimeError, match="'pocket_vit' changed during training"):
        train(backbone, Vandal(), parts, TrainConfig(epochs=1, head_c=[0.01]), 0, report=lambda line: None)


def test_a_timm_model_from_a_folder_of_weights(tmp_path):
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", depth=1)
    half = {key: value.half() for key, value in made.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "vit_tiny_patch16_224.safetensors")
    loaded = create_backbone("vit_tiny_patch16_224", tmp_path, depth=1)
    assert loaded.input_size == (224, 224) and loaded.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert loaded.model.blocks[0].attn.qkv.weight.equal(made.blocks[0].attn.qkv.weight.half().float())
    smaller = create_backbone("vit_tiny_patch16_224", tmp_path, depth=1, img_size=96)
    assert smaller(torch.rand(2, 3, 96, 96)).shape == (2, 192)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224.safetensors does not fit the model"):
        create_backbone("vit_tiny_patch16_224", tmp_path, depth=2)


def test_a_run_at_another_size(prepared, tmp_path):
    config = experiment("vpt", img_size=48, n_train=64)
    run = ("digits", "pocket_vit", "vpt", "it", 0)
    train_run(config, run, prepared, tmp_path)
    loaded = PromptedModel.from_pretrained(run_folder(tmp_path, run), create_backbone("pocket_vit", img_size=48))
    assert loaded.backbone.input_size == (48, 48)


def test_the_fingerprint_ignores_the_classifier():
    with_head, without = (timm.create_model("pocket_resnet", pretrained=True, num_classes=n) for n in (5, 0))
    from spikeprompt.backbones.loader import Backbone

    assert fingerprint(Backbone(with_head)) == fingerprint(Backbone(without))
    with torch.no_grad():
        with_head.conv1[0].weight.add_(1e-3)
    assert fingerprint(Backbone(with_head)) != fingerprint(Backbone(without))
