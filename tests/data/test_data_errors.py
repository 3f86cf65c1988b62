"""Bad files end in a DataError of a few lines that names key, file, fault and remedy."""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from energy_flow.data import PairDataset
from energy_flow.errors import DataError

N, D = 6, 4


@pytest.fixture
def good():
    random = np.random.default_rng(0)
    return {name: random.normal(size=(N, D)).astype(np.float32) for name in ("source", "target")}


def refused(path, *parts, normalize=True):
    with pytest.raises(DataError) as caught:
        PairDataset(path, normalize, "data.val")
    message = str(caught.value)
    assert message.startswith("data.val: ")
    assert message.count("\n") < 4
    for part in parts:
        assert part in message, message
    return message


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "pairs.npz", **arrays)
    return tmp_path / "pairs.npz"


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "npy"])
@pytest.mark.parametrize(
    ("content", "part"), [(None, "no such file"), (b"", "is empty"), (b"word;1.0;2.0\n" * 40, "or truncated")]
)
def test_missing_empty_and_text(tmp_path, suffix, content, part):
    path = tmp_path / f"pairs.{suffix}"
    if content is not None:
        path.write_bytes(content)
    refused([path, path] if suffix == "npy" else path, str(path), part)


@pytest.mark.parametrize("keep", [0.02, 0.4, 0.99])
@pytest.mark.parametrize("form", ["safetensors", "npz", "npz-compressed", "npy"])
def test_truncated(tmp_path, good, form, keep):
    path = tmp_path / f"pairs.{form.split('-')[0]}"
    if form == "safetensors":
        save_file({name: torch.from_numpy(array) for name, array in good.items()}, path)
    elif form == "npy":
        np.save(path, good["source"])
    else:
        (np.savez if form == "npz" else np.savez_compressed)(path, **good)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    refused([path, path] if form == "npy" else path, "truncated", str(path))


def test_folder_unknown_suffix_single_npy_and_wrong_lists(tmp_path, good):
    (tmp_path / "x.npz").mkdir()
    refused(tmp_path / "x.npz", "folder")
    refused(tmp_path / "x.csv", "'.csv'", ".safetensors")
    refused(tmp_path / "x.npy", "[source.npy,target.npy]")
    refused([npz(tmp_path, **good)] * 2, "two .npy")
    refused([tmp_path / "x.npy"] * 3, "3 files")
    refused([], "0 files")


def test_missing_arrays_name_the_existing_ones(tmp_path, good):
    refused(npz(tmp_path, source=good["source"], labels=good["target"]), "no target", "labels, source")
    save_file({"embeddings": torch.ones(2, 2)}, tmp_path / "pairs.safetensors")
    refused(tmp_path / "pairs.safetensors", "no source and no target", "holds embeddings")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "U5"])
def test_wrong_dtypes(tmp_path, good, dtype):
    path = npz(tmp_path, **good | {"target": np.ones((N, D)).astype(dtype)})
    refused(path, "target has dtype", "convert it to float16")


def test_wrong_dtype_in_safetensors(tmp_path):
    save_file({"source": torch.ones(2, 2), "target": torch.ones(2, 2, dtype=torch.int64)}, tmp_path / "p.safetensors")
    refused(tmp_path / "p.safetensors", "target has dtype I64")


@pytest.mark.parametrize("form", ["npy", "npz"])
def test_object_arrays_are_never_unpickled(tmp_path, good, form):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'exploded')!r}, 'w').close()",))

    array = np.empty((N, D), dtype=object)
    array[:] = Bomb()
    if form == "npz":
        path = npz(tmp_path, **good | {"source": array})
    else:
        np.save(tmp_path / "a.npy", array)
        path = [tmp_path / "a.npy"] * 2
    refused(path, "Python objects")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("shape", [(), (N,), (N, 2, 2), (0, D), (N, 0)])
def test_wrong_shapes(tmp_path, good, shape):
    refused(npz(tmp_path, **good | {"source": np.ones(shape, np.float32)}), f"source has shape {shape}")


def test_mismatched_sides(tmp_path, good):
    refused(npz(tmp_path, **good | {"target": good["target"][1:]}), "target has 5 rows, source 6")
    refused(npz(tmp_path, **good | {"target": good["target"][:, 1:]}), "target has dimension 3, source 4")


def int8(good):
    return {name: np.full((N, D), 3, np.int8) for name in good} | {
        f"{name}_scale": np.full(N, 0.5, np.float32) for name in good
    }


