"The command line: from a folder of images to an adapter, and one line for everything that is wrong."

import json
import re
from html import unescape
from subprocess import CompletedProcess

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from spikeprompt import __version__
from spikeprompt.adapt import adapt
from spikeprompt.backbones.loader import create_backbone
from spikeprompt.baselines.lor_vp import LoRVPConfig
from spikeprompt.cli import app
from spikeprompt.config import DatasetConfig, TrainConfig
from spikeprompt.datasets.base import DataError
from spikeprompt.datasets.image_files import read_image, read_image_folder
from spikeprompt.datasets.readers import read_dataset
from spikeprompt.files import read_json, write_json
from spikeprompt.model import PromptedModel

RUN = ["--epochs", "1", "--backbone", "pocket_resnet"]


def call(*arguments):
    "What a command prints and how it ends; a traceback fails the test."
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def refused(*arguments):
    "The one line of a command that is refused."
    done = call(*arguments)
    lines = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and done.stdout == "" and lines, done.output
    return lines[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two classes of colours, 30 images each, of several modes."
    top, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, colour in ("red", [200, 40, 40]), ("blue", [40, 40, 200]):
        (top / name).mkdir()
        for number in range(30):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (40, 36, 3)), 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels).convert("RGBA" if number == 0 else "CMYK" if number == 1 else "RGB")
            image.save(top / name / f"{number}.{'tif' if number == 1 else 'png'}")
    return top


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    "What `adapt` writes."
    out = tmp_path_factory.mktemp("made") / "adapter"
    done = call("adapt", "--data", folder, "--out", out, "--method", "lorsp", "--set", "rank=1", *RUN, "--json")
    assert done.exit_code == 0, done.output
    return out, done


def test_an_adapter_and_its_card_are_written(adapter):
    out, done = adapter
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "labels.json", "report.html"}
    rows = json.loads(done.stdout)
    assert [row["images"] for row in rows] == ["clean", "gaussian 0.1", "gaussian 0.2"]
    assert rows[0]["no prompt"] > 80 and rows[0]["LoRSP"] > 80  # red and blue
    assert "converted to RGB: 2 transparent, 2 CMYK" in done.stderr and "epoch  1/1" in done.stderr
    card = (out / "report.html").read_text()
    assert "LoRSP on pocket_resnet" in card and f"{rows[0]['LoRSP']:.1f}" in card and '"rank": 1' in unescape(card)
    assert not re.search(r'(src|href)="(?!data:)', card)
    assert PromptedModel.from_pretrained(out).prompt.config.rank == 1


def test_predict_and_evaluate_agree_with_the_model(folder, adapter):
    out, done = adapter
    files = sorted((folder / "red").glob("*.png"))[:3] + sorted((folder / "blue").glob("*.png"))[:3]
    rows = json.loads(call("predict", out, *files, "--json").stdout)
    assert [row["class"] for row in rows] == ["red"] * 3 + ["blue"] * 3
    model = PromptedModel.from_pretrained(out)
    image = torch.from_numpy(read_image(files[0], (32, 32), model.backbone.interpolation)[0])[None] / 255
    assert rows[0]["probability (%)"] == pytest.approx(100 * model(image).softmax(1).max().item(), abs=0.01)
    scores = json.loads(call("evaluate", out, "--data", folder, "--sigma", "0.1", "--json").stdout)
    before = {row["images"]: row["LoRSP"] for row in json.loads(done.stdout)}
    assert {row["images"]: pytest.approx(row["accuracy (%)"]) for row in scores} == {
        name: before[name] for name in ("clean", "gaussian 0.1")
    }


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_exported_graphs_give_the_same_logits_for_any_batch(suffix, adapter, tmp_path):
    if suffix == "onnx":
        session = pytest.importorskip("onnxruntime")
    done, path = call("export", adapter[0], tmp_path / f"model.{suffix}"), tmp_path / f"model.{suffix}"
    assert done.exit_code == 0 and [p.name for p in tmp_path.iterdir()] == [path.name], done.output
    images, model = torch.rand(5, 3, 32, 32), PromptedModel.from_pretrained(adapter[0])
    if suffix == "onnx":
        found = torch.from_numpy(session.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0])
    else:
        found = torch.export.load(path).module()(images)
    torch.testing.assert_close(found, model(images), rtol=0, atol=1e-4)


def test_a_folder_is_predicted_image_by_image(folder, adapter):
    rows = json.loads(call("predict", adapter[0], folder / "red", "--json").stdout)
    assert len(rows) == 30 and {row["class"] for row in rows} == {"red"}
    assert "no image is there" in refused("predict", adapter[0], adapter[0])


