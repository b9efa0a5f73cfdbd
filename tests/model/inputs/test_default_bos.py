"""Whether a tokenizer puts a beginning-of-sequence token before a text by itself is in the config."""

from __future__ import annotations

import pytest
from helpers import true_vocabularies

pytestmark = [pytest.mark.network]


@pytest.mark.exhaustive
def test_llamas_tokenizer_does_and_qwens_does_not() -> None:
    for (_, model), expected in ((true_vocabularies.llava(), True), (true_vocabularies.qwen(), False)):
        assert model.cfg.default_prepend_bos is model.cfg.tokenizer_prepends_bos is expected
        bos = model.tokenizer.bos_token_id
        assert (model.to_tokens("a red circle")[0, 0].item() == bos) is expected
