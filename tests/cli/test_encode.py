"""Encoding text pairs: written files, resuming after an interruption, refusals before encoding starts."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from energy_flow.data import PairDataset
from tests.cli.helpers import Outcome, Program
from tests.cli.stand_in import Library, embedding

PAIRS = [(f"what word {row} means", f"word {row}") for row in range(50)]


def write_jsonl(path: Path, pairs: list[tuple[str, str]], keys: tuple[str, str] = ("source", "target")) -> None:
    lines = [json.dumps(dict(zip(keys, pair, strict=True)), ensure_ascii=False) for pair in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def pairs(program: Program, encoder: Library) -> Program:
    write_jsonl(program.folder / "pairs.jsonl", PAIRS)
    return program


def rows_of(side: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([embedding(pair[side]) for pair in PAIRS]))


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.5 / 127), ("float16", 2**-12), ("float32", 2**-23)])
def test_written_files(pairs: Program, dtype: str, error: float) -> None:
    outcome = pairs.encode(f"dtype={dtype}", "batch_size=7", "save_every=2")
    assert (outcome.code, outcome.err) == (0, "")
    assert "checked: 50 pairs with names, all rows finite and of length 1" in outcome.out
    dataset = PairDataset(pairs.folder / "out.safetensors", normalize=False)
    stored = {"int8": "int8 with row scales"}.get(dtype, dtype)
    assert dataset.description == f"stored as {stored}, not normalised, named"
    assert dataset.names == [target for _, target in PAIRS]
    for side, rows in enumerate(dataset.all()):
        torch.testing.assert_close(rows, rows_of(side), atol=error, rtol=0)
    with safe_open(pairs.folder / "out.safetensors", framework="numpy") as file:
        assert file.metadata()["encoder"] == "stand/in-16"
        assert file.metadata()["normalized"] == "true"
    assert sorted(path.name for path in pairs.folder.glob("out*")) == ["out.jsonl", "out.safetensors"]


def test_training_accepts_the_output(pairs: Program) -> None:
    assert pairs.encode().code == 0
    outcome = pairs.train(*(f"data.{split}=out.safetensors" for split in ("train", "val", "test")))
    assert (outcome.code, outcome.err) == (0, "")
    assert "nearest targets of the first test rows:\n  word 0: word " in outcome.out


def test_an_input_is_not_overwritten_by_the_names(pairs: Program) -> None:
    before = (pairs.folder / "pairs.jsonl").read_bytes()
    assert pairs.encode("output=pairs.safetensors").code == 0
    assert (pairs.folder / "pairs.jsonl").read_bytes() == before
    assert PairDataset(pairs.folder / "pairs.safetensors", normalize=True).names == [target for _, target in PAIRS]


def test_csv_and_other_keys(pairs: Program) -> None:
    with (pairs.folder / "pairs.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("word", "id", "meaning"), *((word, 3, meaning) for meaning, word in PAIRS)])
    outcome = pairs.encode("input=pairs.csv", "source_key=meaning", "target_key=word")
    assert (outcome.code, outcome.err) == (0, "")
    torch.testing.assert_close(
        PairDataset(pairs.folder / "out.safetensors", normalize=False).all()[0], rows_of(0), atol=0.005, rtol=0
    )


def interrupted(pairs: Program, encoder: Library) -> Outcome:
    encoder.stop_after = 1 + 2 * 2 * 16 + 10  # one text for the dimension, two parts, and some texts of the third
    outcome = pairs.encode("batch_size=8", "save_every=2")
    encoder.stop_after = None
    return outcome


def test_continuing_encodes_the_missing_rows(pairs: Program, encoder: Library) -> None:
    pairs.encode("output=whole.safetensors")
    encoder.seen.clear()
    outcome = interrupted(pairs, encoder)
    assert outcome.code == 130
    assert "32 of 50 rows are saved; repeat the command to continue" in outcome.err
    assert not (pairs.folder / "out.safetensors").exists()
    encoder.seen.clear()
    outcome = pairs.encode("batch_size=5", "save_every=1")
    assert (outcome.code, outcome.err) == (0, "")
    assert "continuing after 32 rows" in outcome.out
    again = 2 * 16  # rows that the check encodes
    assert len(encoder.seen) == 1 + 2 * 18 + again
    whole, parts = (load_file(pairs.folder / f"{name}.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list(pairs.folder.glob("*.partial"))


def test_continuing_with_other_settings_is_refused(pairs: Program, encoder: Library) -> None:
    interrupted(pairs, encoder)
    message = pairs.refused("dtype=float16", "encoder=stand/in-8", program="encode")
    assert f"output: {pairs.folder}/out.safetensors.partial holds parts of another encoding" in message
    for line in (
        "encoder: stand/in-16 in the folder, stand/in-8 now",
        "dimension: 16 in the folder, 8 now",
        "dtype: int8 in",
    ):
        assert line in message
    assert "rows:" not in message
    write_jsonl(pairs.folder / "pairs.jsonl", [*PAIRS[:-1], ("x", "y")])
    assert "texts: " in pairs.refused(program="encode")


def test_a_damaged_part_is_named(pairs: Program, encoder: Library) -> None:
    interrupted(pairs, encoder)
    part = pairs.folder / "out.safetensors.partial" / "000000000016.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    assert str(part) in pairs.refused(program="encode")


def test_an_encoder_that_changed_is_found_at_the_end(pairs: Program, encoder: Library) -> None:
    interrupted(pairs, encoder)
    encoder.change = 0.1
    message = pairs.refused(program="encode")
    assert "encoded again, has a cosine of" in message
    assert "to start over" in message
    assert not (pairs.folder / "out.safetensors").exists()


def test_an_encoder_whose_rows_need_more_than_int8(pairs: Program, encoder: Library) -> None:
    """One number of each row is much larger than the others. The first rows show it, and the remedy works."""
    encoder.change = np.eye(1, 512, dtype=np.float32)[0] * 3
    message = pairs.refused("encoder=stand/in-512", "batch_size=5", "save_every=1", program="encode")
    assert "dtype = int8: too coarse for this encoder: source row" in message
    assert "Set dtype=float16" in message
    assert len(encoder.seen) <= 1 + 2 * 5
    outcome = pairs.encode("encoder=stand/in-512", "dtype=float16")
    assert (outcome.code, outcome.err) == (0, "")


def test_texts_that_are_cut_are_counted(pairs: Program) -> None:
    write_jsonl(pairs.folder / "pairs.jsonl", [*PAIRS, ("one " * 9, "two " * 8)])
    assert "1 of 102 texts are longer than this encoder reads" in pairs.encode().out


def test_an_encoder_that_returns_nan(pairs: Program, encoder: Library) -> None:
    encoder.change = float("nan")
    assert "encoder = stand/in-16: returns NaN, Inf or a row of zeros" in pairs.refused(program="encode")


BAD_LINES = {
    "jsonl": (
        '{"source": "a", "target": "b"}\n\n{"source": "a"}\n{"source": "a", "target": 3}\n[1]\n{"sou',
        ("unusable lines: 5", "line 2 is empty", "line 3 has no target; it has source", "line 4 has target = 3"),
    ),
    "blank": ('{"source": "a", "target": " "}\n', ("line 1 has an empty target",)),
    "surrogate": ('{"source": "\\ud800", "target": "b"}\n', ("line 1 has a lone surrogate",)),
    "list": ("[1]\n", ("line 1 is a list, not an object",)),
    "broken": ('{"source": "a", "target": "b"}\n{"sou', ("line 2 isn't JSON",)),
    "nothing": ("", ("no pairs in it",)),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_found_before_encoding(pairs: Program, encoder: Library, case: str) -> None:
    content, parts = BAD_LINES[case]
    (pairs.folder / "pairs.jsonl").write_text(content)
    message = pairs.refused(program="encode")
    for part in (f"{pairs.folder}/pairs.jsonl", *parts):
        assert part in message
    assert encoder.seen == []


BAD_CSV = {
    'source,target\na,"b\nc"\nd\n': "line 4 has 1 fields, the header 2",
    "source,goal\na,b\n": "line 2 has no target; it has source, goal",
    "source,target\na,b\n\n": "line 3 is empty",
    "source,target\na,b,c\n": "line 2 has 3 fields, the header 2",
    'source,target\na,"b\n': "line 2 isn't CSV",
    "source,target\n": "no pairs in it",
}


@pytest.mark.parametrize("content", BAD_CSV)
def test_bad_lines_of_a_csv(pairs: Program, content: str) -> None:
    (pairs.folder / "pairs.csv").write_text(content)
    assert BAD_CSV[content] in pairs.refused("input=pairs.csv", program="encode")


REFUSED = [
    (("input=nope.jsonl",), "can't be read (No such file or directory)"),
    (("input=.",), "unknown suffix ''"),
    (("input=pairs.txt",), "unknown suffix '.txt'; give a .jsonl or a .csv"),
    (("output=out.npz",), "must end in .safetensors"),
    (("output=nope/out.safetensors",), "its folder is missing or not writable"),
    (("output=train.safetensors",), "train.safetensors: already exists"),
    (("output=taken.safetensors",), "the names of its rows would overwrite"),
    (("encoder=nope/model",), "encoder = nope/model: can't be loaded"),
    (("dtype=int4",), "dtype = 'int4'"),
    (("batch_size=0",), "batch_size = 0"),
    (("source_key=text",), "line 1 has no text; it has source, target"),
    (("target_key=text",), "or set source_key and target_key to the keys of the texts"),
    (("sourcekey=text",), "did you mean source_key?"),
]


@pytest.mark.parametrize(("overrides", "part"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_refused(pairs: Program, encoder: Library, overrides: tuple[str, ...], part: str) -> None:
    (pairs.folder / "taken.jsonl").write_text('{"name": "something else"}\n')
    assert part in pairs.refused(*overrides, program="encode")
    assert encoder.seen == []
    assert not list(pairs.folder.glob("*.partial"))


def test_an_input_that_would_name_the_rows_wrongly(pairs: Program) -> None:
    write_jsonl(pairs.folder / "pairs.jsonl", PAIRS, ("question", "answer"))
    given = ("source_key=question", "target_key=answer")
    assert "its rows would be named by the input file" in pairs.refused(
        *given, "output=pairs.safetensors", program="encode"
    )
    assert pairs.encode(*given).code == 0


def test_input_and_output_must_be_given(pairs: Program) -> None:
    assert "input: missing" in pairs.refused("input=???", program="encode")


def test_metadata_have_keys_of_the_embedded_data(pairs: Program) -> None:
    """Programs can then read both kinds of files in the same way."""
    assert pairs.encode().code == 0
    embedded = Path(__file__).parents[2] / "energy_flow" / "data" / "reverse_dictionary" / "test.safetensors"
    with safe_open(embedded, "numpy") as theirs, safe_open(pairs.folder / "out.safetensors", "numpy") as ours:
        assert set(ours.metadata()) <= set(theirs.metadata())


def test_a_gallery_of_encoded_words(pairs: Program, trained: Outcome) -> None:
    assert pairs.encode().code == 0
    ckpt = f"ckpt_path={trained.folder / 'checkpoints' / 'best.ckpt'}"
    save_file({"source": rows_of(0)}, pairs.folder / "in.safetensors")
    outcome = pairs.predict(ckpt, "input=in.safetensors", "gallery=out.safetensors")
    assert (outcome.code, outcome.err) == (0, "")
    assert "word " in outcome.out
