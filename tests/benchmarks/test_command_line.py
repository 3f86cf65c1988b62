"""python -m energy_flow.benchmark at tiny sizes: its output, its files and its messages."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from energy_flow.benchmark import main
from energy_flow_benchmarks import collect, registry, report
from tests.benchmarks.training import TRAINING
from tests.cli.helpers import Outcome, _logging_as_it_was, check_message

Run = Callable[..., Outcome]

REPORT = (
    "benchmark=report",
    "benchmark.flows=[16,64]",
    "benchmark.training_flows=[8]",
    "benchmark.hidden_size=4",
    "benchmark.curve_steps=2",
    "benchmark.repeats=1",
    "benchmark.min_seconds=0.0",
)
COLLECT = (
    "benchmark=collect",
    "benchmark.landings=[64,128]",
    "benchmark.repeats=1",
    "benchmark.min_seconds=0.0",
)
MACHINE = {
    **dict.fromkeys(("cpu", "torch", "python", "energy_flow", "date", "command"), str),
    **dict.fromkeys(("cores", "threads"), int),
    **dict.fromkeys(("gpu", "triton"), (str, type(None))),
}
ROW = {
    **dict.fromkeys(("benchmark", "case", "variant"), str),
    "size": int,
    **dict.fromkeys(("peak_bytes", "count"), (int, type(None))),
    **dict.fromkeys(("seconds", "ratio", "share"), (float, type(None))),
}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program with overrides, in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(collect, "COPIED", 4096)

    def start(*overrides: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["benchmark", *overrides])
        capsys.readouterr()
        with _logging_as_it_was():
            try:
                main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    return start


def check_schema(found: dict[str, Any], name: str) -> None:
    """`benchmark.json`: exactly these keys, of these types."""
    assert found.keys() == {"machine", "rows"}
    assert found["machine"].keys() == MACHINE.keys()
    for key, kind in MACHINE.items():
        assert isinstance(found["machine"][key], kind), key
    assert found["rows"]
    for row in found["rows"]:
        assert row.keys() == ROW.keys()
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), (key, row)
        assert row["benchmark"] == name
        assert row["size"] > 0
        assert row["seconds"] is None or row["seconds"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("overrides", [REPORT, COLLECT, *TRAINING], ids=lambda words: words[0])
def test_a_run_leaves_table_picture_and_rows(run: Run, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    name = overrides[0].removeprefix("benchmark=")
    outcome = run(*overrides)
    assert (outcome.code, outcome.err) == (0, "")
    folder = outcome.folder
    assert (tmp_path / folder).resolve().parent == tmp_path / "logs" / "benchmark" / "runs"
    found = json.loads((folder / "benchmark.json").read_text())
    check_schema(found, name)
    assert found["machine"]["command"] == "python -m energy_flow.benchmark " + " ".join(
        shlex.quote(word) for word in overrides
    )
    page = (folder / "benchmark.md").read_text()
    assert page.startswith(f"# benchmark={name}, {found['machine']['date']}\n")
    for text in (found["machine"]["command"], found["machine"]["cpu"], f"torch: {torch.__version__}"):
        assert text in page
    picture = imread(folder / "benchmark.png")
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05, "an empty page"
    assert "Measurements" in outcome.out
    for variant in {row["variant"] for row in found["rows"]}:
        assert variant in outcome.out
        assert f"| {variant} |" in page


def test_the_report_compares_both_sides(run: Run) -> None:
    outcome = run(*REPORT)
    page = (outcome.folder / "benchmark.md").read_text()
    for text in (
        "Solution 5: ",
        "Criterion: peak memory usage",
        "64 flows",
        "maintained",
        "docs/performance-report.md",
    ):
        assert text in page
    rows = json.loads((outcome.folder / "benchmark.json").read_text())["rows"]
    assert {next(case for case in report.CASES if row["case"].startswith(case)) for row in rows} == set(report.CASES)
    ours = [row for row in rows if row["case"].startswith("end of batch") and row["size"] == 64]
    seconds = {row["variant"]: row["seconds"] for row in ours}
    ratio = {row["variant"]: row["ratio"] for row in ours}
    assert ratio == {"before": 1.0, "now": pytest.approx(seconds["before"] / seconds["now"])}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("benchmark=reprot",), ("benchmark = reprot", "did you mean report?")),
        (("benchmark.name=reprot",), ("benchmark.name = 'reprot'", "did you mean report?")),
        (("benchmark.flows=[10]",), ("benchmark.flows[0] = 10", "multiple of 8", "set it to 8")),
        (("benchmark.fows=[8]",), ("benchmark.fows", "did you mean flows?")),
        (("+benchmark.fows=[8]",), ("benchmark.fows", "did you mean flows?")),
        (("benchmark=collect", "benchmark.landings=[]"), ("benchmark.landings = []", "at least 1 item")),
        (
            ("benchmark=collect", "benchmark.min_seconds=-1.0"),
            ("benchmark.min_seconds = -1.0", "greater than or equal"),
        ),
        (("benchmark=step", "benchmark.cpu.dtypes=[float16]"), ("benchmark.cpu.dtypes[0] = 'float16'", "'bfloat16'")),
        (("benchmark=step", "benchmark.cpu.sizes=[{size: debgu, batch: 1}]"), ("'debgu'", "did you mean debug?")),
        (("benchmark=memory", "benchmark.cuda.sweeps=[]"), ("benchmark.cuda.sweeps = []", "at least 1 item")),
        (("benchmark=scaling", "benchmark.cpu.batches=[0]"), ("benchmark.cpu.batches[0] = 0", "greater than or equal")),
        (("benchmark=stability", "benchmark.steps=50"), ("benchmark.steps = 50", "benchmark.warmup_steps = 150")),
        (("device=gpu",), ("device = 'gpu'", "'cpu' or 'cuda'")),
        (("seed=-1",), ("seed = -1", "greater than or equal to 0")),
        (("dvice=cpu",), ("dvice", "did you mean device?")),
    ],
)
def test_refused(run: Run, overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    outcome = run(*overrides)
    assert outcome.code == 1
    check_message(outcome.err)
    for part in parts:
        assert part in outcome.err


def test_a_missing_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("device=cuda")
    assert outcome.code == 1
    assert "device = 'cuda': torch finds no GPU here. Set device=cpu" in outcome.err


def test_the_folder_is_printed_when_a_benchmark_fails(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("not equal, say")

    benchmark = registry.BENCHMARKS["collect"]
    monkeypatch.setitem(
        registry.BENCHMARKS, "collect", registry.Benchmark(benchmark.settings, broken, benchmark.picture)
    )
    with pytest.raises(RuntimeError, match="not equal"):
        run(*COLLECT)
    assert "run folder: " in capsys.readouterr().out


def test_every_benchmark_has_a_config_and_every_config_a_benchmark() -> None:
    folder = Path(__file__).parents[2] / "conf" / "benchmark"
    assert {path.stem for path in folder.glob("*.yaml")} == set(registry.BENCHMARKS)
