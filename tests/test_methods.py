"What must hold for every method on every backbone, and the sizes that the papers' tables are read against."
import re

import pytest
import safetensors.torch
import timm
import torch

from spikeprompt.backbones import Backbone, create_backbone, fingerprint
from spikeprompt.data import read_digits
from spikeprompt.experiments import load_run, prepared_split, run, save_run, sources
from spikeprompt.methods.lor_vp import LoRVP, LoRVPConfig
from spikeprompt.methods.lorsp import LoRSP, LoRSPConfig
from spikeprompt.pocket import pocket_names
from spikeprompt.prompts import method_class, prompt_parameters
from spikeprompt.settings import SettingsError, TargetSettings, TrainSettings, parse
from spikeprompt.training import linear_probe, outputs

CONTROLS = ["lorsp_magnitude_mask", "lorsp_no_carry", "lorsp_permuted", "lorsp_random_mask", "smm"]
TOKENS = ["vpt", "vpt_decay", "vpt_noise", "spike_nvpt", "spike_nvpt_straight_through"]
METHODS = ["lor_vp", "lorsp", *TOKENS, *CONTROLS]


@pytest.fixture(scope="module")
def backbone_224():
    return Backbone("resnet18", timm.create_model("resnet18"))


@pytest.mark.parametrize("method, rank, count", [(LoRVP, 4, 5376), (LoRSP, 4, 5376), (LoRSP, 2, 2688), (LoRSP, 1, 1344)])
def test_sizes_at_224_px(backbone_224, method, rank, count):
    assert prompt_parameters(method(method.config_class(rank=rank), backbone_224)) == count


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("rate", [0.16, 0.3])
def test_lorsp_prompt_is_sparse_and_low_rank_at_224_px(backbone_224, rank, rate):
    torch.manual_seed(rank)
    images = torch.rand(8, 3, 224, 224)
    prompt = LoRSP(LoRSPConfig(rank=rank, rate=rate), backbone_224)
    prompt.start(images, backbone_224)
    patterns = prompt.prompt(images).detach()
    assert torch.linalg.matrix_rank(patterns).max() <= rank
    density = (patterns != 0).float().mean().item()
    assert density == pytest.approx(1 - (1 - rate**2) ** rank, abs=0.02)


def test_learned_scales_and_thresholds_are_counted(backbone_224):
    count = lambda **settings: prompt_parameters(LoRSP(LoRSPConfig(rank=4, **settings), backbone_224))
    assert count(scales="learned") == 5389 and count(thresholds="learned") == 5376 + 2 * 4 * 3
    assert count(scales="learned", reading="static") == 5376 + 4 * 3


@pytest.mark.parametrize("reading", ["factor", "pixel", "select", "binary", "static"])
def test_every_reading_trains_and_keeps_what_it_promises(reading, prompted, images):
    prompt = prompted("pocket_resnet", "lorsp", reading=reading, pooled=8).prompt.train()
    prompt.pixels(images).square().sum().backward()
    learned = {name: (p.grad != 0).float().mean().item() for name, p in prompt.named_parameters() if p.requires_grad}
    assert min(learned.values()) > 0.5, learned
    P = prompt.eval().prompt(images).detach()
    rank, density = torch.linalg.matrix_rank(P).max().item(), (P != 0).float().mean().item()
    assert (rank <= 4) == (reading != "pixel")
    if reading in ("pixel", "select"):
        assert 0.3 < density < 1
    else:  # `static` is one draw of 32 rows and columns
        assert density == pytest.approx(1 - (1 - 0.3**2) ** 4, abs=0.1 if reading == "static" else 0.02)
    assert torch.equal(P[0], P[1]) == (reading == "static")


