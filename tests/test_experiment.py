"Every value is checked before anything runs, and every stage depends on what changes its result and on nothing else."

import json
import shutil
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import timm
import yaml
from typer.testing import CliRunner

from spikeprompt.backbones.loader import Backbone
from spikeprompt.backbones.pocket import packaged_weights
from spikeprompt.cli import app
from spikeprompt.config import ConfigError, DatasetConfig, project_root, read_params
from spikeprompt.datasets.base import DataError
from spikeprompt.datasets.readers import read_dataset
from spikeprompt.experiment import NOTEBOOKS, check_classes, check_experiment, checksums_of, stage_record, write_stages
from spikeprompt.stages import parse_experiment, read_stage, run_settings


def changed(path, value):
    "params.yaml with one value changed."
    params = deepcopy(read_params())
    *above, last = path.split("/")
    group = params
    for name in above:
        group = group.setdefault(name, {})
    group[last] = value
    return params


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("backbones/names", ["pocket_resnt"], "backbone 'pocket_resnt': allowed are pocket_resnet"),
        ("backbones/names", ["pocket_vit", "pocket_vit"], "backbones.names = ['pocket_vit', 'pocket_vit']: each is allowed once"),
        ("backbones/names", [], "backbones.names = []: list should have at least 1 item"),
        ("backbones/names", ["resnet18"], "resnet18.safetensors is missing"),
        ("methods/lorps", {}, "method 'lorps': allowed are"),
        ("methods", {"lorsp": {}}, "no_prompt must be one of them"),
        ("methods/lorsp", {"LoRSP": {"rank": -1}}, "methods.lorsp.LoRSP.rank = -1: input should be greater than or equal to 1"),
        ("methods/lorsp", {"LoRSP": {"rnak": 2}}, "methods.lorsp.LoRSP.rnak is not a setting; allowed: "),
        ("methods/lorsp", {"a/b": {}}, "methods.lorsp.a/b"),
        ("methods/lor_vp", {"VPT-deep": {}}, "variant 'VPT-deep' is named twice"),
        ("methods/vpt", {"VPT": {"pad_width": 16}}, "methods.vpt.VPT: "),
        ("robustness/sigmas", [3.0], "robustness.sigmas = 3.0: allowed are"),
        ("robustness/corruptions", ["shot"], "robustness.corruptions = 'shot': allowed are"),
        ("robustness/severities", [1, 1], "robustness.severities = [1, 1]: each is allowed once"),
        ("robustness/attacks", {"pdg": [0.1]}, "robustness.attacks.pdg: allowed are"),
        ("robustness/faults", {"flip": [0.1]}, "robustness.faults.flip: allowed are"),
        ("train/epochs", "six", "train.epochs = 'six': input should be a valid integer"),
        ("train/seeds", [], "train.seeds = []: "),
        ("train/mappings", ["labels"], "train.mappings.0 = 'labels': input should be 'label', 'label_once', 'label_random' or 'linear'"),
        ("tuned/folder", "runs/no/such", "tuned.folder = 'runs/no/such': no table of a search is there"),
        ("tune/space", {"lorsp": {"lr": [0.1]}}, "tune.space.lorsp.lr = [0.1]: list should have at least 2 items"),
        ("datasets/fashion_mnist/n_train", 10**6, "datasets.fashion_mnist.n_train + n_val = 1000100: allowed are at most"),
        ("datasets/mnist", {}, "datasets.mnist: allowed are"),
        ("extensions", ["no_such_module"], "extensions = 'no_such_module': No module named"),
        ("target", {}, "target is not a setting; allowed: question, extensions, backbones, datasets"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line(path, value, message):
    with pytest.raises(ConfigError) as error:
        check_experiment(parse_experiment(changed(path, value)))
    assert message in str(error.value) and "\n" not in str(error.value)


def records(params):
    "What all stages depend on, without data and weights."
    config = parse_experiment(params)
    found = {name: stage_record(config, name) for name in ("prepare", "report")}
    return found | {
        f"{stage}-{method}": stage_record(config, stage, method) for method in config.methods for stage in ("train", "evaluate")
    }


@pytest.mark.parametrize(
    "path, value, stale",
    [
        ("train/weight_decay", 0.1, {"train", "evaluate", "report"}),  # a default that params.yaml does not name
        ("backbones/img_size", 48, {"prepare", "train", "evaluate", "report"}),
        ("robustness/severities", [2], {"prepare", "evaluate", "report"}),
        ("datasets/sprites_orientation/n_train", 100, {"prepare", "train", "evaluate", "report"}),
        ("tune/trials", 3, {"report"}),
    ],
)
def test_a_changed_value_makes_its_stages_stale(path, value, stale, monkeypatch):
    monkeypatch.setattr("spikeprompt.experiment.code_checksum", lambda *sources: "")
    before, after = records(read_params()), records(changed(path, value))
    assert {name.split("-")[0] for name in before if before[name] != after[name]} == stale


def test_one_methods_value_is_that_methods_affair(monkeypatch):
    monkeypatch.setattr("spikeprompt.experiment.code_checksum", lambda *sources: "")
    before, after = records(read_params()), records(changed("methods/lor_vp/LoR-VP/rank", 3))
    assert {name for name in before if before[name] != after[name]} == {"train-lor_vp", "evaluate-lor_vp", "report"}


EDITS = [  # file, old text, new text, the stages that get stale
    ("methods/lorsp.py", '"Config of LoRSP."', '"The config of LoRSP, explained anew."', set()),
    ("methods/lorsp.py", "HOMEOSTASIS = 0.2", "HOMEOSTASIS = 0.3", {"train-lorsp", "evaluate"}),
    ("training/loop.py", "# in a terminal, not in a notebook", "# a progress bar in a terminal", set()),
    ("training/loop.py", "[:256]", "[:128]", {"train-lorsp", "train-vpt"}),
    ("training/search.py", "scramble=False", "scramble=True", set()),
    ("evaluation/energy.py", '"fp32_mul": 3.7', '"fp32_mul": 3.8', {"evaluate"}),
    ("robustness/corruptions.py", "0.299", "0.3", {"evaluate", "prepare"}),
    ("plots/style.py", "COLUMN, PAGE = 3.4, 6.8", "COLUMN, PAGE = 3.5, 6.8", set()),
]
CODE = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
from spikeprompt.engine import code_checksum
stages = {
    "train-lorsp": ("nbs/pipeline/102_train.ipynb", "spikeprompt.methods.lorsp"),
    "train-vpt": ("nbs/pipeline/102_train.ipynb", "spikeprompt.baselines.vpt"),
    "evaluate": ("nbs/pipeline/103_evaluate.ipynb",),
    "prepare": ("nbs/pipeline/100_prepare.ipynb",),
}
checksums = lambda: {stage: code_checksum(*sources) for stage, sources in stages.items()}
before, found = checksums(), []
for name, old, new in json.load(sys.stdin):
    file = Path("spikeprompt") / name
    text = file.read_text()
    assert old in text, (name, old)
    file.write_text(text.replace(old, new))
    found.append([stage for stage, checksum in checksums().items() if checksum != before[stage]])
    file.write_text(text)
print(json.dumps(found))
"""


def test_a_docstring_makes_nothing_stale_and_a_constant_the_right_stages(tmp_path):
    for name in ("spikeprompt", "nbs"):
        shutil.copytree(project_root() / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (tmp_path / "data.dvc").touch()
    edits = json.dumps([edit[:3] for edit in EDITS])
    ran = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, input=edits, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for edit, stale in zip(EDITS, json.loads(ran.stdout)):
        assert set(stale) == edit[3], edit


def test_a_stage_reads_only_what_it_depends_on(tmp_path):
    config = parse_experiment(changed("robustness/severities", [2]))
    write_stages({"train-lorsp": stage_record(config, "train", "lorsp")}, tmp_path)
    read = read_stage(tmp_path / "train-lorsp.json")
    assert read.methods == {"lorsp": config.methods["lorsp"]} and read.train == config.train
    assert read.robustness != config.robustness  # it has its defaults
    write_stages({"prepare": stage_record(config, "prepare")}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.json"]


def test_a_module_of_ones_own_brings_a_method_and_a_dataset(tmp_path, monkeypatch):
    (tmp_path / "my_extension.py").write_text("""
import numpy as np
from spikeprompt.config import Config
from spikeprompt.datasets.base import ImageDataset, register_dataset
from spikeprompt.prompts.base import Prompt, PromptConfig, register_method

class MineConfig(PromptConfig):
    strength: float = 1.0

@register_method("mine")
class Mine(Prompt):
    "My own."
    config_class, label = MineConfig, "Mine"

@register_dataset("stripes")
def read_stripes(folder):
    x = np.random.default_rng(0).integers(256, size=(60, 1, 32, 32), dtype=np.uint8)
    return ImageDataset(x, np.arange(60) % 2, x, np.arange(60) % 2, ["a", "b"])
""")
    monkeypatch.syspath_prepend(tmp_path)
    from spikeprompt.datasets.base import READERS
    from spikeprompt.prompts.base import METHODS

    params = read_params() | {
        "extensions": ["my_extension"],
        "datasets": {"stripes": {"n_train": 20, "n_val": 10, "n_test": 20}},
        "methods": {"no_prompt": None, "mine": {"Mine-2": {"strength": 2.0}}},
    }
    try:
        found = check_experiment(parse_experiment(params))
        defaults = {"image_noise": 0.0, "trainable": True, "lr": 0.01, "weight_decay": 0.0}
        assert found["train-mine"]["config"]["methods"] == {"mine": {"Mine-2": {**defaults, "strength": 2.0}}}
        before = stage_record(parse_experiment(params), "train", "mine")["code"]
        (tmp_path / "my_extension.py").write_text(
            (tmp_path / "my_extension.py").read_text().replace("strength: float = 1.0", "strength: float = 3.0")
        )
        assert stage_record(parse_experiment(params), "train", "mine")["code"] != before
    finally:
        METHODS.pop("mine", None), READERS.pop("stripes", None)


def test_tuned_values_take_the_place_of_a_variants_own(tmp_path):
    header = "mapping,backbone,variant,trial,lr,val_accuracy\n"
    rows = ["label,pocket_vit,LoRSP,0,0.2,0.5", "label,pocket_vit,LoRSP,1,0.3,0.7", "label,pocket_vit,LoRSP,2,0.4,0.6"]
    params = read_params() | {"backbones": {"names": ["pocket_vit"]}}
    for mapping, said in ("label", "for linear on pocket_vit"), ("linear", "for label on pocket_vit"):
        (tmp_path / "lorsp.csv").write_text(header + "\n".join(row.replace("label", mapping) for row in rows) + "\n")
        with pytest.raises(ConfigError, match=f"its search has no values of 'LoRSP' {said}"):
            check_experiment(parse_experiment(params | {"tuned": {"folder": str(tmp_path)}}))
    rows += ["linear,pocket_vit,LoRSP,0,0.05,0.5"]
    (tmp_path / "lorsp.csv").write_text(header + "\n".join(rows) + "\n")
    found = {}
    for like in {}, {"LoRSP, static": "LoRSP"}:
        records = check_experiment(parse_experiment(params | {"tuned": {"folder": str(tmp_path), "like": like}}))
        write_stages(records, tmp_path / "stages")
        config = read_stage(tmp_path / "stages/train-lorsp.json")
        run = lambda mapping, variant: run_settings(config, (mapping, "fashion_mnist", "pocket_vit", "lorsp", variant, 0)).lr
        found[len(like)] = [run("label", "LoRSP"), run("linear", "LoRSP"), run("label", "LoRSP, static")]
        assert records["train-lor_vp"]["config"]["tuned"]["values"] == {}  # or the search would make it stale
    assert found == {0: [0.3, 0.05, 0.1], 1: [0.3, 0.05, 0.3]}
    with pytest.raises(ConfigError, match="tuned.like.LoRSP = 'LoRPS': allowed are the tuned variants, LoRSP"):
        check_experiment(parse_experiment(params | {"tuned": {"folder": str(tmp_path), "like": {"LoRSP": "LoRPS"}}}))


@pytest.mark.parametrize("classes", [0, 5])
def test_label_mapping_is_refused_where_the_backbone_has_too_few_classes(classes):
    config = parse_experiment(read_params())
    backbone = Backbone(timm.create_model("pocket_mixer", num_classes=classes))
    with pytest.raises(ConfigError, match=f"of fashion_mnist needs 10 classes, the classifier of pocket_mixer has {classes}; allowed"):
        check_classes(config, [backbone], {"fashion_mnist": 10})
    only = config.model_copy(update={"train": config.train.model_copy(update={"mappings": ["linear"]})})
    check_classes(only, [backbone], {"fashion_mnist": 10})


def test_every_notebook_of_the_pipeline_belongs_to_a_stage():
    named = [name for listed in NOTEBOOKS.values() for name in listed]
    assert sorted(named) == sorted(path.stem for path in (project_root() / "nbs/pipeline").glob("*.ipynb"))


def test_corrupted_images_of_others_are_part_of_what_prepare_depends_on(tmp_path):
    dataset = read_dataset("sprites_position", DatasetConfig())
    images = np.zeros((5 * len(dataset.y_test), 32, 32, 3), np.uint8)
    np.save(tmp_path / "fog.npy", images), np.save(tmp_path / "labels.npy", np.tile(dataset.y_test, 5))
    few = {"backbones": {"names": ["pocket_resnet"]}, "methods": {"no_prompt": None}}
    few |= {"datasets": {"sprites_position": {"n_train": 100, "n_val": 50, "n_test": 50}}}
    noise = {"sigmas": [], "corruptions": ["fog"], "severities": [1, 3]}
    check = lambda **files: check_experiment(parse_experiment(few | {"robustness": noise | {"files": files}}))["prepare"]["data"]
    own, read = check(), check(sprites_position=str(tmp_path))
    assert list(own) == ["sprites_position"] and list(read) == ["sprites_position", "sprites_position fog"]
    np.save(tmp_path / "fog.npy", images + 1)
    assert check(sprites_position=str(tmp_path))["sprites_position fog"] != read["sprites_position fog"]
    with pytest.raises(ConfigError, match="robustness.files.cifar10 is of no dataset; allowed are sprites_position"):
        check(cifar10=str(tmp_path))
    with pytest.raises(DataError, match="fog.npy or its labels.npy cannot be read"):
        check(sprites_position=str(tmp_path / "nowhere"))


def test_where_weights_and_images_are_elsewhere_their_recorded_checksums_count(tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "images"
    shutil.copytree(packaged_weights, weights)
    shutil.copytree(project_root() / "data/fashion_mnist", data)
    params = changed("datasets", {"fashion_mnist": {"folder": str(data)}}) | {
        "backbones": {"names": ["pocket_mixer"], "weights": str(weights)},
        "methods": {"no_prompt": None, "lorsp": None},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    words = ["check", str(tmp_path / "params.yaml"), "--out", str(tmp_path / "stages"), "--checksums", str(tmp_path / "checksums.json")]
    found = []
    for _ in range(2):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0
        found.append({path.name: path.read_bytes() for path in [*(tmp_path / "stages").glob("*.json"), tmp_path / "checksums.json"]})
        shutil.rmtree(weights, ignore_errors=True), shutil.rmtree(data, ignore_errors=True)
    assert found[0] == found[1]
    assert f"{weights} is not there: its recorded checksums are taken" in done.stderr and str(data) in done.stderr
    more = parse_experiment(params | {"backbones": {"names": ["pocket_mixer", "pocket_vit"], "weights": str(weights)}})
    with pytest.raises(ConfigError, match="pocket_mixer.safetensors is missing"):  # nothing is recorded of the other
        check_experiment(more, checksums_of({name.removesuffix(".json"): json.loads(record) for name, record in found[0].items()}))
    damaged = json.loads((tmp_path / "checksums.json").read_text()) | {"data": {"fashion_mnist": "0" * 64}}
    (tmp_path / "checksums.json").write_text(json.dumps(damaged))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 and "checksums.json" in done.stderr
