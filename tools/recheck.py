"""After a change of code that cannot change results: train and test some runs anew and, if they are equal, record the present code.

`uv run python tools/recheck.py [experiment ...]`: folders with a dvc.yaml; the one at the top if none is named. Of every variant of every
stale stage one run is drawn and compared with its rows of the committed score table, to the bit (of a search: the first trial of one
backbone for each protocol); the verdicts are computed again. Where anything differs, dvc.lock stays as it is, and `dvc repro` is what is
needed. Trained prompts, which are not in git, need not be there.
"""

import os
import platform
import random
import subprocess
import sys
import tempfile
from hashlib import md5
from pathlib import Path

import pandas as pd
import yaml
from dvc.utils.serialize import modify_yaml
from pandas.testing import assert_frame_equal

from spikeprompt.engine import INPUTS, X86, _parse, _write_out, import_closure

os.environ.update(INPUTS | (X86 if platform.machine() in ("x86_64", "AMD64") else {}))  # as in a stage, before torch is imported
from spikeprompt.evaluation.evaluate import evaluate_run
from spikeprompt.evaluation.scores import read_scores, write_scores
from spikeprompt.evaluation.statistics import compare, pairs, questions
from spikeprompt.prompts.base import method_class
from spikeprompt.stages import COORDINATES, RUN, all_runs, read_stage, read_tables, write_table
from spikeprompt.training.parallel import run_parallel
from spikeprompt.training.runs import train_run
from spikeprompt.training.search import tune

ROOT = Path(__file__).parent.parent
NOTEBOOKS = "nbs/pipeline/102_train.ipynb", "nbs/pipeline/103_evaluate.ipynb", "nbs/pipeline/104_figures.ipynb"


def stale(folder: Path, runs: str) -> dict[str, str]:  # stage -> its file, relative to the project
    "The stages whose file is no longer the recorded one."
    recorded = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    files = {name: dep for name, stage in recorded.items() for dep in stage.get("deps", []) if dep["path"].startswith(f"{runs}/stages/")}
    changed = lambda dep: (ROOT / dep["path"]).is_file() and md5((ROOT / dep["path"]).read_bytes()).hexdigest() != dep["md5"]
    return {name: dep["path"] for name, dep in files.items() if changed(dep)}


def anew(train: str, test: str, run: tuple, prepared: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    "The rows of one run in the tables of scores and of losses, trained and tested with the present code."
    with tempfile.TemporaryDirectory() as folder:
        _, history = train_run(read_stage(train), run, f"{prepared}/train", folder)
        write_table(history, Path(folder) / "history.csv.gz")
        write_scores(pd.DataFrame(evaluate_run(read_stage(test), run, f"{prepared}/test", folder)), Path(folder) / "run.csv.gz")
        return read_scores(["run"], folder), read_tables(["history"], folder)


def check_rows(method: str, runs: str, results: str):
    "Compare one run of each variant with the committed table; raises `AssertionError`."
    stages = [f"{runs}/stages/{kind}-{method}.json" for kind in ("train", "evaluate")]
    drawn = {}
    for run in random.Random(0).sample(listed := all_runs(read_stage(stages[0])), len(listed)):
        drawn.setdefault(run[4], run)
    tables = read_scores([method], f"{results}/scores"), read_tables([method], f"{results}/history")
    for run, both in zip(drawn.values(), run_parallel(anew, [(*stages, run, f"{runs}/prepared") for run in drawn.values()])):
        for table, found in zip(tables, both):
            rows = table[(table[RUN] == list(run)).all(axis=1)].dropna(axis=1, how="all").reset_index(drop=True)
            found = found.dropna(axis=1, how="all")[rows.columns]
            assert_frame_equal(found, rows, check_exact=True, check_dtype=False, obj=f"{results}: {run}")
    print(f"{results}: {method}: {len(drawn)} runs are equal", flush=True)


def check_trials(method: str, stage: str, prepared: str, path: Path):
    "Compare the first trial of one search of each protocol with the committed table; raises `AssertionError`."
    table, config = pd.read_csv(path), read_stage(stage)
    drawn = table[table.trial == 0].sample(frac=1, random_state=0).drop_duplicates("mapping")
    jobs = [(config, prepared, *place, 1) for place in drawn[COORDINATES].itertuples(index=False)]
    found = pd.concat(run_parallel(tune, jobs), ignore_index=True)
    assert found.to_csv(index=False, float_format="%.6g") == drawn.to_csv(index=False, float_format="%.6g"), f"{path}: other accuracies"
    print(f"{path.relative_to(ROOT)}: {len(drawn)} trials are equal", flush=True)


def check_figures(folder: Path, stage: str, results: str):
    "Compare the verdicts, and the meaning of what draws figures with that of the commit of the lock; raises `AssertionError`."
    config = read_stage(stage)
    references = {method: method_class(method).reference for method in config.methods}
    compared = compare(
        read_scores(list(config.methods), f"{results}/scores"),
        pairs(config.methods, references),
        questions=questions(config.methods, references),
    )
    text = compared.to_csv(index=False, float_format="%.4g")
    assert text == (ROOT / results / "verdicts.csv").read_text(), f"{results}/verdicts.csv: other verdicts"
    git = lambda *words: subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout
    commit, meaning = git("log", "-1", "--format=%H", "--", "dvc.lock").strip(), lambda code: _write_out(_parse(code))
    *others, drawing = (set(import_closure(notebook)) for notebook in NOTEBOOKS)
    for module in sorted(drawing - set.union(*others)):
        path = f"{module.replace('.', '/')}.py"
        unchanged = meaning(git("show", f"{commit}:{path}")) == meaning((ROOT / path).read_text())
        assert unchanged, f"{path} has changed since {commit[:7]}: figures have to be drawn"


def recheck(folder: Path):
    "Check one experiment and record the present code; raises `AssertionError`."
    dvc = lambda *words: subprocess.run([sys.executable, "-m", "dvc", *words, "-q"], cwd=folder, check=True)
    places = yaml.safe_load((folder / "dvc.yaml").read_text())["vars"][0]
    runs, results = places.get("runs", f"runs/{folder.name}"), places.get("results", f"{folder.relative_to(ROOT)}/results")
    dvc("repro", "-s", "check")
    dvc("repro", "-s", "prepare")
    found = stale(folder, runs)
    for method in sorted({name.partition("@")[2] for name in found if "@" in name}):
        if f"tune@{method}" in found:
            check_trials(method, found[f"tune@{method}"], f"{runs}/prepared/train", ROOT / results / f"{method}.csv")
        else:
            check_rows(method, runs, results)
    if "figures" in found:
        check_figures(folder, found["figures"], results)
    with modify_yaml(folder / "dvc.lock") as lock:
        for name, path in found.items():
            if name != "report":  # is run
                content = (ROOT / path).read_bytes()
                dep = next(dep for dep in lock["stages"][name]["deps"] if dep["path"] == path)
                dep |= {"md5": md5(content).hexdigest(), "size": len(content)}
    if "report" in found:
        dvc("repro", "-s", "report", "reproduced")
    print(f"{folder.relative_to(ROOT)}: {len(found)} stages recorded")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["."]:
        try:
            recheck((ROOT / name).resolve())
        except AssertionError as error:
            raise SystemExit(f"{error}\n{name}: dvc.lock stays as it is; `dvc repro` there") from None
