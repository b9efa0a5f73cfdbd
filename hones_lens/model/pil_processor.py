"""A tokenizer and a picture processor that need no torchvision, where Hugging Face's own processor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer, ProcessorMixin


class PilProcessor:
    """Tokenizer and PIL image processor of a checkpoint.

    Args:
        image_processor, tokenizer: Hugging Face's.
        chat_template: The processor's own; None: the tokenizer's.
        settings: What else `processor_config.json` says, for who reads a copy.

    Attributes:
        pictures: Class of the image processor.
        processor_class: Name of Hugging Face's own processor, written into `processor_config.json`; empty: no
            such file is written.
        kept_settings: Which of its other keys are kept.
    """

    pictures: Any = None
    processor_class = ""
    kept_settings: ClassVar[tuple[str, ...]] = ("image_seq_len", "image_seq_length")

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None, **settings: Any):
        self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, chat_template
        self.settings = settings

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, revision: str | None = None, trust_remote_code: bool = False, **options: Any
    ) -> PilProcessor:
        """Read both parts; options overrule those of the checkpoint's image processor."""
        text: Any = AutoTokenizer
        processor: Any = ProcessorMixin
        revision = revision or "main"
        tokenizer = text.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
        pictures = cls.pictures.from_pretrained(folder, revision=revision, **options)
        settings, _ = processor.get_processor_dict(folder, revision=revision)
        template = settings.pop("chat_template", None) or tokenizer.chat_template
        kept = {key: value for key, value in settings.items() if key in cls.kept_settings}
        return cls(pictures, tokenizer, template, **kept)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both parts in Hugging Face's format, and the chat template if it is not the tokenizer's."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        if self.processor_class:
            written = json.dumps({"processor_class": self.processor_class, **self.settings}, indent=2)
            (Path(folder) / "processor_config.json").write_text(written + "\n", encoding="utf-8")
        if isinstance(self.chat_template, str) and self.chat_template != self.tokenizer.chat_template:
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
