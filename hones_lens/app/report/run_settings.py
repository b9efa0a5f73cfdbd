"""Reading the settings of a run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 3  # of a run folder; those without a number, or with a lower one, recorded less


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
    if saved.get("format") == FORMAT and saved != sealed(saved):
        raise ValueError(f"{file} was changed or damaged since the run wrote it; choose another --out")
    return saved


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """An object with a checksum of its other fields."""
    rest = {name: value for name, value in data.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "checksum": hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: There is none; names the file.
    """
    saved = read_any(file)
    if not isinstance(saved, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(saved).__name__}")
    return saved


def read_any(file: Path) -> Any:
    """The JSON value in a file.

    Raises:
        ValueError: There is none; names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