def test_a_method_of_ones_own_on_a_backbone_with_options_under_label_mapping(folder, tmp_path, monkeypatch):
    module = """
from spikeprompt.baselines.lor_vp import LoRVP, LoRVPConfig
from spikeprompt.prompts.base import register_method

class OwnConfig(LoRVPConfig):
    pass

@register_method("own_factors")
class OwnFactors(LoRVP):
    config_class, label = OwnConfig, "own factors"
"""
    (tmp_path / "own_methods.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    own, weights = ["--extension", "own_methods"], tmp_path / "weights"
    weights.mkdir()
    backbone = timm.create_model("test_resnet", num_classes=20)  # of another size than the packaged ones, and from a folder
    save_file(backbone.state_dict(), weights / "test_resnet.safetensors")
    monkeypatch.chdir(tmp_path)  # the folder of weights is relative to here
    chosen = ["--backbone", "test_resnet", "--weights", "weights", "--option", "num_classes=20", "--option", "img_size=64"]
    asked = ["--method", "own_factors", "--set", "rank=1", "--set", "lr=1e-2", "--mapping", "label", "--epochs", 1, "--json"]
    done = call("adapt", "--data", folder, "--out", "made", *chosen, *asked, *own)
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)[0]) == ["images", "no prompt", "own factors"]
    card = unescape((tmp_path / "made/report.html").read_text())
    assert "384 parameters of own factors were trained" in card and "one for each label" in card
    found = json.loads(call("evaluate", "made", "--data", folder, "--weights", "weights", *own, "--json").stdout)
    assert found[0]["accuracy (%)"] == json.loads(done.stdout)[0]["own factors"]
    assert "is not packaged: --weights FOLDER" in refused("evaluate", "made", "--data", folder, *own)


def test_what_a_head_gains_from_noise_is_not_credited_to_the_prompt():
    few = read_dataset("fashion_mnist", DatasetConfig(folder="data/fashion_mnist")).first(300)
    config, training = LoRVPConfig(lr=1e-8, image_noise=0.2), TrainConfig(epochs=1, batch_size=64)
    scores = adapt(few, lambda: create_backbone("pocket_vit"), config, training, report=lambda line: None).scores
    assert (scores["LoR-VP"] - scores["no prompt"]).abs().max() < 3


def test_lists_name_what_there_is():
    assert {row["backbone"] for row in json.loads(call("backbones", "--json").stdout)} >= {"pocket_vit", "pocket_mixer"}
    methods = {row["method"]: row for row in json.loads(call("methods", "--json").stdout)}
    assert methods["vpt"]["changes"] == "tokens or padding" and "lorsp_no_carry" in methods
    settings = {row["setting"]: row for row in json.loads(call("methods", "lorsp", "--json").stdout)}
    assert settings["rank"]["default"] == "4" and "(>= 1 and <= 64)" in settings["rank"]["what it is"]
    assert settings["thresholds"]["what it is"].endswith("(homeostatic, fixed, learned)")
    assert call("--version").stdout.strip() == __version__
    assert {row["dataset"] for row in json.loads(call("datasets", "--json").stdout)} >= {"fashion_mnist", "sprites_position"}
    for command in "adapt", "evaluate", "predict", "export", "check", "download", "pack-data":
        assert call(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    "mode, kind",
    [("L", "grey"), ("1", "black and white"), ("RGBA", "transparent"), ("LA", "grey with transparency"), ("CMYK", "CMYK"), ("RGB", None)],
)
def test_modes_are_converted_and_named(mode, kind, tmp_path):
    path = tmp_path / "image.tif"
    Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode).save(path)
    pixels, found = read_image(path, (32, 32))
    assert found == kind and pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8 and pixels.min() > 250


def test_sixteen_bits_become_eight_and_transparent_becomes_white(tmp_path):
    Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16)).save(tmp_path / "deep.png")
    pixels, kind = read_image(tmp_path / "deep.png", (8, 8))
    assert kind == "16 bits" and pixels.min() == pixels.max() == 127
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", (8, 8))[0].min() == 255


def test_parts_of_a_folder_are_kept_apart(folder, tmp_path):
    for part in "train", "test":
        for name in "red", "blue":
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(2 if part == "test" else 4):
                Image.new("RGB", (8, 8), name).save(tmp_path / part / name / f"{number}.png")
    dataset, converted = read_image_folder(tmp_path, (8, 8))
    assert len(dataset.y_train) == 8 and len(dataset.y_test) == 4 and not converted
    (tmp_path / "test/red").rename(tmp_path / "test/rot")
    with pytest.raises(DataError, match="they differ in red, rot"):
        read_image_folder(tmp_path, (8, 8))
    whole = read_image_folder(folder, (8, 8))[0]
    assert len(whole.y_train) == 48 and np.bincount(whole.y_test).tolist() == [6, 6]


