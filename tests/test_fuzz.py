"Whatever stands in params.yaml or on the command line, the answer is a run or one line, and nothing is half-written."

import math
from copy import deepcopy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from spikeprompt import experiment
from spikeprompt.backbones.loader import create_backbone
from spikeprompt.cli import app

VALID = {
    "backbones": {"names": ["pocket_resnet"], "img_size": None},
    "datasets": {"sprites_position": {"n_train": 200, "n_val": 100, "n_test": 100}},
    "train": {"mappings": ["label"], "seeds": [0, 1], "epochs": 2, "batch_size": 32, "head_lr": 0.001, "head_c": [0.01]},
    "robustness": {
        "sigmas": [0.1],
        "corruptions": ["shot_noise"],
        "severities": [3],
        "attacks": {"fgsm": [0.02]},
        "faults": {"bit_flips": [0.1]},
    },
    "tune": {"trials": 2, "space": {"lorsp": {"lr": [0.01, 0.1]}}},
    "methods": {"no_prompt": {"no prompt": {}}, "lorsp": {"LoRSP": {"rank": 2, "firing_rate": 0.4}}},
}
NUMBERS = [0, -1, 1e6, 1e30, 10**30, 2**70, -0.0, math.inf, -math.inf, math.nan, 33, 0.5, 1e-300]
TEXTS = ["", "1e-1", "label", "lorsp", "../..", "a/b", "\0", "ü", "\u202e", "x" * 500, "pocket_vit", "null", "~", "vit_tiny_patch16_224"]
VALUES = st.sampled_from([*NUMBERS, *TEXTS, None, True, [], {}, [[]], [None], {"a": {}}, ["label", "label"], [0.1, "x"]])


def places(tree, at=()):
    "Every place in a tree, as keys from its top."
    found = [at] if at else []
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in parts:
        found += places(part, (*at, key))
    return found


@st.composite
def changed(draw):
    "params.yaml with one to three changes: other values, names, missing and additional parts, damaged text."
    params = deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(params) or [("train",)]))
        parent = params
        for key in path:
            parent = parent[key]
        kind = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "add"]))
        if kind == "value" or isinstance(parent, list):
            parent[last] = deepcopy(draw(VALUES))
        elif kind == "remove":
            parent.pop(last, None)
        elif kind == "rename":
            parent[draw(st.sampled_from(TEXTS))] = parent.pop(last, None)
        else:
            parent[draw(st.sampled_from(TEXTS))] = deepcopy(draw(VALUES))
    text = yaml.safe_dump(params, allow_unicode=True, sort_keys=False).encode()
    how = draw(st.sampled_from(["whole"] * 6 + ["cut", "twice", "byte", "anchor"]))
    place = draw(st.integers(0, len(text)))
    if how == "cut":
        return text[:place]
    if how == "twice":
        return text + text[: text.index(b"\n", min(place, len(text) - 1)) + 1]
    if how == "byte":
        return text[:place] + bytes([draw(st.integers(0, 255))]) + text[place:]
    return b"question: &q [*q]\n" + text if how == "anchor" else text


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "Each backbone is built once, and the checksum of code computed once."
    patch, built = pytest.MonkeyPatch(), {}

    def build(name, weights="", img_size=None, **kwargs):
        key = (name, weights, img_size)
        if key not in built:
            built[key] = create_backbone(*key)
        return built[key]

    patch.setattr(experiment, "create_backbone", build)
    patch.setattr(experiment, "code_checksum", lambda *sources: "0")
    yield tmp_path_factory.mktemp("fuzz")
    patch.undo()


def one_line(done, out):
    "A run, or exit code 2 with one line and nothing written."
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    if done.exit_code:
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr) < 1500 and not out.exists(), done.stderr
    else:
        assert any(out.iterdir())


@settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(content=changed())
@pytest.mark.slow
def test_any_params_file_runs_or_is_one_line(content, quick):
    path, out = quick / "params.yaml", quick / "stages"
    path.write_bytes(content)
    for file in out.glob("*") if out.exists() else ():
        file.unlink()
    if out.exists():
        out.rmdir()
    one_line(CliRunner().invoke(app, ["check", str(path), "--out", str(out)]), out)


WORDS = st.sampled_from(
    ["adapt", "evaluate", "predict", "export", "check", "try", "reproduced", "methods", "backbones", "--data", "--out", "--json", "--set"]
    + [
        "--epochs",
        "0",
        "-1",
        "x",
        "lr=",
        "=",
        "rank=1e-1",
        "",
        "/nowhere",
        "a.npz",
        "--weights",
        "--seed",
        "99999999999999999999",
        "ü",
        "\0",
    ]
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(words=st.lists(WORDS, max_size=6))
@pytest.mark.slow
def test_any_command_line_is_an_answer_or_says_what_is_wrong(words, quick, monkeypatch):
    if words[:1] in (["check"], ["try"], ["reproduced"]) and len(words) == 1:
        words = [*words, "/nowhere.yaml"]
    monkeypatch.chdir(quick)
    before = {path for path in quick.rglob("*")}
    done = CliRunner().invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output and (done.exit_code or done.output)
    assert not done.exit_code or {path for path in quick.rglob("*")} == before
