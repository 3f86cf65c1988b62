"""All formats give the same batches. Files are memory-mapped if possible."""

import mmap
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from energy_flow.data import PairDataset

N, D = 37, 5


def numbers(dtype=np.float32, rows=N, dim=D):
    random = np.random.default_rng(7)
    return {name: random.normal(size=(rows, dim)).astype(dtype) for name in ("source", "target")}


def write(folder: Path, form: str, arrays: dict[str, np.ndarray], stem: str = "pairs"):
    """Write `arrays`. Returns the path or paths for the config."""
    path = folder / f"{stem}.{form.split('-')[0]}"
    if form == "safetensors":
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    elif form == "npz":
        np.savez(path, **arrays)
    elif form == "npz-compressed":
        np.savez_compressed(path, **arrays)
    else:
        paths = [folder / f"{stem}_{name}.npy" for name in ("source", "target")]
        for name, target in zip(("source", "target"), paths, strict=True):
            np.save(target, arrays[name])
        return [str(target) for target in paths]
    return str(path)


def expected(array: np.ndarray, normalize: bool) -> np.ndarray:
    exact = array.astype(np.float32).astype(np.float64)
    return exact / np.sqrt((exact**2).sum(1, keepdims=True)) if normalize else exact


FORMS = ["safetensors", "npz", "npz-compressed", "npy"]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS)
def test_float_files_give_the_rows_that_were_written(tmp_path, form, dtype, normalize):
    arrays = numbers(dtype)
    dataset = PairDataset(write(tmp_path, form, arrays), normalize)
    rows = [3, 36, 0, 3]
    batch = dataset.__getitems__(rows)
    assert (len(dataset), dataset.dim) == (N, D)
    assert batch["row"].dtype == torch.int64
    assert batch["row"].tolist() == rows
    for name in ("source", "target"):
        assert batch[name].dtype == torch.float32
        # one rounding to float32 of a value of at most 5
        np.testing.assert_allclose(batch[name].numpy(), expected(arrays[name], normalize)[rows], rtol=1.2e-7)


@pytest.mark.parametrize("form", ["safetensors", "npz", "npz-compressed"])
def test_int8_rows_are_scaled(tmp_path, form):
    random = np.random.default_rng(1)
    arrays = {name: random.integers(-127, 128, (N, D)).astype(np.int8) for name in ("source", "target")}
    scales = {f"{name}_scale": random.uniform(0.001, 0.1, N).astype(np.float32) for name in arrays}
    dataset = PairDataset(write(tmp_path, form, {**arrays, **scales}), normalize=False)
    source, target = dataset.all()
    np.testing.assert_array_equal(source.numpy(), arrays["source"] * scales["source_scale"][:, None])
    np.testing.assert_array_equal(target.numpy(), arrays["target"] * scales["target_scale"][:, None])
    assert dataset.description == "stored as int8 with row scales, not normalised, without names"


def test_bfloat16_is_read_exactly(tmp_path):
    tensors = {name: torch.randn(N, D).bfloat16() for name in ("source", "target")}
    save_file(tensors, tmp_path / "pairs.safetensors")
    source, target = PairDataset(tmp_path / "pairs.safetensors", normalize=False).all()
    assert torch.equal(source, tensors["source"].float())
    assert torch.equal(target, tensors["target"].float())


def test_column_major_and_big_endian_npy(tmp_path):
    arrays = numbers()
    np.save(tmp_path / "a.npy", np.asfortranarray(arrays["source"]))
    np.save(tmp_path / "b.npy", arrays["target"].astype(">f4"))
    source, target = PairDataset((tmp_path / "a.npy", tmp_path / "b.npy"), normalize=False).all()
    np.testing.assert_array_equal(source.numpy(), arrays["source"])
    np.testing.assert_array_equal(target.numpy(), arrays["target"])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    rows=st.integers(1, 40),
    dim=st.integers(1, 9),
    data=st.data(),
)
def test_rows_batches_and_all_rows_agree(tmp_path, form, dtype, rows, dim, data):
    dataset = PairDataset(write(tmp_path, form, numbers(dtype, rows, dim)), normalize=True)
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20))
    batch, whole = dataset.__getitems__(picked), dataset.all()
    for side, name in enumerate(("source", "target")):
        assert torch.equal(batch[name], whole[side][picked])
        assert torch.equal(batch[name], torch.stack([dataset[row][name] for row in picked]))


