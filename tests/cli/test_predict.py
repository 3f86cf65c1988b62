"""Predictions for texts, rows and files; messages for unusable inputs."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from energy_flow import predict
from energy_flow.pretrained import EnergyFlowModel
from tests.cli.helpers import DIM, SIZES, Outcome, Program
from tests.cli.stand_in import Bars, Library, embedding


@pytest.fixture
def ckpt(trained: Outcome) -> str:
    return f"ckpt_path={trained.folder / 'checkpoints' / 'best.ckpt'}"


@pytest.fixture
def model(trained: Outcome) -> EnergyFlowModel:
    return EnergyFlowModel.from_checkpoint(trained.folder / "checkpoints" / "best.ckpt", "sentence-transformers/in-16")


@pytest.fixture
def named(program: Program) -> dict[str, list[str]]:
    """Write and return the names of every split."""
    names = {split: [f"{split} word {row}" for row in range(size)] for split, size in SIZES.items()}
    for split, words in names.items():
        lines = [json.dumps({"headword": word, "definition": f"what {word} means"}) for word in words]
        (program.folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return names


def tables(out: str) -> list[list[tuple[str, float]]]:
    """Words and cosines of every printed table."""
    found: list[list[tuple[str, float]]] = []
    for line in out.splitlines():
        if line.startswith("┏"):
            found.append([])
        if line.startswith("│"):
            _, word, cosine = (cell.strip() for cell in line.strip("│").split("│"))
            found[-1].append((word, float(cosine)))
    return found


def by_hand(model: EnergyFlowModel, source: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """Cosines with all targets of all splits, and their order."""
    targets = torch.cat([load_file(folder / f"{split}.safetensors")["target"] for split in SIZES])
    with torch.no_grad():
        scores = normalize(model(source).double(), dim=-1) @ normalize(targets.double(), dim=-1).T
    return scores, scores.argsort(dim=-1, descending=True)


def test_a_row_finds_its_word_among_all_splits(
    program: Program, ckpt: str, model: EnergyFlowModel, named: dict[str, list[str]]
) -> None:
    outcome = program.predict(ckpt, "row=5", "k=128")
    assert (outcome.code, outcome.err) == (0, "")
    source = load_file(program.folder / "test.safetensors")["source"][5]
    scores, order = by_hand(model, source, program.folder)
    everything = [word for words in named.values() for word in words]
    (table,) = tables(outcome.out)
    true = f"{named['test'][5]}  <- the true one"
    assert [word for word, _ in table] == [
        true if everything[row] == named["test"][5] else everything[row] for row in order.tolist()
    ]
    assert [cosine for _, cosine in table] == pytest.approx(scores[order].tolist(), abs=6e-5)
    rank = order.tolist().index(SIZES["train"] + SIZES["val"] + 5) + 1
    assert f"true word: {named['test'][5]}, rank {rank} of 128" in outcome.out
    assert outcome.out.startswith("row 5 of test: what test word 5 means\n")


def test_without_names_rows_have_numbers(program: Program, ckpt: str) -> None:
    outcome = program.predict(ckpt, "row=5", "split=val", "k=128")
    assert "val 5  <- the true one" in outcome.out
    assert "row 5 of val\n" in outcome.out


def test_a_true_word_that_is_no_candidate(program: Program, ckpt: str, named: dict[str, list[str]]) -> None:
    outcome = program.predict(ckpt, "row=5", "gallery=val.safetensors")
    assert "true word: test word 5, which is not among the 32 candidates" in outcome.out
    assert all(word in named["val"] for word, _ in tables(outcome.out)[0])


def test_texts(program: Program, model: EnergyFlowModel, encoder: Library) -> None:
    path = program.folder / "model.safetensors"
    model.save_pretrained(path)
    for text in ("sleep, during: summer", 'it\'s "[big]" ${x} (or so) = \\', "\\${y}"):
        best = by_hand(model, torch.from_numpy(embedding(text)), program.folder)[0].max().item()
        outcome = program.predict(f"ckpt_path={path}", f"text={text}")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(text + "\n")
        assert tables(outcome.out)[0][0][1] == pytest.approx(best, abs=6e-5)
    both = program.predict(f"ckpt_path={path}", 'text=["a, b", c d e f g h i j k]')
    assert len(tables(both.out)) == 2
    assert "1 of the texts are longer than the encoder reads" in both.out


def test_a_file(program: Program, ckpt: str, model: EnergyFlowModel, named: dict[str, list[str]]) -> None:
    source = torch.randn(40, DIM)
    np.savez(program.folder / "in.npz", source=source.numpy())
    np.save(program.folder / "in.npy", source.numpy())
    save_file({"source": source}, program.folder / "in.safetensors")
    scores, order = by_hand(model, source, program.folder)
    everything = [word for words in named.values() for word in words]
    for name in ("in.npz", "in.npy", "in.safetensors"):
        outcome = program.predict(ckpt, f"input={name}", "data.eval_batch_size=16")
        assert (outcome.code, outcome.err) == (0, "")
        assert len(tables(outcome.out)) == 5
        written = load_file(outcome.folder / "predictions.safetensors")
        # The program runs batches of 16 rows, this test one batch of 40. So rows that are equal to rounding may swap.
        for rows in (order[:, :3], written["neighbour_row"]):
            torch.testing.assert_close(written["score"], scores.gather(1, rows), atol=1e-6, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(written["embedding"], model(source))
        lines = [json.loads(line) for line in (outcome.folder / "neighbours.jsonl").read_text().splitlines()]
        assert [line["row"] for line in lines] == list(range(40))
        for row, line in enumerate(lines):
            assert [entry["name"] for entry in line["neighbours"]] == [everything[i] for i in order[row, :3].tolist()]
            assert [entry["row"] for entry in line["neighbours"]] == order[row, :3].tolist()
            assert [entry["score"] for entry in line["neighbours"]] == written["score"][row].tolist()


def test_repeated_words_are_one_candidate(program: Program, ckpt: str) -> None:
    target = torch.randn(6, DIM)
    target[4], target[5] = 2 * target[1], -target[1]
    save_file({"target": target}, program.folder / "words.safetensors")
    lines = [json.dumps({"word": word}) for word in ("a", "b", "c", "d", "b", "b")]
    (program.folder / "words.jsonl").write_text("\n".join(lines))
    outcome = program.predict(ckpt, "row=0", "gallery=words.safetensors", "k=5")
    (table,) = tables(outcome.out)
    assert sorted(word for word, _ in table) == ["a", "b", "b", "c", "d"]
    assert "there are 5 candidates" in program.refused(
        ckpt, "row=0", "gallery=words.safetensors", "k=6", program="predict"
    )


def test_the_shipped_model_on_its_own_data(program: Program) -> None:
    outcome = program.predict("data=reverse_dictionary", "row=0", "k=10")
    assert (outcome.code, outcome.err) == (0, "")
    assert "row 0 of test: given to gross intemperance in eating or drinking" in outcome.out
    assert "true word: crapulous, rank " in outcome.out
    assert " of 18,000" in outcome.out
    assert len(tables(outcome.out)[0]) == 10


def test_without_the_shipped_weights(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "SHIPPED", program.folder / "gone.safetensors")
    message = program.refused("row=0", program="predict")
    assert "ckpt_path = null: the weights of the package are missing" in message
    assert "python -m energy_flow.train" in message


REFUSED = [
    ((), 'text, row and input are null: give one of them, such as text="it measures earthquakes"'),
    (("row=1", "text=x"), "text and row are given: only one input is allowed"),
    (("row=-1",), "row = -1"),
    (("row=32",), "row = 32: data.test has the rows 0 to 31"),
    (("row=1", "split=test", "data.test=null"), "split = test: data.test is null"),
    (("row=1", "split=tset"), "split = 'tset'"),
    (("row=1", "k=0"), "k = 0"),
    (("row=1", "k=129"), "k = 129: there are 128 candidates. Set k=128 or less"),
    (("row=1", "data.normalize=false"), "data.normalize=true"),
    (("row=1", "gallery=nope.safetensors"), "gallery: "),
    (("row=1", "gallery=train.csv"), "unknown suffix '.csv'"),
    (("input=nope.npy",), "no such file"),
    (("input=val.jsonl",), "unknown suffix '.jsonl'; give a .safetensors or .npz with source, or a .npy"),
    (("text= ",), "text = ' '"),
    (("text=[]",), "text = []"),
    (("+foo=1", "row=1"), "foo: unknown key"),
    (("row=1", "kk=3"), "did you mean k?"),
    (("row=1", "ckpt_path=nope.safetensors"), "ckpt_path = nope.safetensors: there is no such file"),
    (("row=1", "ckpt_path=nope.ckpt"), "ckpt_path = nope.ckpt: there is no such file"),
    (("row=1", "ckpt_path=val.safetensors"), "val.safetensors: not a model of energy_flow"),
    (("text=x",), "encoder = null: the model does not name the encoder"),
    (("text=x", "encoder=stand/in-8"), "encoder = stand/in-8: its embeddings have dimension 8, the model takes 16"),
    (("text=x", "encoder=nope/model"), "encoder = nope/model: can't be loaded (nope/model is not a valid model"),
    (("text=x", "encoder=./nope"), "encoder = ./nope: no such folder"),
]


@pytest.mark.parametrize(("overrides", "part"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_refused(program: Program, ckpt: str, encoder: Library, overrides: tuple[str, ...], part: str) -> None:
    given = overrides if any("ckpt_path" in word for word in overrides) else (ckpt, *overrides)
    assert part in program.refused(*given, program="predict")


def test_rows_and_candidates_of_another_dimension(program: Program, ckpt: str) -> None:
    np.save(program.folder / "in.npy", np.ones((3, 8), np.float32))
    np.save(program.folder / "zero.npy", np.zeros((3, DIM), np.float32))
    message = program.refused(ckpt, "input=in.npy", program="predict")
    assert "input = in.npy: embeddings of dimension 8, but the model takes 16" in message
    message = program.refused(ckpt, "row=1", "gallery=in.npy", program="predict")
    assert "gallery = in.npy: candidates of dimension 8, but the model predicts 16" in message
    assert "row 0 holds only zeros" in program.refused(ckpt, "input=zero.npy", program="predict")
    message = program.refused(ckpt, "row=1", "data=reverse_dictionary", program="predict")
    assert "dimension 768" in message


def test_text_without_the_library(program: Program, ckpt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    message = program.refused(ckpt, "text=x", "encoder=stand/in-16", program="predict")
    assert "the extra [text]: python -m pip install sentence-transformers" in message


TEXT = ("text=x", "encoder=stand/in-16")


def test_an_encoder_on_this_machine_is_loaded_without_network(program: Program, ckpt: str, encoder: Library) -> None:
    outcome = program.predict(ckpt, *TEXT)
    assert (outcome.code, outcome.err) == (0, "")
    assert not encoder.asked_hub
    bars = sys.modules["transformers.utils.logging"]
    assert isinstance(bars, Bars)
    assert (bars.hidden, bars.shown) == (1, True)


@pytest.mark.parametrize("missing", ["cached", "whole"])
def test_an_encoder_that_is_not_on_this_machine(program: Program, ckpt: str, encoder: Library, missing: str) -> None:
    setattr(encoder, missing, False)
    outcome = program.predict(ckpt, *TEXT)
    assert (outcome.code, outcome.err) == (0, "")
    assert encoder.asked_hub
    assert "encoder stand/in-16 is not on this machine: asking the model hub" in outcome.out


def test_retries_of_the_hub_are_not_logged(program: Program, ckpt: str, encoder: Library) -> None:
    levels: list[int] = []
    hub, load = logging.getLogger("huggingface_hub"), encoder.SentenceTransformer

    def loaded(name: str, **options: Any) -> Any:
        levels.append(hub.getEffectiveLevel())
        return load(name, **options)

    encoder.cached, encoder.SentenceTransformer = False, loaded
    assert program.predict(ckpt, *TEXT).code == 0
    assert levels == [logging.ERROR]
    assert hub.level == logging.NOTSET


def test_a_folder_without_a_model(program: Program, ckpt: str, encoder: Library) -> None:
    (program.folder / "empty").mkdir()
    for name in ("empty", "./empty", str(program.folder / "empty")):
        message = program.refused(ckpt, "text=x", f"encoder={name}", program="predict")
        assert f"encoder = {name}: can't be loaded" in message
    assert not encoder.asked_hub


@pytest.mark.parametrize("name", ["stranger/model", "./model", "/tmp/model", "sentence-transformers/../../x", "model"])
def test_a_file_may_only_name_encoders_of_a_known_publisher(
    program: Program, model: EnergyFlowModel, encoder: Library, name: str
) -> None:
    path = program.folder / "sent.safetensors"
    sent = EnergyFlowModel(model.card.model_copy(update={"encoder": name}))
    sent.save_pretrained(path)
    message = program.refused(f"ckpt_path={path}", "text=x", program="predict")
    assert f"If you trust it, give encoder={name}" in message
    assert encoder.seen == []
    assert program.predict(f"ckpt_path={path}", "text=x", "encoder=stand/in-16").code == 0
