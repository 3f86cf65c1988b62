"""Read code blocks, inline code and commands from the documents."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATED = ROOT / "docs" / "benchmarks"  # dated records; only their commands are checked

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_DIRECTIVE = re.compile(r"\{[a-z-]+\}.*")
_COMMAND = re.compile(r"(python|tensorboard|energy-flow-\w+|ruff|mypy|pytest|pip|git|torchrun|sbatch)( .*)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    file: Path
    line: int
    language: str
    text: str
    before: str  # all text before the block

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Inline:
    """A piece of inline code."""

    file: Path
    text: str

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT)}: {self.text}"


@dataclass(frozen=True)
class Command:
    """One command, split into words as by the shell."""

    where: str
    words: tuple[str, ...]


def documents() -> list[Path]:
    """README and every page of the site, without built files."""
    built = (ROOT / "docs" / "_build", ROOT / "docs" / "reference" / "generated")
    pages = [page for page in (ROOT / "docs").rglob("*.md") if not any(page.is_relative_to(place) for place in built)]
    return [ROOT / "README.md", *sorted(pages)]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks() -> Iterator[Block]:
    """All fenced blocks but MyST directives."""
    for page in documents():
        text = read(page)
        for match in _FENCE.finditer(text):
            if not _DIRECTIVE.fullmatch(match[1]):
                before = text[: match.start()]
                yield Block(page, before.count("\n") + 1, match[1], match[2], before)


def inline(*, dated: bool = False) -> Iterator[Inline]:
    """All inline code outside of blocks. Dated pages count only with `dated`."""
    for page in documents():
        if dated or not page.is_relative_to(DATED):
            for match in _INLINE.finditer(_FENCE.sub("", read(page))):
                yield Inline(page, " ".join(match[1].split()))


def commands() -> list[Command]:
    """Every command of shell blocks and of inline code."""
    found = []
    for block in blocks():
        if block.language == "bash" or (block.language == "" and block.file.is_relative_to(DATED)):
            for line in block.text.replace("\\\n", " ").splitlines():
                found += split(block.where, line)
    for code in inline(dated=True):
        if _COMMAND.fullmatch(code.text):
            found += split(code.where, code.text)
    return found


def split(where: str, line: str) -> Iterator[Command]:
    """The commands of a line without comments. The word 1 replaces shell variables."""
    for part in line.split("&&"):
        words = shlex.split(re.sub(r"\$\w+", "1", part), comments=True)
        if words:
            yield Command(where, tuple(words))
