"""One pass finds oddities, and the faults that training refuses, with any chunk size."""

import json
import math

import numpy as np
import psutil
import pytest

from energy_flow.config import compose
from energy_flow.data import EnergyDataModule, read_data_settings
from energy_flow.data.inspection import inspect
from energy_flow.data.storage.columns import Column
from energy_flow.data.storage.duplicates import Duplicates
from energy_flow.errors import EnergyFlowError

N, D = 40, 8


@pytest.fixture(params=[1, 7, 1000], ids=lambda rows: f"{rows} rows a chunk")
def chunks(request, monkeypatch):
    monkeypatch.setattr("energy_flow.data.storage.columns._CHUNK_BYTES", 8 * D * request.param)


def splits():
    random = np.random.default_rng(0)
    return {
        split: {side: random.normal(size=(N, D)).astype(np.float32) for side in ("source", "target")}
        for split in ("train", "val", "test")
    }


def settings_of(folder, arrays, *overrides):
    for split, sides in arrays.items():
        np.savez(folder / f"{split}.npz", **sides)
    paths = [f"data.{split}={folder / split}.npz" for split in arrays]
    return read_data_settings(compose("data=files", *paths, *overrides)["data"])


def test_good_data(tmp_path, chunks):
    arrays = splits()
    report = inspect(settings_of(tmp_path, arrays))
    assert report.refused == report.warnings == []
    assert report.num_bytes == 6 * N * D * 4
    assert {found.count for shared in report.shared.values() for found in shared.values()} == {0}
    assert list(report.shared) == [("val", "train"), ("test", "train"), ("test", "val")]
    for split, sides in arrays.items():
        assert (report.splits[split].rows, report.splits[split].dim) == (N, D)
        for side, rows in sides.items():
            norms, found = np.linalg.norm(rows, axis=1), report.splits[split].sides[side]
            expected = norms.min(), np.median(norms), norms.max(), np.sqrt((rows**2).mean())
            assert (found.norm_min, found.norm_median, found.norm_max, found.rms) == pytest.approx(expected, rel=1e-6)


def test_fingerprints_equal_those_of_training(tmp_path, chunks):
    settings = settings_of(tmp_path, splits())
    data = EnergyDataModule(settings)
    data.setup("fit")
    assert {split: found.fingerprint for split, found in inspect(settings).splits.items()} == data.fingerprint


def test_duplicates_and_leaks(tmp_path, chunks, caplog):
    arrays = splits()
    arrays["train"]["source"][30] = arrays["train"]["source"][4]  # a source again, with another target
    for side in ("source", "target"):
        arrays["train"][side][[9, 11]] = arrays["train"][side][2]
        arrays["test"][side][5] = arrays["train"][side][7]
    arrays["val"]["target"][0] = arrays["test"]["target"][1]  # targets may be shared
    arrays["test"]["source"][8] = arrays["train"]["source"][1]
    settings = settings_of(tmp_path, arrays)
    report = inspect(settings)
    assert report.splits["train"].pair_copies == Duplicates(2, 9, 2)
    assert report.splits["train"].sides["source"].copies == Duplicates(3, 9, 2)
    assert report.splits["train"].sides["target"].copies == Duplicates(2, 9, 2)
    assert report.shared["test", "train"] == {
        "source": Duplicates(2, 5, 7),
        "target": Duplicates(1, 5, 7),
        "pair": Duplicates(1, 5, 7),
    }
    assert report.shared["test", "val"]["target"] == Duplicates(1, 1, 0)
    assert report.refused == []
    pairs, leak = report.warnings
    assert "data.train: 2 of 40 pairs are duplicates: row 9 repeats row 2, for example." in pairs
    assert "data.test: 2 of 40 sources are also in data.train (1 of them with the same target): row 5 is row 7" in leak
    EnergyDataModule(settings).setup("fit")
    assert [record.message for record in caplog.records] == report.warnings  # training logs the same


def test_equal_numbers_with_other_scales_are_no_duplicates(tmp_path):
    arrays = {
        "train": {
            **{side: np.ones((2, D), np.int8) for side in ("source", "target")},
            "source_scale": np.array([1, 2], np.float32),
            "target_scale": np.array([1, 1], np.float32),
        }
    }
    found = inspect(settings_of(tmp_path, arrays)).splits["train"]
    assert (found.sides["source"].copies.count, found.sides["target"].copies.count) == (0, 1)


def broken(where, value):
    def change(arrays):
        arrays["val"]["target"][where] = value

    return change


def narrower(arrays):
    arrays["test"] = {side: rows[:, 1:] for side, rows in arrays["test"].items()}


def single(arrays):
    arrays["test"] = {side: rows[:1] for side, rows in arrays["test"].items()}


def without_val(arrays):
    del arrays["val"]


def uneven(arrays):
    arrays["test"]["target"] = arrays["test"]["target"][1:]