def test_penalties_pull_where_they_should(prompted, images):
    prompt = prompted("pocket_resnet", "lorsp", rate_penalty=1.0, orthogonality=1.0).prompt.train()
    with torch.no_grad():
        prompt.thresholds.mul_(1.5)  # too few spikes
    optimizer = torch.optim.Adam([prompt.b, prompt.a], 0.05)
    found = []
    for _ in range(30):
        prompt.pixels(images)
        loss = prompt.penalty()
        found.append((loss.item(), prompt.fired.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[-1][0] < found[0][0] / 2 and found[-1][1] > found[0][1]
    assert prompted("pocket_resnet", "lorsp").prompt.penalty() == 0


@pytest.mark.parametrize("method, settings, message", [
    ("lorsp_random_mask", {"reading": "factor"}, "reading = 'factor': input should be 'static'"),
    ("lorsp_random_mask", {"thresholds": "learned"}, "thresholds = 'learned': input should be 'fixed'"),
    ("lorsp_magnitude_mask", {"reading": "pixel"}, "reading = 'pixel': input should be 'factor', 'binary' or 'static'"),
    ("lorsp_magnitude_mask", {"thresholds": "learned"}, "thresholds = 'learned': input should be 'fixed'"),
    ("lorsp_magnitude_mask", {"rate_penalty": 1.0}, "rate_penalty = 1.0: input should be less than or equal to 0")])
def test_masks_refuse_what_has_no_meaning_there(method, settings, message):
    with pytest.raises(SettingsError, match=re.escape(f"here.{message}")):
        parse(method_class(method).config_class, settings, "here")


@pytest.mark.parametrize("method", ["lorsp_random_mask", "lorsp_magnitude_mask"])
def test_masks_keep_the_rate_and_no_thresholds(method, prompted, images):
    prompt = prompted("pocket_resnet", method, rate=0.3125).prompt
    assert "thresholds" not in prompt.state_dict()
    assert {s.mean(-1).unique().item() for s in prompt.spikes(images)} == {10 / 32}
    density = prompt.measures(images)["density"]
    assert density == pytest.approx(1 - (1 - 0.3125**2) ** 4, abs=0.04)


@pytest.mark.parametrize("method, files", [("lorsp", ["lorsp.py"]), ("lorsp_no_carry", ["lorsp_no_carry.py", "lorsp.py"])])
def test_the_code_of_a_method_is_that_of_its_classes(method, files):
    assert [path.name for path in sources(method)] == files


def test_lorsp_prompts_differ_between_images(prompted, images):
    patterns = prompted("pocket_resnet", "lorsp").prompt.prompt(images[:2])
    assert (patterns[0] - patterns[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", pocket_names)
@pytest.mark.parametrize("method", METHODS)
def test_prompt_parameters_learn_from_the_first_step(name, method, prompted, images):
    model = prompted(name, method)
    model.backbone(model.prompt.train().pixels(images)).square().sum().backward()
    moved = {key: (p.grad != 0).float().mean().item() for key, p in model.prompt.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.backbone.model.parameters())
    if method == "lor_vp":  # B = 0 by design: A gets its first gradient when B has moved
        assert moved.pop("A") == 0
    if method == "smm":  # δ = 0 by design, too
        assert all(moved.pop(key) == 0 for key in [*moved] if key.startswith("network"))
    assert min(moved.values()) > (0.3 if method == "lorsp_random_mask" else 0.5), moved  # what the lot takes away never learns


@pytest.mark.parametrize("name", pocket_names)
@pytest.mark.parametrize("method", [*METHODS, "spike_nvpt_random_bits"])
def test_batched_equals_one_by_one(name, method, prompted, images):
    model, few = prompted(name, method).eval(), images[:6]
    features = lambda shown: model.backbone(model.prompt.pixels(shown))
    with torch.no_grad():
        together = features(few)
        alone = torch.cat([features(image[None]) for image in few])
    assert (together - alone).abs().max() < 1e-4 * together.abs().max().clamp(min=1)


PAIRS = [*[("pocket_vit", method) for method in METHODS if method not in CONTROLS], *[("pocket_resnet", method) for method in CONTROLS],
         ("pocket_resnet", "lorsp"), ("pocket_swin", "spike_nvpt"), ("pocket_vit", "spike_nvpt_random_bits"),
         ("pocket_convnext", "spike_nvpt"), ("pocket_mixer", "vpt")]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def trained(request, tmp_path_factory):
    "One epoch of a method: twice with one seed, once with another, and the first run saved and loaded."
    name, method = request.param
    train = TrainSettings(epochs=1, probe_c=[0.01])
    fresh = create_backbone(name)
    pixels = prepared_split(read_digits(), TargetSettings(n_train=128, n_val=64), 0, fresh, "digits")
    config = method_class(method).config_class()
    models = [run(name, method, config, pixels, train, seed, report=lambda line: None)[0] for seed in (0, 0, 1)]
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    save_run(models[0], path)
    loaded = load_run(path, name, method, config, train.weights)
    return [outputs(model, pixels.val[0]) for model in (*models, loaded)], fresh, models[0]


def test_same_seed_same_result_to_the_bit(trained):
    (first, again, other, loaded), _, _ = trained
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, loaded)


def test_training_leaves_the_backbone_as_it_was(trained):
    _, fresh, model = trained
    assert fingerprint(model.backbone.model) == fingerprint(fresh.model)


def test_the_probes_head_goes_through_the_same_loop():
    fresh = create_backbone("pocket_vit")
    train = TrainSettings(epochs=2, probe_c=[0.001])
    pixels = prepared_split(read_digits(), TargetSettings(n_train=128, n_val=64), 0, fresh, "digits")
    probe = linear_probe(fresh, pixels, train.probe_c)
    method = method_class("linear_probe")
    _, history, record = run("pocket_vit", "linear_probe", method.config_class(), pixels, train, 0, report=lambda line: None)
    assert history.epoch.tolist() == [0, 1, 2] and history.val_accuracy[0] == pytest.approx(probe[1])
    assert record["val_accuracy"] == history.val_accuracy.max() and record["prompt_parameters"] == 0


def test_every_head_starts_on_the_features_of_its_own_prompt():
    train = TrainSettings(epochs=1, probe_c=[0.01])
    fresh = create_backbone("pocket_vit")
    pixels = prepared_split(read_digits(), TargetSettings(n_train=256, n_val=128), 0, fresh, "digits")
    starts = {}
    for alpha in 0.01, 3.0:
        config = method_class("lorsp").config_class(alpha=alpha, rate_penalty=10.0, lr=0.0)
        starts[alpha] = run("pocket_vit", "lorsp", config, pixels, train, 0, report=lambda line: None)[1].val_accuracy[0]
    assert starts[0.01] == pytest.approx(linear_probe(fresh, pixels, train.probe_c)[1], abs=0.05) and 0.3 < starts[3.0] < starts[0.01]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_or_the_last_epoch_is_kept(keep):
    fresh = create_backbone("pocket_vit")
    pixels = prepared_split(read_digits(), TargetSettings(n_train=128, n_val=64), 0, fresh, "digits")
    config = method_class("vpt").config_class(lr=3.0)  # so high that training gets worse
    train = TrainSettings(epochs=5, probe_c=[0.01], keep=keep)
    model, history, record = run("pocket_vit", "vpt", config, pixels, train, 0, report=lambda line: None)
    best = history.val_accuracy[1:].idxmax()
    assert best < 5 and record["epoch"] == (best if keep == "best" else 5)
    assert record["val_accuracy"] == history.val_accuracy[record["epoch"]]
    assert (outputs(model, pixels.val[0]).argmax(1) == pixels.val[1]).float().mean() == pytest.approx(record["val_accuracy"])


def test_a_method_that_touches_its_backbone_is_stopped():
    from spikeprompt.prompts import Prompt
    from spikeprompt.training import train_prompt

    class Vandal(Prompt):
        def __init__(self):
            super().__init__()
            self.lr = 0.1
            self.p = torch.nn.Parameter(torch.zeros(1))

        def attach(self, backbone):
            self.victim = [next(backbone.model.parameters())]

        def pixels(self, images):
            with torch.no_grad():
                self.victim[0].add_(1e-3)
            return images + self.p

    fresh = create_backbone("pocket_resnet")
    pixels = prepared_split(read_digits(), TargetSettings(n_train=64, n_val=32), 0, fresh, "digits")
    with pytest.raises(RuntimeError, match="'pocket_resnet' changed during training"):
        train_prompt(fresh, Vandal(), pixels, TrainSettings(epochs=1), 0, report=lambda line: None)


def test_bf16_keeps_the_spikes_in_fp32(prompted, images):
    prompt = prompted("pocket_resnet", "lorsp").prompt
    with torch.autocast("cpu", torch.bfloat16):
        low = prompt.prompt(images)
    assert torch.equal(low, prompt.prompt(images))


def test_config_refuses_what_cannot_work():
    for bad in ({"rank": 0}, {"rank": 2.5}, {"rate": 1.0}, {"lr": -1.0}, {"rnak": 2}):
        with pytest.raises(ValueError):
            LoRSPConfig(**bad)
    assert LoRVPConfig(rank=2).rank == 2


def test_a_timm_model_from_a_folder_of_weights(tmp_path):
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", depth=1)
    half = {key: value.half() for key, value in made.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "vit_tiny_patch16_224.safetensors")
    loaded = create_backbone("vit_tiny_patch16_224", tmp_path, depth=1)
    assert loaded.input_size == (224, 224) and loaded.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert torch.equal(loaded.model.norm.weight, made.norm.weight.half().float())
    assert loaded.model.blocks[0].attn.qkv.weight.equal(made.blocks[0].attn.qkv.weight.half().float())
    smaller = create_backbone("vit_tiny_patch16_224", tmp_path, depth=1, img_size=96)
    assert smaller(torch.rand(2, 3, 96, 96)).shape == (2, 192)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224.safetensors does not fit the model"):
        create_backbone("vit_tiny_patch16_224", tmp_path, depth=2)


def test_a_run_remembers_the_size_of_its_pictures(tmp_path):
    train = TrainSettings(epochs=1, probe_c=[0.01], img_size=48)
    fresh = create_backbone("pocket_vit", img_size=48)
    pixels = prepared_split(read_digits(), TargetSettings(n_train=64, n_val=32), 0, fresh, "digits")
    config = method_class("vpt").config_class()
    model, _, _ = run("pocket_vit", "vpt", config, pixels, train, 0, report=lambda line: None)
    save_run(model, tmp_path / "run.safetensors")
    loaded = load_run(tmp_path / "run.safetensors", "pocket_vit", "vpt", config, train.weights)
    assert loaded.backbone.input_size == (48, 48)
    assert torch.equal(outputs(loaded, pixels.val[0]), outputs(model, pixels.val[0]))
