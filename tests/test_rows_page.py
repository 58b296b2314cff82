"""The page of rows: its content against the files of scores, and its commands, which are run."""

import html
import json
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bl_trainer.cli import main
from bl_trainer.diagnosis import rows_page, score_files
from bl_trainer.diagnosis.rows_page import CUTS, ScoredRows, cuts_of
from bl_trainer.diagnosis.rows_page import rows_page as page_of
from bl_trainer.diagnosis.score_files import Shard
from conftest import write_recipe
from test_diagnosis import rows_of, save

LONG = {"prompt": "a" * 60, "completion": "b" * 90 + "</script><b>&" + "c" * 30}


@pytest.fixture(scope="module")
def home(checkpoint, tmp_path_factory):
    """A folder with a recipe of 30 rows, their scores and a report with the page."""
    folder = tmp_path_factory.mktemp("my rows")
    save([*rows_of("pairs", 28), LONG, {"prompt": "b" * 200, "completion": "c"}], folder / "data")
    keys = {"dtype": "auto", "learning_rate": 1e-3, "disable_tqdm": True, "max_length": 200}
    recipe = write_recipe(folder, checkpoint, folder / "data", **keys)
    argv = ["diagnose", "--config", str(recipe), "--scores", str(folder / "scores"), "--report", str(folder / "report")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_files, "FEWEST", 16)
        patch.setattr(rows_page, "SHOWN", 25)
        main([*argv, "--noise_steps", "3", "--tokens"])
    return folder


def data_of(folder):
    """The page's text and its data."""
    text = (folder / "report" / "rows.html").read_text()
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_shows_the_rows_of_the_highest_scores(home, tokenizer):
    text, data = data_of(home)
    scores = pandas.read_parquet(home / "scores").sort_values("row").reset_index(drop=True)
    ranked = scores[scores["targets"] > 0].sort_values(["noise_score", "row"], ascending=[False, True])
    assert len(ranked) == 29  # one has lost its target
    assert [row["row"] for row in data["rows"]] == ranked["row"].tolist()[:25]
    assert (data["size"], data["tokens"]) == (30, scores["targets"].sum())
    assert "29 of 30 rows have a target and a score. This page shows the 25 with the highest scores" in text
    assert "</script><b>" not in text.split('id="data">')[1].split("</script>")[0]
    for row in data["rows"]:
        its = scores.loc[row["row"]]
        assert row["score"] == pytest.approx(its["noise_score"], abs=1e-4)
        assert row["before"] == pytest.approx(np.exp(its["logp"]).mean(), abs=1e-4)
        assert row["after"] == pytest.approx(np.exp(its["fitted_logp"]).mean(), abs=1e-4)
        start, left = row["cut"]
        ids = its["input_ids"][start : len(its["input_ids"]) - left]
        assert "".join(row["pieces"]) == tokenizer.decode(ids)
        places = [i for i, label in enumerate(its["labels"]) if label != -100]
        shown = [k for k, place in enumerate(places) if start <= place < len(its["input_ids"]) - left]
        wanted = [(1000 * np.exp(each[shown])).round() for each in (its["logp"], its["fitted_logp"])]
        np.testing.assert_allclose([p for p in row["p"] if p is not None], np.array(wanted).T, atol=1)
        assert int(np.argmin(its["fitted_logp"])) in shown
        assert len(ids) <= rows_page.WINDOW
    long = next(row for row in data["rows"] if row["row"] == 28)
    assert sum(long["cut"]) == 60 + 133 + 1 - rows_page.WINDOW


def test_figures_of_all_rows_are_in_a_file(home):
    figures, scores = pandas.read_parquet(home / "report" / "rows.parquet"), pandas.read_parquet(home / "scores")
    assert figures.columns.tolist() == [*rows_page.FIGURES]
    pandas.testing.assert_frame_equal(figures, scores[[*rows_page.FIGURES]])


def test_cuts_drop_what_they_say(home):
    _, data = data_of(home)
    scores = pandas.read_parquet(home / "report" / "rows.parquet")
    assert len(data["cuts"]) == CUTS
    for step, (number, rows, tokens) in enumerate(data["cuts"]):
        above = scores[scores["noise_score"] > number]
        assert (rows, tokens) == (len(above), above["targets"].sum())
        assert rows == 29 * step // 1000


