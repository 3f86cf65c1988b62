"""Paths, tags, config keys and environment variables in the documents exist."""

import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.docs.documents import ROOT, commands, documents, inline, read
from tests.docs.hydra_commands import PROGRAMS, composed
from tests.docs.runs import Runs, make_runs

TAG = re.compile(
    r"(train|val|test|test_all|baseline|baseline_all|difference|model|flows|flow_values|time|memory|cleanup|result"
    r"|surfaces|landings|groups|trajectories|field|lr-\w+)/\S+|population"
)
SUFFIXES = "safetensors|ckpt|json|jsonl|csv|npz|npy|md|png|log|txt|yaml|py|ipynb|cff"
PATH = re.compile(rf"[\w.*<>/-]+/[\w.*<>/-]*|[\w-]+\.({SUFFIXES})")
KEY = re.compile(r"[a-z][a-z_0-9]*(\.[a-z][a-z_0-9]*)+")
OVERRIDES = re.compile(r"(\+?[a-z_.]+=\S*)( \+?[a-z_.]+=\S*)*")
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"\]\((?!\w+://)([^)#\s]+)\)")
DEFINED = re.compile(r"`(\w+)`\s(?:in|of)\s`((?:energy_flow|energy_flow_benchmarks)/[\w/]+\.py)`")
VARIABLE = re.compile(r"([A-Z][A-Z_]+)=\S+")

# The tiny runs can't make these; the package must name them.
ON_A_GPU = {"memory/allocated", "memory/reserved", "memory/peak", "memory/inactive_split", "cleanup/cache_freed_bytes"}
AFTER_A_FAULT = {"checkpoints/before_fault.ckpt", "bad_batch.safetensors"}
# Names of the reader's files, and names of other software.
OF_THE_READER = {"my_conf", "experiment/mine.yaml", "loss/huber.yaml", "data/mine.yaml"} | {
    "train.safetensors",
    "pairs.jsonl",
    "a.ckpt",
    "b.ckpt",
}
OF_OTHERS = {"sentence-transformers/", "PYTORCH_CUDA_ALLOC_CONF", "HYDRA_FULL_ERROR", "fit-profile.txt"}


@cache
def package_source() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "energy_flow").rglob("*.py"))


@cache
def known_keys() -> frozenset[str]:
    """Every key of every program, with the options of `data` and `benchmark` that bring keys of their own."""
    configs = [composed(program) for program in PROGRAMS if program != "benchmark"]
    configs += [composed("train", f"data={name.stem}") for name in (ROOT / "conf/data").glob("*.yaml")]
    configs += [composed("train", "logger=[tensorboard,csv]")]
    configs += [composed("benchmark", f"benchmark={name.stem}") for name in (ROOT / "conf/benchmark").glob("*.yaml")]
    found: set[str] = set()
    for config in configs:
        add_keys(OmegaConf.to_container(config), "", found)
    return frozenset(found | {"hydra.run.dir", "hydra.searchpath"})


def add_keys(section: object, prefix: str, found: set[str]) -> None:
    if isinstance(section, dict):
        for name, value in section.items():
            found.add(f"{prefix}{name}")
            add_keys(value, f"{prefix}{name}.", found)


@cache
def composes_somewhere(overrides: str) -> bool:
    """Whether some program takes these overrides; `key=` alone names the key."""
    words = overrides.split()
    if all(word.endswith("=") for word in words):
        return {word[:-1] for word in words} <= known_keys()
    for program in PROGRAMS:
        try:
            composed(program, *words)
        except Exception:  # noqa: BLE001  # any error, of Hydra or of a resolver, means no
            continue
        return True
    return False


def test_keys_and_overrides_exist() -> None:
    sections = {key.split(".")[0] for key in known_keys()}
    wrong = []
    for code in inline():
        if KEY.fullmatch(code.text) and code.text.split(".")[0] in sections and not PATH.fullmatch(code.text):
            if code.text not in known_keys():
                wrong.append(code.where)
        elif OVERRIDES.fullmatch(code.text) and not composes_somewhere(code.text):
            wrong.append(code.where)
    assert not wrong, wrong


def test_environment_variables_exist() -> None:
    named = {match[1] for code in inline() if (match := VARIABLE.fullmatch(code.text))}
    assert {"ENERGY_FLOW_TRUST"} <= named
    assert not {name for name in named - OF_OTHERS if f'"{name}"' not in package_source()}


def test_names_are_defined_where_the_documents_say() -> None:
    pages = [*documents(), ROOT / "CONTRIBUTING.md"]
    named = [(page, name, place) for page in pages for name, place in DEFINED.findall(read(page))]
    wrong = [f"{page}: {name} in {place}" for page, name, place in named if not defines(ROOT / place, name)]
    assert not wrong, wrong
    assert len(named) > 5


def defines(path: Path, name: str) -> bool:
    return (
        path.is_file() and re.search(rf"^\s*((def|class) {name}\b|{name}\b.* = )", path.read_text(), re.M) is not None
    )


def test_links_lead_somewhere() -> None:
    links = [(page, target) for page in documents() for target in LINK.findall(CODE.sub("", read(page)))]
    wrong = [f"{page}: {target}" for page, target in links if not (page.parent / target).exists()]
    assert not wrong, wrong
    assert len(links) > 50


@pytest.mark.slow
def test_paths_and_tags_exist(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    wrong = [code.where for code in inline() if TAG.fullmatch(code.text) and not has_tag(runs, code.text)]
    wrong += [
        code.where
        for code in inline()
        if PATH.fullmatch(code.text) and not TAG.fullmatch(code.text) and not has_path(runs, code.text)
    ]
    for command in commands():
        wrong += [f"{command.where}: {path}" for path in log_paths(command.words) if not has_path(runs, path)]
    assert not wrong, wrong
    assert not has_tag(runs, "lr-AdamW/*")
    assert not has_path(runs, "logs/train/runs/*/best.ckpt")


def log_paths(words: tuple[str, ...]) -> list[str]:
    """Paths below logs/ in the values of a command, with `...` as a wildcard."""
    values = [word.partition("=")[2] for word in words if not word.startswith("hydra.run.dir=")]
    return [value.replace("...", "*") for value in values if value.startswith("logs/")]


def is_group(name: str) -> bool:
    """Whether the name is that of a config group, such as model/carrier."""
    return (ROOT / "conf" / name).is_dir()


def has_tag(runs: Runs, tag: str) -> bool:
    if is_group(tag):
        return True
    if tag in ON_A_GPU:
        return f'"{tag}"' in package_source()
    pattern = re.sub(r"<\w+>", "*", tag).replace("[", "[[]")
    return any(fnmatch(name, pattern) for name in runs.tags | runs.metrics)


def has_path(runs: Runs, path: str) -> bool:
    """Whether the path is in the repository, in a run folder, a config group, or among the names above."""
    if path in AFTER_A_FAULT:
        return f'"{Path(path).name}"' in package_source() or Path(path).stem in package_source()
    if path in OF_THE_READER | OF_OTHERS or (ROOT / path).exists() or is_group(path):
        return True
    parts = re.split(r"<\w+>|\*", path.rstrip("/"))  # each stands for one name of a file or folder
    pattern = re.compile("(.*/)?" + "[^/]+".join(map(re.escape, parts)))
    return any(pattern.fullmatch(name) for name in runs.paths)
