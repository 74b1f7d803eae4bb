import csv
import json

import pyarrow.parquet as pq
import pytest
from synthetic_run import GRID, write_synthetic_run

from legato.common.errors import UsageError
from legato.results.ablation_table import ablation_table, write_ablation
from legato.results.saved_run import SavedRun


@pytest.fixture
def run(tmp_path):
    return write_synthetic_run(tmp_path / "run_1", grid=True, sweep=True, seeds=2)


def test_a_row_per_arm_with_its_recipe_and_its_numbers(run):
    path = write_ablation(run)
    assert path == run / "ablation.parquet"
    metrics = json.loads((run / "metrics.json").read_text())
    rows = {row["arm"]: row for row in pq.read_table(path).to_pylist()}
    assert list(rows) == list(metrics)
    for name, row in rows.items():
        assert row["fvu"] == metrics[name]["core"]["fvu"]
        assert row["kappa1_excess_within"] == metrics[name]["consistency"]["kappa1_excess_within"]
        assert row["training_steps"] == 1200
        assert row["training_tokens"] == 2_400_000
    members = {(row["window"], row["coefficient"]) for row in rows.values() if row["role"] == "grid"}
    assert members == set(GRID)
    assert (rows["baseline"]["term"], rows["baseline"]["window"], rows["baseline"]["k"]) == (None, None, 32)
    assert (rows["baseline_k16"]["role"], rows["baseline_k16"]["k"]) == ("sweep", 16)
    assert (rows["contrastive_seed1"]["role"], rows["contrastive_seed1"]["seed"]) == ("named", 1)


def test_the_csv_holds_the_same(run):
    path = write_ablation(run)
    with path.with_suffix(".csv").open() as lines:
        rows = list(csv.DictReader(lines))
    table = pq.read_table(path)
    assert list(rows[0]) == table.column_names
    for row, expected in zip(rows, table.to_pylist(), strict=True):
        assert row["arm"] == expected["arm"]
        assert float(row["fvu"]) == expected["fvu"]
        assert row["window"] == ("" if expected["window"] is None else str(expected["window"]))


def test_what_was_not_saved_is_null(run):
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["baseline"]["core"]["ce_loss_score"], metrics["baseline"]["position"]
    metrics["baseline"]["training"]["recipe"]["sparsity"] = {"type": "Hysteresis", "k": 32, "release": 0.5}
    (run / "metrics.json").write_text(json.dumps(metrics))
    first = ablation_table(SavedRun.open(run)).to_pylist()[0]
    assert (first["ce_loss_score"], first["eta2_mean"]) == (None, None)
    assert (first["sparsity"], first["release"]) == ("Hysteresis", 0.5)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no metrics\.json"):
        write_ablation(tmp_path)
    assert list(tmp_path.iterdir()) == []
