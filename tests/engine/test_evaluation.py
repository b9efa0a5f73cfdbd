"""A model's metric, against the answers of Hugging Face's model scored one by one."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.hf_task_loops import FAMILIES, examples_of, hf_prediction, pair

from hones_lens import evaluate
from hones_lens.results.statistics import metric_interval
from hones_lens.tasks.registry import load_task


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vqa", "caption", "retrieval"])
def test_metric_and_kinds_with_their_intervals(name: str, family: str) -> None:
    hf_model, model = pair(family)
    task, examples = load_task(name), list(examples_of(name, 4, family=family))
    found = evaluate(model, name, examples, batch_size=2, progress=False)
    said = [hf_prediction(hf_model, model, example, task) for example in examples]
    statistics = np.array([task.statistics(p, e) for p, e in zip(said, examples, strict=True)])
    assert found.scores == pytest.approx([task.score(p, e) for p, e in zip(said, examples, strict=True)])
    expected = metric_interval(task, statistics)
    assert found.metric == pytest.approx(expected.value) and found.interval.n == 4
    assert [found.interval.low, found.interval.high] == pytest.approx([expected.low, expected.high])
    assert list(found.kinds) == list(dict.fromkeys(example.kind for example in examples))
    for kind, of_kind in found.kinds.items():
        rows = [i for i, example in enumerate(examples) if example.kind == kind]
        assert of_kind.n == len(rows)
        assert of_kind.value == pytest.approx(float(task.metric(statistics[rows].sum(0))))
        assert (of_kind.interval is None) == (len(rows) < 2)
        if of_kind.interval is not None:
            alone = metric_interval(task, statistics[rows])
            assert [of_kind.interval.low, of_kind.interval.high] == pytest.approx([alone.low, alone.high])
        assert len(found.kinds) == 1 or (f"{kind}" in str(found) and str(of_kind) in str(found))
    assert str(found.interval) in str(found)
    saved = found.to_dict()
    assert saved["kind"] == "evaluation" and saved["interval"]["n"] == 4