@pytest.mark.parametrize("form", ["safetensors", "npz", "npy"])
def test_uncompressed_files_are_mapped_not_loaded(tmp_path, form):
    dataset = PairDataset(write(tmp_path, form, numbers()), normalize=True)
    for column in (dataset._source, dataset._target):
        values, _ = column.arrays()
        assert isinstance(values, np.memmap)
        assert isinstance(values._mmap, mmap.mmap)
        assert not values.flags.writeable


def test_batches_are_copies(tmp_path):
    dataset = PairDataset(write(tmp_path, "npy", numbers()), normalize=False)
    first = dataset[0]["source"]
    first.fill_(9)
    assert not torch.equal(dataset[0]["source"], first)


def test_rows_of_extreme_length_are_normalised(tmp_path):
    arrays = numbers()
    arrays["source"][0] *= 1e37  # its square overflows float32
    arrays["source"][1] *= 1e-40  # its square vanishes in float32
    source, _ = PairDataset(write(tmp_path, "npy", arrays), normalize=True).all()
    torch.testing.assert_close(source.norm(dim=1), torch.ones(N))


def test_the_fingerprint_depends_on_the_numbers_alone(tmp_path):
    arrays = numbers()
    prints = {PairDataset(write(tmp_path, form, arrays), normalize=True).fingerprint for form in FORMS}
    assert len(prints) == 1
    swapped = {"source": arrays["target"], "target": arrays["source"]}
    assert PairDataset(write(tmp_path, "npy", swapped), normalize=True).fingerprint not in prints
    arrays["target"][-1, -1] = np.nextafter(arrays["target"][-1, -1], np.float32(9))
    assert PairDataset(write(tmp_path, "npz", arrays), normalize=True).fingerprint not in prints


@pytest.mark.parametrize("form", FORMS)
def test_a_pickled_data_set_has_no_rows_and_reads_the_same(tmp_path, form):
    arrays = numbers(rows=2000, dim=16)
    dataset = PairDataset(write(tmp_path, form, arrays), normalize=True)
    sent = pickle.dumps(dataset)
    assert len(sent) < arrays["source"].nbytes / 10
    assert torch.equal(pickle.loads(sent).all()[1], dataset.all()[1])  # noqa: S301 - our own bytes


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same_rows(tmp_path, method):
    dataset = PairDataset(write(tmp_path, "safetensors", numbers()), normalize=True)
    loader = DataLoader(dataset, 10, collate_fn=dict, num_workers=2, multiprocessing_context=method)
    batches = list(loader)
    assert [len(batch["row"]) for batch in batches] == [10, 10, 10, 7]
    for side, name in enumerate(("source", "target")):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), dataset.all()[side])


def test_indexing_follows_the_rules_of_a_sequence(tmp_path):
    dataset = PairDataset(write(tmp_path, "npy", numbers()), normalize=True)
    assert dataset[-1]["row"].item() == N - 1
    assert dataset[2]["source"].shape == (D,)
    with pytest.raises(IndexError):
        dataset[N]


def test_paths_are_relative_to_the_current_folder_or_home(tmp_path, monkeypatch):
    write(tmp_path, "npz", numbers())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = PairDataset("pairs.npz", normalize=True)
    monkeypatch.chdir("/")
    assert len(dataset.all()[0]) == N
    assert PairDataset("~/pairs.npz", normalize=True).files == (tmp_path / "pairs.npz",)


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ('{{"id": {i}, "headword": "w{i}", "text": "no"}}', "w{i}"),
        ('{{"word": "v{i}", "text": "t\\u2028{i}"}}', "t\u2028{i}"),
        ('{{"id": {i}}}', "{i}"),
    ],
)
def test_a_jsonl_with_the_same_stem_names_the_rows(tmp_path, lines, named):
    path = write(tmp_path, "safetensors", numbers())
    (tmp_path / "pairs.jsonl").write_text("".join(lines.format(i=i) + "\n" for i in range(N)), encoding="utf-8")
    assert PairDataset(path, normalize=True).names == [named.format(i=i) for i in range(N)]


def test_names_of_two_npy_come_from_the_target_first(tmp_path):
    paths = write(tmp_path, "npy", numbers())
    assert PairDataset(paths, normalize=True).names is None
    for side in ("source", "target"):
        (tmp_path / f"pairs_{side}.jsonl").write_text("\n".join(f'{{"name": "{side}{i}"}}' for i in range(N)))
        assert PairDataset(paths, normalize=True).names[3] == f"{side}3"