def broken(top, kind):
    "A folder with one fault."
    for name in "red", "blue":
        (top / name).mkdir()
        for number in range(6):
            Image.new("RGB", (8, 8), name).save(top / name / f"{number}.png")
    if kind == "empty class":
        for path in (top / "red").iterdir():
            path.unlink()
    if kind == "one class":
        (top / "red").rename(top / ".red")
    if kind == "broken image":
        (top / "red/3.png").write_bytes((top / "red/3.png").read_bytes()[:40])
    if kind == "no image":
        (top / "red/3.jpg").write_text("<html>404</html>")


@pytest.mark.parametrize(
    "kind, said",
    [
        ("empty class", "red holds no image; allowed are .bmp"),
        ("one class", "holds 1 class folders: at least 2 are needed"),
        ("broken image", "red/3.png: no image that can be read"),
        ("no image", "red/3.jpg: no image that can be read"),
        ("few images", "10 training and 2 test images: at least 20 and 10 are needed"),
    ],
)
def test_a_faulty_folder_is_one_line_and_nothing_is_written(kind, said, tmp_path):
    (tmp_path / "data").mkdir()
    broken(tmp_path / "data", kind)
    assert said in refused("adapt", "--data", tmp_path / "data", "--out", tmp_path / "out", *RUN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--backbone", "pocket_resnt"], "torchvision_<name>; did you mean pocket_resnet"),
        (["--method", "lorps"], "imported module registers; did you mean lorsp"),
        (["--set", "rank=zero"], "lorsp.rank = 'zero': input should be a valid integer"),
        (["--set", "rnak=2"], "lorsp.rnak is not a setting"),
        (["--set", "rank"], "--set rank: name=value is needed"),
        (["--set", "rank=["], "--set rank=[: the value is not YAML"),
        (["--set", "rank=2", "--set", "rank=3"], "--set rank stands twice"),
        (["--set", "lr=1e3"], "lorsp.lr = 1000.0: input should be less than or equal to 100"),
        (["--backbone", "resnet18"], "backbone 'resnet18' is not packaged: --weights FOLDER"),
        (["--backbone", "resnet18", "--weights", "none"], "/none/resnet18.safetensors is missing"),
        (["--option", "img_sise=64"], "img_sise"),
        (["--mapping", "table"], "train.mappings"),
        (["--extension", "no_such_module"], "extensions = 'no_such_module'"),
        (["--method", "vpt", "--set", "placement=tokens"], "placement"),
        (["--data", "/nowhere"], "/nowhere is no folder"),
    ],
)
def test_a_wrong_value_is_one_line(arguments, said, folder, tmp_path):
    assert said in refused("adapt", "--data", folder, "--out", tmp_path / "out", *RUN, *arguments)
    assert not (tmp_path / "out").exists()


def test_labels_out_of_range_and_other_classes_are_refused(folder, adapter, tmp_path):
    x = np.zeros((20, 8, 8, 3), np.uint8)
    arrays = {"x_train": x, "y_train": np.arange(20) % 3, "x_test": x, "y_test": np.arange(20) % 2, "class_names": np.array(["a", "b"])}
    np.savez(tmp_path / "own.npz", **arrays)
    assert "y_train must be integers from 0 to 1" in refused("adapt", "--data", tmp_path / "own.npz", "--out", tmp_path / "out", *RUN)
    np.savez(tmp_path / "own.npz", **arrays | {"y_train": np.arange(20) % 2})
    assert "its classes are a, b; those of" in refused("evaluate", adapter[0], "--data", tmp_path / "own.npz")


def test_a_damaged_adapter_and_a_wrong_file_name_are_refused(folder, adapter, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in adapter[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    image = folder / "red/2.png"
    assert "adapter_model.safetensors" in refused("predict", copy, image)
    record = read_json(adapter[0] / "adapter_config.json", "")
    write_json(copy / "adapter_config.json", record | {"backbone": record["backbone"] | {"fingerprint": "0" * 64}})
    weights.write_bytes((adapter[0] / weights.name).read_bytes())
    assert "trained on pocket_resnet with fingerprint 000000000000" in refused("predict", copy, image)
    assert "the file is to end in .pt2 or .onnx" in refused("export", adapter[0], tmp_path / "model.pt")
    assert "2.png.missing" in refused("predict", adapter[0], f"{image}.missing")
    (copy / "out").write_text("a file")
    assert "out: File exists" in refused("adapt", "--data", folder, "--out", copy / "out", *RUN)


def test_files_are_fetched_and_made_by_name(tmp_path):
    assert "torchvision_<name>; did you mean resnet18" in refused("download", "resnet81")
    assert "train-images-idx3-ubyte.gz is missing" in refused("pack-data", tmp_path)


def test_the_notebook_to_play_with_is_opened_or_named(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("subprocess.run", lambda command: opened.append(command) or CompletedProcess(command, 0))
    assert call("play").exit_code == 0 and opened[0][-1].endswith("nbs/98_play.ipynb")
    monkeypatch.chdir(tmp_path)
    assert "98_play.ipynb is missing" in refused("play") and len(opened) == 1
