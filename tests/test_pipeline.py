"A whole tiny pipeline in a copy of the repository: it runs, repeats itself, and stops at a wrong value."

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from spikeprompt.config import project_root
from spikeprompt.evaluation.scores import headroom, read_scores
from spikeprompt.stages import RUN

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]
TINY = {
    "backbones": {"names": ["pocket_vit"]},
    "datasets": {"sprites_position": {"n_train": 64, "n_val": 32, "n_test": 48}},
    "train": {"seeds": [0, 1], "epochs": 1, "head_c": [0.01]},
    "robustness": {
        "sigmas": [0.1],
        "corruptions": ["shot_noise"],
        "severities": [1],
        "attacks": {"fgsm": [0.02]},
        "attacked_images": 16,
        "faults": {"bit_flips": [0.1]},
    },
    "methods": {
        "no_prompt": None,
        "lorsp": {"LoRSP-K1": {"rank": 1}, "LoRSP-K2": {"rank": 2}},
        "spike_nvpt": None,
        "full_finetuning": None,
        "tint": None,  # made from the template
    },
}


def call(folder, *command, cores="1"):
    "Run a command in the copy, with the copy's own code; on one core, stages start no processes of their own."
    environment = {**os.environ, "PYTHONPATH": str(folder), "LOKY_MAX_CPU_COUNT": cores}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def params(folder, **groups):
    "Write the copy's params.yaml."
    (folder / "params.yaml").write_text(yaml.safe_dump({**TINY, **groups}, sort_keys=False))