def test_ties_fall_on_one_side():
    cuts = cuts_of(np.array([3.0, 2.0, 2.0, 2.0, 1.0, 0.0]), np.array([1, 2, 3, 4, 5, 6]))
    assert {cut.rows for cut in cuts} == {0, 1}
    assert cuts[0].number >= 3
    assert cuts[-1] == (2.0, 1, 1)


def command(text, name, number):
    """A command of the page, at a cut."""
    return html.unescape(re.search(rf'id={name} data-text="(.*?)"', text, re.DOTALL)[1]).replace("CUT", str(number))


def test_its_commands_run(home, monkeypatch, capsys):
    text, data = data_of(home)
    number, rows, _ = data["cuts"][200]
    assert rows == 5
    monkeypatch.chdir(home)
    program, *argv = shlex.split(command(text, "drop", number))
    assert program == "bl-trainer"
    main([*argv, "--max_steps", "1", "--save_strategy", "no"])
    assert "Rows: 5 of 30 dropped by " in capsys.readouterr().out
    exec(command(text, "weighted", number), {})
    weights = [json.loads(line) for line in (home / "weighted.jsonl").read_text().splitlines()]
    scores = pandas.read_parquet(home / "report" / "rows.parquet")["noise_score"]
    assert [row["objective_weight"] for row in weights] == [0.1 if score > number else 1.0 for score in scores]
    assert [row["prompt"] for row in weights[:28]] == [row["prompt"] for row in rows_of("pairs", 28)]


def test_a_report_links_to_it(home, checkpoint):
    assert '<a href="rows.html">' in (home / "report" / "report.html").read_text()
    argv = ["diagnose", "--config", str(home / "recipe.yaml"), "--report", str(home / "report"), "--overwrite"]
    main(argv)
    assert "rows.html" not in (home / "report" / "report.html").read_text()
    assert not (home / "report" / "rows.html").exists()  # of an earlier report


# Moves the slider to its end, shows the rows around the cut and 50 more, and tells what there is then
READER = """
slider.value = 500
slider.dispatchEvent(new Event("input"))
where.children[1].click()
more.click()
const dropped = [...box.children].filter(each => each.classList.contains("dropped")).length
const shown = [data.rows.length, box.children.length, box.firstChild.place, dropped, more.hidden]
document.title = JSON.stringify([...shown, share.textContent])
"""


def large(folder, tokenizer, size):
    """Write files of scores of random rows, and return them as the page reads them."""
    rng, shards = np.random.default_rng(0), [Shard(start, min(start + 4096, size)) for start in range(0, size, 4096)]
    for shard in shards:
        rows = []
        for number in shard.rows:
            ids, logp, fitted = rng.integers(3, len(tokenizer), 12), *np.log(rng.uniform(0.01, 1, (2, 8)))
            row = {
                "row": number,
                "row_hash": f"{number:016x}",
                "targets": 8,
                "input_ids": ids,
                "labels": [*[-100] * 4, *ids[4:]],
            }
            means = {"mean_p": np.exp(logp).mean(), "mean_logp": logp.mean(), "fitted_mean_logp": fitted.mean()}
            rows.append({**row, **means, "noise_score": -logp.min(), "logp": logp, "fitted_logp": fitted})
        pq.write_table(pa.Table.from_pylist(rows), folder / shard.name)
    return ScoredRows(SimpleNamespace(path=folder, shards=lambda: shards), tokenizer)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's package chromium is not installed")
def test_ten_thousand_rows_in_a_browser(tokenizer, tmp_path):
    scored = large(tmp_path, tokenizer, 10_050)
    table = pa.concat_tables(pq.read_table(tmp_path / shard.name) for shard in scored.folder.shards())
    page = tmp_path / "page.html"
    page.write_text(f"{page_of(scored, table, tmp_path / 'rows.parquet', 'Large')}<script>{READER}</script>")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    *found, said = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert found == [10_000, 100, 5015, 10, False]
    assert "drops 5,025 of 10,050 (50.0 %) rows, 40,200 of 80,400 (50.0 %) target tokens." in said
