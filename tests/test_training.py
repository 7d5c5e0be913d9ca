"Runs: same seed, same result; one rule for all methods and both protocols; nothing but prompt and head changes."

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch

from spikeprompt.backbones.loader import Backbone, create_backbone, fingerprint
from spikeprompt.config import BackbonesConfig, ConfigError, DatasetConfig, ExperimentConfig, TrainConfig
from spikeprompt.datasets.readers import read_dataset, save_dataset
from spikeprompt.model import PromptedModel
from spikeprompt.prompts.base import Prompt, PromptConfig, create_prompt, method_class, packaged_methods
from spikeprompt.stages import TRAINING, run_folder
from spikeprompt.training.head import accuracy, fit_head, outputs
from spikeprompt.training.label_mapping import answer_counts, assign_classes
from spikeprompt.training.loop import train
from spikeprompt.training.runs import finish, train_run, training_images, unfinished_folder

packaged_methods()
DATASET = "sprites_position"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    "Folder of the sprites' training part."
    folder = tmp_path_factory.mktemp("prepared")
    save_dataset(read_dataset(DATASET, DatasetConfig()), folder / DATASET)
    return folder


def experiment(method, name="pocket_vit", settings={}, n_train=128, img_size=None, **train):
    "A configuration of one method."
    return ExperimentConfig(
        backbones=BackbonesConfig(names=[name], img_size=img_size),
        datasets={DATASET: DatasetConfig(n_train=n_train, n_val=64)},
        train=TrainConfig(**{"seeds": [0], "epochs": 1, "head_c": [0.01], **train}),
        methods={},
    ).model_copy(update={"methods": {method: {"it": method_class(method).config_class(**settings)}}})


def run_of(method, mapping="linear", name="pocket_vit", seed=0):
    "The coordinates of a run of `experiment`."
    return mapping, DATASET, name, method, "it", seed


def parts_of(config, prepared, name="pocket_vit"):
    backbone = create_backbone(name, img_size=config.backbones.img_size)
    return backbone, training_images(prepared, config, DATASET, backbone, 0)


@pytest.mark.parametrize(
    "name, method, mapping",
    [
        ("pocket_vit", "spike_nvpt", "label"),
        ("pocket_resnet", "lorsp", "label"),
        ("pocket_vit", "vpt_noise", "linear"),
        ("pocket_resnet", "lorsp_permuted", "linear"),
        ("pocket_vit", "full_finetuning", "label"),
    ],
)
def test_same_seed_same_result_to_the_bit_saved_and_loaded(name, method, mapping, prepared, tmp_path):
    config = experiment(method, name)
    backbone, parts = parts_of(config, prepared, name)
    logits = []
    for top, seed in (tmp_path / "one", 0), (tmp_path / "two", 0), (tmp_path / "three", 1):
        run = run_of(method, mapping, name, seed)
        record, _ = train_run(config, run, prepared, top)
        loaded = PromptedModel.from_pretrained(run_folder(top, run), create_backbone(name))
        logits.append(outputs(loaded, parts.val[0]))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_a_run_that_is_finished_is_read_and_an_interrupted_one_trained_again(prepared, tmp_path, monkeypatch):
    config, run = experiment("spike_nvpt", epochs=2), run_of("spike_nvpt")
    record, history = train_run(config, run, prepared, tmp_path)
    state = {path.name: path.read_bytes() for path in run_folder(tmp_path, run).iterdir()}
    (run_folder(tmp_path, run) / TRAINING).unlink()  # killed before its end
    assert train_run(config, run, prepared, tmp_path)[0] == record
    assert {path.name: path.read_bytes() for path in run_folder(tmp_path, run).iterdir()} == state
    monkeypatch.setattr("spikeprompt.training.runs.train", None)
    again, read = train_run(config, run, prepared, tmp_path)
    assert again == record and list(again) == list(record)
    pd.testing.assert_frame_equal(read, history, check_exact=True)