REFUSED = {
    "NaN": (broken((7, 2), np.nan), "data.val", "target row 7 holds NaN or Inf"),
    "Inf": (broken((7, 2), -np.inf), "data.val", "target row 7 holds NaN or Inf"),
    "zeros": (broken(7, 0), "data.val", "target row 7 holds only zeros"),
    "dimension": (narrower, "data.test", "dimension 7, but data.train has 8"),
    "one row": (single, "data.test", "1 row; retrieval needs at least 2"),
    "no val": (without_val, "data.val = null", "fit needs it"),
    "uneven": (uneven, "data.test", "target has 39 rows, source 40"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_faults_have_the_messages_of_training(tmp_path, chunks, case):
    change, *parts = REFUSED[case]
    arrays = splits()
    change(arrays)
    settings = settings_of(tmp_path, arrays)
    report = inspect(settings)
    with pytest.raises(EnergyFlowError) as caught:
        EnergyDataModule(settings).setup("fit")
    assert str(caught.value) == report.refused[0]
    assert all(part in report.refused[0] for part in parts)


def test_all_faults_are_listed_at_once(tmp_path):
    arrays = splits()
    arrays["val"]["target"][7, 2] = np.nan
    arrays["val"]["source"][3] = 0
    settings = settings_of(tmp_path, arrays, f"data.train={tmp_path}/none.npz", "data.dimension=9")
    refused = "\n".join(inspect(settings).refused)
    assert "no such file" in refused
    assert refused.count("data.dimension = 9") == 2
    refused = inspect(settings_of(tmp_path, arrays)).refused
    assert [line.split(" holds ")[0][-12:] for line in refused] == ["source row 3", "target row 7"]


def test_oddities(tmp_path, chunks):
    arrays = splits()
    arrays["train"]["source"][20] *= 1000
    arrays["train"]["source"][30] *= 0.001
    arrays["val"]["source"][2] = 0
    for split in ("train", "val"):
        arrays[split]["target"][:, [3, 4]] = 0.5
    arrays["test"]["target"] *= 30
    report = inspect(settings_of(tmp_path, arrays, "data.normalize=false"))
    assert report.refused == []
    far, constant, train_scale, zero, scale = report.warnings
    assert "data.train: source: rows more than 10 times longer or shorter" in far
    assert far.endswith(": 2, the first is row 20")
    assert constant == "data.train, data.val: target: columns with the same number in every row: 2 (3, 4)"
    assert train_scale.startswith("data.train: source and target have different scales")
    assert zero == "data.val: source: rows with only zeros: 1"
    assert scale.startswith("data.test: source and target have different scales: root mean squares 1")
    # Normalised rows have length 1, so the scale of the stored numbers does not matter.
    arrays["val"]["source"][2] = 1
    assert not any("scales" in warning for warning in inspect(settings_of(tmp_path, arrays)).warnings)


def test_the_report_is_plain_json(tmp_path):
    arrays = splits()
    arrays["val"]["target"][:] = np.nan
    report = inspect(settings_of(tmp_path, arrays))
    assert math.isnan(report.splits["val"].sides["target"].norm_median)
    plain = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert plain["splits"]["val"]["sides"]["target"]["norm_median"] is None
    assert plain["splits"]["val"]["sides"]["target"]["not_finite"] == N
    assert plain["fine"] is False
    assert plain["shared"]["test, train"]["source"] == {"count": 0, "row": None, "of": None}


def test_generated_data_are_inspected_too():
    small = ("data.train=50", "data.val=20", "data.test=20", "data.width=6", "data.height=5", "data.waves=3")
    report = inspect(read_data_settings(compose("data=transport", *small)["data"]))
    assert report.refused == []
    assert {split: found.rows for split, found in report.splits.items()} == {"train": 50, "val": 20, "test": 20}
    assert report.splits["train"].dim == 30


def test_memory_is_bounded_by_a_chunk(tmp_path, monkeypatch):
    rows, dim = 60_000, 500  # 120 MB a side
    for side in ("source", "target"):
        stored = np.lib.format.open_memmap(tmp_path / f"{side}.npy", "w+", np.float32, (rows, dim))
        stored[:] = np.random.default_rng(0).standard_normal(dim, np.float32)
        stored[:, 0] = np.arange(rows)
        del stored
    paths = f"[{tmp_path}/source.npy,{tmp_path}/target.npy]"
    settings = read_data_settings(compose("data=files", f"data.train={paths}", f"data.val={paths}")["data"])
    process, release, seen = psutil.Process(), Column._release, []

    def watched(column):
        seen.append(process.memory_info().rss)
        release(column)

    monkeypatch.setattr(Column, "_release", watched)
    before = process.memory_info().rss
    assert inspect(settings).shared["val", "train"]["pair"].count == rows
    assert len(seen) > 10
    assert max(seen) - before < 200e6  # of 480 MB
