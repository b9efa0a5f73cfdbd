"""The README's Python blocks, run in their order on a shipped model; fewer examples than there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
FEWER = {"limit=96": "limit=4", "limit=140": "limit=6", "limit=64": "limit=3"}


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_snippets_run_and_the_model_answers_right(capsys: pytest.CaptureFixture) -> None:
    names: dict[str, Any] = {}
    for block in blocks():
        if "explore(" in block:
            pytest.importorskip("anywidget")
        for many, few in FEWER.items():
            block = block.replace(many, few)
        exec(compile(block, str(README), "exec"), names)
    example, (answer,) = names["example"], names["model"].generate(names["inputs"])
    assert example.answers == (answer,), "the model is asked in the task's form, about what is on the picture"
    said = capsys.readouterr().out
    assert f"{example.question} {answer}" in said and names["explorer"].text == answer
    assert re.search(
        rf"print\(example.question, .*# .*: {re.escape(answer)}$", "\n".join(blocks()), re.MULTILINE
    )
