"""Reading the settings of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What `settings.json` of a run folder holds: `settings`, `environment`, and more.

    Raises:
        ValueError: The folder is not a run folder, or the file is damaged; names it.
    """
    file = Path(folder) / "settings.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no settings.json")
    saved = read_object(file)
    missing = [name for name in ("settings", "environment") if not isinstance(saved.get(name), dict)]
    missing += [
        name for name in ("run", "code") if "format" in saved and not isinstance(saved.get(name), str)
    ]
    if missing:
        raise ValueError(f"{file} is damaged: it has no {' and no '.join(missing)}")
    return saved


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: There is none; names the file.
    """
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(saved).__name__}")
    return saved
