"""The file of `--config`: options in YAML, or a configuration of the HONES release."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hones_lens.app.hones_config import Setting, is_hones_config, read_options
from hones_lens.model import did_you_mean


def apply_config(args: argparse.Namespace) -> set[str]:
    """Make the file's values the defaults of the command, so that options given there win.

    Returns:
        Names of the options that are said for this command; a configuration of HONES is for all of them.

    Raises:
        ValueError: No such file, not YAML, an unknown option, or a value that the option does not take; names
            the file and the key.
    """
    data = _read(args.config)
    actions = [a for a in args.parser._actions if a.dest not in ("help", "config", "debug")]
    options = {a.dest: a for a in actions}
    if is_hones_config(data):
        found = {k: v for k, v in _hones_options(args, data).items() if k in options or k == "outputs"}
        if args.device is not None:
            found.pop("device_map", None)  # the device that was given wins
        values = {name: setting.value for name, setting in found.items()}
        for name in found.keys() & options:
            values[name] = _value(options[name], found[name].value, args.config, found[name].key)
        args.parser.set_defaults(**values)
        return set()
    flags = {flag.lstrip("-").replace("-", "_"): a for a in actions for flag in a.option_strings}
    values = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in flags:
            hint = did_you_mean(name, flags) or f"; valid: {', '.join(flags)}"
            raise ValueError(f"{args.config}: unknown key {key!r}{hint}")
        values[flags[name].dest] = _value(flags[name], value, args.config, str(key))
    given = {name for name, value in values.items() if value != args.parser.get_default(name)}
    args.parser.set_defaults(**values)
    return given


def _read(file: str) -> dict[Any, Any]:
    """The content of the file, which holds options by name."""
    import yaml

    try:
        data: Any = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: {file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}, not options by name (`task: ocr`)")
    return data


def _value(option: argparse.Action, value: Any, file: str, key: str) -> Any:
    """A value of the file as the command line would read it."""
    if value is None:
        return option.default
    if option.nargs == 0:  # a switch
        if isinstance(value, bool):
            return value
        raise ValueError(f"{file}: {key} is {value!r}; valid: true, false")
    if isinstance(option, argparse._AppendAction):
        several = isinstance(value, list) and any(isinstance(part, str | list) for part in value)
        return [_one_value(option, part, file, key) for part in (value if several else [value])]
    return _one_value(option, value, file, key)


def _one_value(option: argparse.Action, value: Any, file: str, key: str) -> Any:
    flag = option.option_strings[-1]
    if option.choices is not None and value not in option.choices:
        hint = did_you_mean(str(value), list(map(str, option.choices)))
        raise ValueError(f"{file}: {key} is {value!r}; valid: {', '.join(map(str, option.choices))}{hint}")
    if isinstance(value, dict) and option.dest == "device_map":
        value = json.dumps(value)
    parts = list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, bool) or not all(isinstance(part, str | int | float) for part in parts):
        raise ValueError(f"{file}: {key} is {value!r}, which is no value of {flag}")
    if parts != [value] and option.type is None:
        raise ValueError(f"{file}: {key} takes one value, not the list {value!r}")
    read: Any = option.type or str
    try:
        return read(",".join(map(str, parts)))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        reason = f": {error}" if isinstance(error, argparse.ArgumentTypeError) else ""
        raise ValueError(f"{file}: {key} is {value!r}, which {flag} does not take{reason}") from error


def _hones_options(args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Setting]:
    """Options from a configuration of the HONES release; for steering from the data set asked for."""
    steers = args.parser.prog.endswith(" steer")
    dataset = args.dataset if args.dataset != args.parser.get_default("dataset") else None
    if steers and dataset is None:
        steering = data.get("steering")
        dataset = steering.get("dataset") if isinstance(steering, dict) else None
    return read_options(data, args.config, dataset, steers=steers)
