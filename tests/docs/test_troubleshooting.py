"""Every message in docs/troubleshooting.md is a message of the package."""

import ast
import re

import pytest

from tests.docs.documents import ROOT, read

MESSAGES = re.findall(r"^### `(.*)`$", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
HOLE = "…"  # stands for a value, in the document and in the package


def texts() -> list[str]:
    """All strings of the package, with a hole for each value that an f-string or `%` fills in."""
    found = []
    for path in (ROOT / "energy_flow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(s|d|\.\d+f)", HOLE, node.value))
    return found


TEXTS = texts()


def is_in_the_package(message: str) -> bool:
    """Whether one string of the package has all the words of a message, in their order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split(HOLE)), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_package_has_the_message(message: str) -> None:
    assert is_in_the_package(message)


def test_there_are_many_messages_and_unknown_ones_are_found() -> None:
    assert len(set(MESSAGES)) == len(MESSAGES) >= 25
    assert not is_in_the_package("lattice.depth = …: the lattice is too deep")
