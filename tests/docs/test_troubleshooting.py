"""Every message of docs/troubleshooting.md is one that the package says."""

import ast
import re

import pytest

from tests.docs.documents import ROOT, read

MESSAGES = re.findall(r"^### `(.*)`$", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
HOLE = "…"  # of a value, in messages here and there


def texts() -> list[str]:
    """All strings of the package; what an f-string or `%` fills in is a hole."""
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


def is_said(message: str) -> bool:
    """Whether one string of the package has all the words of a message, in their order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split(HOLE)), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_said(message: str) -> None:
    assert is_said(message)


def test_messages_are_many_and_others_are_found() -> None:
    assert len(set(MESSAGES)) == len(MESSAGES) >= 25
    assert not is_said("lattice.depth = …: the lattice is too deep")