@pytest.mark.parametrize(
    ("scale", "part"),
    [
        (np.ones(N - 1, np.float32), "source_scale has shape (5,)"),
        (np.ones((N, 1), np.float32), "source_scale has shape (6, 1)"),
        (np.ones(N, np.int8), "source_scale has dtype int8"),
        (np.array([1, 1, np.nan, 1, np.inf, 1], np.float32), "source_scale row 2 holds"),
        (np.array([1, -1, 1, 1, 1, 1], np.float32), "source_scale row 1 holds"),
        (None, "no source_scale"),
    ],
)
def test_scales(tmp_path, good, scale, part):
    arrays = int8(good) | {"source_scale": scale}
    refused(npz(tmp_path, **{name: array for name, array in arrays.items() if array is not None}), part)


def test_scales_of_floats_and_int8_npy(tmp_path, good):
    refused(npz(tmp_path, **good, source_scale=np.ones(N)), "source is float32, but there is a source_scale")
    np.save(tmp_path / "a.npy", np.ones((N, D), np.int8))
    refused([tmp_path / "a.npy"] * 2, "no source_scale")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite(tmp_path, good, bad):
    target = good["target"].astype(np.float64)
    target[[2, 5], 1] = bad
    message = refused(npz(tmp_path, **good | {"target": target}), "target row 2", "NaN or Inf", "2 of 6 rows")
    assert "source" not in message


def test_zero_rows_are_refused_only_with_normalize(tmp_path, good):
    good["source"][[1, 3, 4]] = 0
    path = npz(tmp_path, **good)
    refused(path, "source row 1", "can't be L2-normalised", "3 of 6 rows")
    assert len(PairDataset(path, normalize=False)) == N


def test_bad_rows_are_found_in_every_chunk(tmp_path, good, monkeypatch):
    monkeypatch.setattr("energy_flow.data.storage.columns._CHUNK_BYTES", 8 * D)  # one row a chunk
    good["target"][[4, 5], 0] = np.nan
    refused(npz(tmp_path, **good), "target row 4", "2 of 6 rows")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"name": "a"}\n' * (N - 1), "5 lines, but 6 rows"),
        ('{"name": "a"}\n' * (N + 1), "7 lines, but 6 rows"),
        ('{"name": "a"}\n' * (N - 1) + "a\n", "line 6 isn't JSON"),
        ('{"name": "a"}\n' * (N - 1) + "[1]\n", "line 6 is a list"),
        ('{"name": "a"}\n' * (N - 1) + '{"id": 1}\n', "line 6 has name = None"),
        ('{"lemma": "a"}\n' * N, "line 1 has the keys lemma"),
        ("\xff".encode("latin-1"), "UTF-8"),
    ],
)
def test_bad_names(tmp_path, good, text, part):
    (tmp_path / "pairs.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(npz(tmp_path, **good), "pairs.jsonl", part)


def test_headers_that_claim_more_than_the_file_has(tmp_path, good):
    header = json.dumps({"source": {"dtype": "F32", "shape": [1 << 40, 768], "data_offsets": [0, 3072 << 40]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path / "a.safetensors", "truncated")
    np.save(tmp_path / "a.npy", good["source"])
    lie = (tmp_path / "a.npy").read_bytes().replace(b"(6, 4), }    ", b"(60000, 4), }")
    (tmp_path / "a.npy").write_bytes(lie)
    refused([tmp_path / "a.npy"] * 2, "needs 960,000 bytes, but has 96")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("source.npy", "target.npy"):
            archive.writestr(name, lie)
    refused(tmp_path / "a.npz", "needs 960,000 bytes, but has 96")


def test_other_compression_methods(tmp_path, good):
    np.save(tmp_path / "a.npy", good["source"])
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        for name in ("source.npy", "target.npy"):
            archive.write(tmp_path / "a.npy", name)
    refused(tmp_path / "a.npz", "numpy.savez")


@pytest.mark.parametrize("form", ["safetensors", "npz", "npz-compressed", "npy"])
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_raise_only_data_errors(tmp_path, good, form, data):
    path = tmp_path / f"pairs.{form.split('-')[0]}"
    if form == "safetensors":
        save_file({name: torch.from_numpy(array) for name, array in good.items()}, path)
    elif form == "npy":
        np.save(path, good["source"])
    else:
        (np.savez if form == "npz" else np.savez_compressed)(path, **good)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        dataset = PairDataset([path, path] if form == "npy" else path, normalize=True)
    except DataError:
        return
    assert torch.isfinite(dataset.all()[0]).all()