def test_runs_are_collected_in_a_folder_named_by_what_they_depend_on(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("spikeprompt.training.runs.project_root", lambda: tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (data / "arrays.json").write_bytes(b"1")
    (tmp_path / "train-vpt.json").write_text("{}")
    where = lambda out="runs/train/vpt": unfinished_folder("train-vpt.json", "data", out)
    first = where()
    assert first == where() and first.parent == tmp_path / "runs/unfinished/vpt"
    (data / "arrays.json").write_bytes(b"2")
    second = where()
    (tmp_path / "train-vpt.json").write_text("{ }")
    assert len({first, second, where(), where("runs/another/train/vpt")}) == 4
    other = where("runs/another/train/vpt")
    for folder in first, second, other, tmp_path / "out":
        folder.mkdir(parents=True)
        (folder / "of").write_text(folder.name)
    finish(second, "out")
    assert (tmp_path / "out/of").read_text() == second.name and not first.parent.exists()
    assert (other / "of").exists()  # another experiment's interrupted runs


def test_no_prompt_with_a_linear_head_is_the_linear_probe(prepared):
    config = experiment("no_prompt", epochs=2, head_c=[0.001])
    backbone, parts = parts_of(config, prepared)
    train_features, val_features = ((outputs(backbone, images), labels) for images, labels in (parts.train, parts.val))
    _, validated = fit_head(train_features, val_features, [0.001])
    record, history = train_run(config, run_of("no_prompt"), prepared)
    assert history.epoch.tolist() == [0]  # there is nothing to train
    assert record["val_accuracy"] == pytest.approx(validated) and record["prompt_parameters"] == 0


@pytest.mark.parametrize("mapping", ["label", "linear"])
def test_the_end_of_training_is_kept_and_its_head_made_anew(mapping, prepared):
    config = experiment("vpt", settings={"lr": 1.0}, epochs=3)  # so high that training gets worse
    backbone, parts = parts_of(config, prepared)
    torch.manual_seed(0)
    prompt = create_prompt(config.methods["vpt"]["it"], backbone)
    model, history, validated = train(backbone, prompt, parts, config.train, mapping, 0, report=lambda line: None)
    assert history.epoch.tolist() == [0, 1, 2, 3]
    assert accuracy(outputs(model, parts.val[0]), parts.val[1]) == pytest.approx(validated)
    features = [outputs(Features(model), images) for images, _ in (parts.train, parts.val)]
    if mapping == "linear":
        refitted, _ = fit_head((features[0], parts.train[1]), (features[1], parts.val[1]), config.train.head_c)
        assert torch.equal(refitted.linear.weight, model.head.linear.weight)
    else:
        rows, everything = model.head.linear.weight, backbone.classifier.weight
        chosen = [(everything == row).all(1).nonzero().item() for row in rows]
        assert len(set(chosen)) == 16  # one class for each label
        answers = (features[0] @ everything.T + backbone.classifier.bias).argmax(1)
        counts = np.array([[((answers == c) & (parts.train[1] == y)).sum() for c in chosen] for y in range(16)])
        assert counts.trace() >= max(counts[range(16), np.random.default_rng(i).permutation(16)].sum() for i in range(200))


class Features(torch.nn.Module):
    "A prompted model up to its head."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.features(images)


@pytest.mark.parametrize("mapping", ["label_once", "label_random"])
def test_a_fixed_label_mapping_stays(mapping, prepared):
    config = experiment("vp", "pocket_resnet", settings={"template": "full", "lr": 0.3}, epochs=2)
    found = []
    for seed, epochs in (0, 1), (0, 2), (1, 1):
        backbone, parts = parts_of(config, prepared, "pocket_resnet")
        prompt = create_prompt(config.methods["vp"]["it"], backbone)
        answers = outputs(backbone, parts.train[0]) @ backbone.classifier.weight.T + backbone.classifier.bias
        at_start = assign_classes(answer_counts(answers.argmax(1), parts.train[1], 16, len(backbone.classifier.weight)))
        training = config.train.model_copy(update={"epochs": epochs})
        model, _, _ = train(backbone, prompt, parts, training, mapping, seed, report=lambda line: None)
        everything = backbone.classifier.weight
        found.append([(everything == row).all(1).nonzero().item() for row in model.head.linear.weight])
        assert mapping == "label_random" or found[-1] == at_start.tolist()
    assert found[0] == found[1] and len(set(found[0])) == 16
    assert (found[0] == found[2]) == (mapping == "label_once")  # the images are the same, the seed of the drawing is not


def test_under_label_mapping_only_the_prompt_learns(prepared):
    config = experiment("lor_vp", "pocket_resnet", settings={"lr": 0.1}, epochs=2)
    backbone, parts = parts_of(config, prepared, "pocket_resnet")
    before = fingerprint(backbone, classifier=True)
    torch.manual_seed(0)
    prompt = create_prompt(config.methods["lor_vp"]["it"], backbone)
    train(backbone, prompt, parts, config.train, "label", 0, report=lambda line: None)
    assert fingerprint(backbone, classifier=True) == before and prompt.B.abs().max() > 0


def test_label_mapping_needs_a_classifier_with_a_class_for_each_label(prepared):
    config = experiment("lor_vp", "pocket_resnet")
    backbone, parts = parts_of(config, prepared, "pocket_resnet")
    for classes, message in (0, "it has no linear classifier"), (10, "label mapping of 16 labels: allowed are at most 10"):
        backbone.model.reset_classifier(classes)
        prompt = create_prompt(config.methods["lor_vp"]["it"], backbone)
        with pytest.raises(ConfigError, match=message):
            train(backbone, prompt, parts, config.train, "label", 0, report=lambda line: None)
        backbone = Backbone(timm.create_model("pocket_resnet", pretrained=True))


@pytest.mark.parametrize("mapping", ["label", "linear"])
def test_an_untrained_prompt_gets_a_head_and_no_training(mapping, prepared):
    config = experiment("lorsp", settings={"trainable": False, "init_std": 0.5})
    backbone, parts = parts_of(config, prepared)
    torch.manual_seed(0)
    prompt = create_prompt(config.methods["lorsp"]["it"], backbone)
    start = {name: value.clone() for name, value in prompt.state_dict().items() if name in ("a", "b")}
    model, history, validated = train(backbone, prompt, parts, config.train, mapping, 0, report=lambda line: None)
    assert history.epoch.tolist() == [0] and all(torch.equal(prompt.state_dict()[name], value) for name, value in start.items())
    assert accuracy(outputs(model, parts.val[0]), parts.val[1]) == pytest.approx(validated)


def test_noise_on_the_training_images_changes_what_is_learned(prepared):
    for method, mapping in ("no_prompt", "linear"), ("lor_vp", "label"):
        seen = []
        for std in 0.0, 0.3:
            config = experiment(method, settings={"image_noise": std})
            backbone, parts = parts_of(config, prepared)
            torch.manual_seed(0)
            prompt = create_prompt(config.methods[method]["it"], backbone)
            model, _, _ = train(backbone, prompt, parts, config.train, mapping, 0, report=lambda line: None)
            seen.append(outputs(model, parts.val[0]))
        assert not torch.equal(*seen)


def test_bits_that_change_are_counted_by_the_loop(prepared):
    config = experiment("spike_nvpt", settings={"lr": 1.0}, epochs=2)
    record, history = train_run(config, run_of("spike_nvpt"), prepared)
    assert np.isnan(history.bits_moved[0]) and 0 < history.bits_moved[1] == history.bits_flipped[1]
    assert 0 < history.bits_moved[2] == record["bits_moved"] < 1


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
        train(backbone, Vandal(), parts, TrainConfig(epochs=1, head_c=[0.01]), "linear", 0, report=lambda line: None)


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
    run = run_of("vpt")
    train_run(config, run, prepared, tmp_path)
    loaded = PromptedModel.from_pretrained(run_folder(tmp_path, run), create_backbone("pocket_vit", img_size=48))
    assert loaded.backbone.input_size == (48, 48)


def test_the_fingerprint_ignores_the_classifier():
    with_head, without = (timm.create_model("pocket_resnet", pretrained=True, num_classes=n) for n in (5, 0))
    assert fingerprint(Backbone(with_head)) == fingerprint(Backbone(without))
    assert fingerprint(Backbone(with_head), classifier=True) != fingerprint(Backbone(without), classifier=True)
    with torch.no_grad():
        with_head.conv1[0].weight.add_(1e-3)
    assert fingerprint(Backbone(with_head)) != fingerprint(Backbone(without))