def state(folder):
    "Everything that the pipeline wrote for git."
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "results").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "What git knows or would know, and a method made from the template, in a repository of their own, after one `dvc repro`."
    folder, root = tmp_path_factory.mktemp("copy"), project_root()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    shutil.rmtree(folder / "results", ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    notebook = (folder / "nbs/template_method.ipynb").read_text().replace("# template: ", "")
    (folder / "nbs/methods/33_tint.ipynb").write_text(notebook)
    params(folder)
    for command in ["nbdev-export"], ["dvc", "repro"]:
        done = call(folder, *command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done


def test_the_score_table_has_a_row_for_each_run_and_condition(copy):
    folder, _ = copy
    table = read_scores([*TINY["methods"], "raw_pixels"], folder / "results/scores")
    runs = table.groupby(RUN)
    assert set(runs.size().groupby("variant").first().items()) == {
        ("no prompt", 4),
        ("LoRSP-K1", 4),
        ("LoRSP-K2", 4),
        ("Spike-NVPT", 5),
        ("full fine-tuning", 4),
        ("Tint", 4),
        ("raw pixels", 1),
    }  # only Spike-NVPT has bits to flip
    assert set(table.mapping) == {"label", "linear"} and set(table[table.variant == "Spike-NVPT"].placement) == {"tokens"}
    assert set(table[table.variant == "Spike-NVPT"].corruption) == {"clean", "gaussian", "shot_noise", "fgsm", "bit_flips"}
    assert (table[table.variant == "LoRSP-K2"].prompt_parameters == 3 * 2 * 64).all()
    first = table[table.kind != "attack"]
    assert (first.correct.map(len) == 48).all() and (first.correct.map(lambda bits: bits.mean()) - first.accuracy).abs().max() < 1e-6
    means = table[table.variant == "no prompt"].groupby(["mapping", "kind"]).accuracy.mean()
    assert means["linear", "clean"] > 2 / 16  # twice chance, with 64 images to learn from
    metrics = json.loads((folder / "results/metrics.json").read_text())
    for mapping in "label", "linear":
        assert metrics[mapping]["sprites_position"]["no prompt"]["clean"] == pytest.approx(100 * means[mapping, "clean"], abs=0.01)


def test_verdicts_can_be_traced_to_the_scores(copy):
    folder, _ = copy
    compared = pd.read_csv(folder / "results/verdicts.csv")
    table = read_scores([*TINY["methods"]], folder / "results/scores")
    counts = headroom(table).groupby("mapping").counts.any()
    clean = table[table.kind == "clean"].groupby(["mapping", "variant"]).accuracy.mean()
    assert set(compared.mapping) == {"label", "linear"}
    rows = compared[(compared.variant == "LoRSP-K2") & (compared.reference == "no prompt") & (compared.images == "clean")]
    for row in rows.itertuples():
        difference = clean[row.mapping, "LoRSP-K2"] - clean[row.mapping, "no prompt"]
        assert (row.verdict == "no headroom") == (not counts[row.mapping])
        assert not counts[row.mapping] or row.difference == pytest.approx(100 * difference, abs=0.01)
    report = (folder / "results/report.ipynb").read_text()
    assert len(rows) == 2 and all(verdict in report for verdict in compared.verdict.unique())


def test_the_report_reads_and_describes_only_what_was_run(copy):
    folder, _ = copy
    cells = json.loads((folder / "results/report.ipynb").read_text())["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    said = json.dumps(outputs)
    assert "LoRSP-K2" in said and "ogistic regression on raw pixels" in said and "Spike-NVPT" in said
    assert "LoR-VP" not in said and "2203.12119" not in said
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    for name in "pareto", "robustness", "differences", "prompts":
        for mapping in "label", "linear":
            stem = f"figures/{mapping}-sprites_position-{name}"
            assert (folder / f"results/{stem}.svg").stat().st_size > 1000 and f"{stem}.svg" in said


def test_a_second_repro_runs_the_check_alone(copy):
    folder, _ = copy
    again = call(folder, "dvc", "repro")
    assert again.returncode == 0 and again.stdout.count("Running stage") == 1 and "Running stage 'check'" in again.stdout


def test_prose_and_docstrings_make_nothing_stale_and_a_constant_the_right_stages(copy):
    folder, _ = copy

    def stale():
        assert call(folder, "dvc", "repro", "check").returncode == 0
        names = json.loads(call(folder, "dvc", "status", "--json").stdout)  # those of experiments have a path
        return {name.split("@")[0] for name in names if ":" not in name} - {"check"}

    loop, notebook = folder / "spikeprompt/training/loop.py", folder / "nbs/pipeline/102_train.ipynb"
    code, cells = loop.read_text(), notebook.read_text()
    try:
        loop.write_text(
            code.replace('"Train prompt and linear head, or the prompt alone', '"Train both, or under one protocol the prompt alone')
        )
        notebook.write_text(cells.replace("# Train one method", "# How one method is trained"))
        assert loop.read_text() != code and notebook.read_text() != cells and stale() == set()
        loop.write_text(code.replace("[:256]", "[:128]"))
        assert stale() == {"train"}  # and what is made of it, once it has run
    finally:
        loop.write_text(code), notebook.write_text(cells)
    assert stale() == set()


def test_a_forced_stage_on_more_cores_writes_the_same_bytes(copy):
    folder, _ = copy
    before, lock = state(folder), (folder / "dvc.lock").read_bytes()
    forced = call(folder, "dvc", "repro", "-f", "-s", "train@spike_nvpt", "evaluate@spike_nvpt", "figures", "report", cores="2")
    assert forced.returncode == 0, forced.stdout[-2000:] + forced.stderr[-2000:]
    assert state(folder) == before and (folder / "dvc.lock").read_bytes() == lock


def test_figures_are_made_of_what_is_in_git(copy):
    folder, _ = copy
    before = state(folder)
    for name in "train", "prepared":
        (folder / f"runs/{name}").rename(folder / f"runs/{name}-away")
    try:
        drawn = call(folder, "dvc", "repro", "-f", "-s", "figures")
    finally:
        for name in "train", "prepared":
            (folder / f"runs/{name}-away").rename(folder / f"runs/{name}")
    assert drawn.returncode == 0, drawn.stdout[-2000:] + drawn.stderr[-2000:]
    assert state(folder) == before


@pytest.mark.parametrize("method, variants", [("spike_nvpt", {"Spike-NVPT": {"num_tokens": 3}}), ("vpt", None)], ids=["changed", "new"])
def test_a_changed_or_a_new_method_runs_alone(copy, method, variants):
    folder, _ = copy
    params(folder, methods={**TINY["methods"], method: variants})
    assert call(folder, "dvc", "repro", "check").returncode == 0
    stale = json.loads(call(folder, "dvc", "status", "--json").stdout)
    params(folder)
    assert call(folder, "dvc", "repro", "check").returncode == 0
    assert {name for name in stale if name.startswith("train")} == {f"train@{method}"}


def test_dvc_exp_run_changes_a_value(copy):
    folder, _ = copy
    for command in ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "all"]:
        subprocess.run(["git", *command], cwd=folder, check=True)
    tried = call(folder, "dvc", "exp", "run", "evaluate@lorsp", "-S", "robustness.severities=[2]", "-S", "robustness.sigmas=[0.2]")
    assert tried.returncode == 0, tried.stdout[-2000:] + tried.stderr[-2000:]
    assert "Running stage 'evaluate@lorsp'" in tried.stdout and "Running stage 'train" not in tried.stdout
    table = read_scores(["lorsp"], folder / "results/scores")
    assert set(table[table.kind == "noise"].groupby("corruption").severity.first().items()) == {("gaussian", 0.2), ("shot_noise", 2.0)}


@pytest.mark.parametrize(
    "groups, said",
    [
        ({"backbones": {"names": ["pocket_resnt"]}}, "backbone 'pocket_resnt': allowed are pocket_resnet"),
        ({"train": {"epochs": "six"}}, "train.epochs = 'six': input should be a valid integer"),
    ],
)
def test_a_wrong_value_stops_before_any_training(copy, groups, said):
    folder, _ = copy
    kept, before = (folder / "params.yaml").read_text(), state(folder)
    params(folder, **groups)
    refused = call(folder, "dvc", "repro")
    (folder / "params.yaml").write_text(kept)
    assert refused.returncode != 0 and "Running stage 'train" not in refused.stdout
    lines = [line for line in refused.stderr.splitlines() if line.startswith("params.yaml: ")]
    assert len(lines) == 1 and said in lines[0]
    assert state(folder) == before


def test_a_method_made_from_the_template_appears_in_tables_figures_and_site(copy):
    folder, _ = copy
    assert "Tint" in set(pd.read_csv(folder / "results/verdicts.csv").variant)
    assert (
        "Tint" in (folder / "results/report.ipynb").read_text()
        and "Tint" in (folder / "results/figures/label-sprites_position-pareto.svg").read_text()
    )
    gathered = call(folder, sys.executable, "tools/docs.py", "--gather")
    assert gathered.returncode == 0, gathered.stderr
    assert "strength" in (folder / "build/site/source/reference/spikeprompt.methods.tint.md").read_text()


def test_tuned_values_reach_the_runs_that_take_them(copy):
    folder, _ = copy
    searched = {"train": {**TINY["train"], "seeds": [7], "mappings": ["label"]}, "methods": {"no_prompt": None, "lorsp": None}}
    tune = {"trials": 3, "space": {"lorsp": {"lr": [0.01, 1.0]}}}
    (folder / "experiments/tuning/params.yaml").write_text(yaml.safe_dump({**TINY, **searched, "tune": tune}))
    done = call(folder, "dvc", "repro", "experiments/tuning/dvc.yaml")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = pd.read_csv(folder / "experiments/tuning/results/lorsp.csv")
    assert len(table) == 3 and table.lr.between(0.01, 1).all() and table.val_accuracy.between(0, 1).all()

    def records(**groups):
        params(folder, **groups)
        assert call(folder, "dvc", "repro", "check").returncode == 0
        return {path.stem: path.read_text() for path in (folder / "runs/stages").glob("train-*.json")}

    searched = {"train": {**TINY["train"], "mappings": ["label"]}}
    tuned = records(**searched, tuned={"folder": "experiments/tuning/results", "like": {"LoRSP-K2": "LoRSP"}})
    plain = records(**searched)
    assert {name for name in plain if plain[name] != tuned[name]} == {"train-lorsp"}
    values = json.loads(tuned["train-lorsp"])["config"]["tuned"]["values"]["label"]["pocket_vit"]
    assert values["LoRSP-K2"]["lr"] in set(table.lr[table.val_accuracy == table.val_accuracy.max()]) and "LoRSP-K1" not in values
