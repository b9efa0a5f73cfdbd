"""What the page is given: the numbers are the model's own, the text is readable, the tokens are all there."""

from __future__ import annotations

import base64
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import example_results, picture_files
from helpers.explorer_views import example, prompt, shipped, views
from PIL import Image

from hones_lens.app.explorer.state import Edit
from hones_lens.app.explorer.views import SECTIONS, ExplorerViews, section_inputs

MODELS = ["tiny-llava", "tiny-qwen2.5-vl"]


@pytest.fixture(scope="module", params=MODELS)
def one(request: pytest.FixtureRequest) -> ExplorerViews:
    return views(request.param)


def test_the_scene_has_every_token_of_the_prompt(one: ExplorerViews) -> None:
    scene, model = one.scene(), one.model
    inputs = model.prepare(example().image, prompt())
    (rows, columns), (image,) = inputs.grids[0][0], scene["images"]
    assert (image["rows"], image["columns"], image["region"]) == (rows, columns, [0, 0, 1, 1])
    places = inputs.image_mask[0].nonzero()[:, 0].tolist()
    assert places == image["cells"]
    assert [p for p, cell in enumerate(scene["tokens"]) if cell.get("image")] == places
    ids = [cell["id"] for cell in scene["tokens"][: scene["first"] + 1] if "id" in cell]
    assert ids == inputs.input_ids[0][~inputs.image_mask[0]].tolist()
    texts = [cell["text"] for cell in scene["tokens"] if "text" in cell]
    assert "▁green" in texts and "↵" in texts and not any(re.search(r"\s", text) for text in texts)
    shown = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).convert("RGB")
    assert np.abs(np.asarray(shown, int) - np.asarray(example().image, int)).mean() < 4
    assert scene["text"] == model.generate(inputs, 12)[0] == "cross"


def test_attention_is_the_pattern_to_a_byte_and_the_heads_to_six_digits(one: ExplorerViews) -> None:
    edit = Edit("head", 0, 2)
    state = replace(one.start(), token=one.answered.last_prompt_position - 3, head=(1, 2), edits=(edit,))
    with torch.no_grad(), one.model.hooks([edit.hook]):
        _, cache = one.model.run_with_cache(one.answered.sequence)
    n = one.answered.n_tokens
    pattern = torch.stack([cache["pattern", layer][0, :, state.token] for layer in range(4)])
    packed = one.section("attention", state)
    found = torch.frombuffer(bytearray(base64.b64decode(packed["bytes"])), dtype=torch.uint8)
    found = found.view(4, 8, n) / 255 * torch.tensor(packed["largest"])[..., None]
    assert packed["keys"] == n
    assert ((found - pattern).abs() <= pattern.amax(-1, keepdim=True) / 509).all()
    exact = torch.tensor(one.section("head", state)["attention"])
    torch.testing.assert_close(exact, pattern[1, 2], atol=1e-6, rtol=1e-5)


def test_probabilities_are_those_of_the_model_under_the_interventions(one: ExplorerViews) -> None:
    start = one.start()
    state = start.edited("head", (0, 5), None).edited("head", start.head, 0.0).edited("neuron", (3, 1), 9.0)
    answer, prepared = one.section("answer", state), one.model.prepare(example().image, prompt())
    with torch.no_grad():
        now = one.model.run_with_hooks(prepared, fwd_hooks=state.interventions)[0, -1].softmax(-1)
        was = one.model(prepared)[0, -1].softmax(-1)
        with one.model.hooks(state.interventions):
            assert answer["text"] == one.model.generate(prepared)[0]
    first = one.answered.answer[0]
    assert answer["p"][0] == pytest.approx(now[first].item(), rel=1e-4)
    assert answer["was"][0] == pytest.approx(was[first].item(), rel=1e-4)
    assert answer["p"][0] != pytest.approx(answer["was"][0], rel=1e-4)
    likely = {row[3]: row[1:3] for row in answer["likely"]}
    assert [row[1] for row in answer["likely"]][:4] == pytest.approx(now.topk(4).values.tolist(), rel=1e-4)
    top = one.vocabulary_entry(int(was.argmax()))
    assert likely[top][1] == pytest.approx(was.max().item(), rel=1e-4)


def test_of_several_tokens_the_answer_looked_at_is_the_one_predicted(one: ExplorerViews) -> None:
    later = replace(one.start(), token=one.answered.last_prompt_position + 1)
    grown = one.model.prepare(example().image, prompt()).extended(one.answered.answer[None, :1])
    with torch.no_grad():
        expected = one.model(grown)[0, -1].softmax(-1)
    answer = one.section("answer", later)
    assert answer["step"] == 1 == one.section("map", later)["step"]
    assert answer["likely"][0][1] == pytest.approx(expected.max().item(), rel=1e-4)


def test_the_map_is_of_direct_effects_or_of_the_scores_given(one: ExplorerViews) -> None:
    start = one.start()
    scores = torch.tensor(one.section("map", start)["scores"])
    _, cache = one.model.run_with_cache(one.answered.sequence)
    results = cache.stack_head_results(layer=-1, pos_slice=one.answered.last_prompt_position)
    stack = cache.apply_ln_to_stack(results, layer=-1, pos_slice=one.answered.last_prompt_position)[:, 0]
    every = one.model.tokens_to_residual_directions(torch.arange(one.model.cfg.d_vocab)).detach()
    direction = every[one.answered.answer[0]] - every.mean(0)
    torch.testing.assert_close(scores.flatten(), (stack @ direction).detach(), atol=1e-4, rtol=1e-3)
    assert start.head == divmod(int(scores.argmax()), 8)
    given = example_results.heads((4, 8))
    other = views(one.model.cfg.model_name, heads=given)
    torch.testing.assert_close(
        torch.tensor(other.section("map", other.start())["scores"]), given.scores.float()
    )
    assert given.task in other.scene()["scores"] and other.start().head == given.top(1)[0][:2]


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head scores \(3, 8\) for a model of \(4, 8\) heads"):
        views(heads=example_results.heads((3, 8)))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_neurons_tokens_and_activation(one: ExplorerViews, sign: int) -> None:
    """Of a neuron that is active below 0 those are promoted that its output row suppresses."""
    start = one.start()
    _, cache = one.model.run_with_cache(one.answered.sequence, names_filter="blocks.2.mlp.hook_post")
    active = cache["blocks.2.mlp.hook_post"][0]
    index = int((sign * active[start.token]).argmax())
    found = one.section("neuron", replace(start, neuron=(2, index)))
    assert found["sign"] == sign == active[start.token, index].sign()
    every = one.model.tokens_to_residual_directions(torch.arange(one.model.cfg.d_vocab)).detach()
    read = every @ (sign * one.model.blocks[2].mlp.W_out[index].detach())
    for key, largest in (("up", True), ("down", False)):
        top = read.topk(6, largest=largest)
        assert [row[2] for row in found[key]] == [one.vocabulary_entry(t) for t in top.indices.tolist()]
        expected = (top.values - read.mean()).tolist()
        assert [row[1] for row in found[key]] == pytest.approx(expected, abs=1e-4)
    assert found["activation"] == pytest.approx(active[:, index].tolist(), abs=1e-5)


def test_lists_are_ordered_by_what_they_say(one: ExplorerViews) -> None:
    state = one.start()
    head, neuron = one.section("head", state), one.section("neuron", state)
    written = [abs(row[3]) for row in head["feeds"]]
    assert written == sorted(written, reverse=True) and state.neuron == tuple(head["feeds"][0][:2])
    layer, index, change, effect = head["feeds"][0]
    length = one.model.blocks[layer].mlp.W_out[index].norm().item()
    assert effect == pytest.approx(change * length, rel=1e-4)
    assert [abs(row[2]) for row in neuron["fed"]] == sorted((abs(r[2]) for r in neuron["fed"]), reverse=True)
    assert [*state.head, pytest.approx(change, rel=1e-3)] in neuron["fed"]
    assert all(row["along"] >= 0 for row in head["directions"])
    lens = one.section("lens", state)["rows"]
    assert lens[-1][0][1] == pytest.approx(one.section("answer", state)["p"][0], rel=1e-4)


def test_sections_are_json_and_depend_on_what_reads_says(one: ExplorerViews) -> None:
    start = one.start()
    other = {"head": (2, 3), "neuron": (1, 1), "lens": 0, "show": "neuron", "token": 3}
    for name in SECTIONS:
        text = json.dumps(one.section(name, start), allow_nan=False)
        for field, value in other.items():
            changed = replace(start, **{field: value})
            if section_inputs(name, changed) == section_inputs(name, start):
                assert json.dumps(one.section(name, changed)) == text, (name, field)


def test_threads_that_share_the_views_do_not_see_each_others_edits() -> None:
    start = views().start()
    edits = [(), (Edit("head", 0, 5),), (Edit("neuron", 1, 3, 4.0),), (Edit("head", 1, 1, 0.0),)]
    states = [replace(start, edits=edit) for edit in edits]
    alone = [views().section("answer", state) for state in states]
    shared = views()
    with ThreadPoolExecutor(len(states)) as pool:
        assert list(pool.map(lambda state: shared.section("answer", state), states * 3)) == alone * 3


def test_a_prompt_without_picture_and_one_with_two() -> None:
    model = shipped("tiny-llava")
    alone = ExplorerViews(model, None, "what color is it?", max_new_tokens=2)
    assert alone.scene()["images"] == [] and len(alone.answered.answer) <= 2
    two = ExplorerViews(
        model, [example().image, example().image.crop((0, 0, 112, 60))], "which?", max_new_tokens=2
    )
    first, second = two.scene()["images"]
    mask = two.answered.prompt.image_mask[0].nonzero()[:, 0].tolist()
    assert (first["cells"][0], second["cells"][0]) == (mask[0], mask[64])
    left, top, right, bottom = two.answered.prompt.regions[0][1]
    assert second["region"] == [left / 112, top / 60, right / 112, bottom / 60]
    for name in SECTIONS:
        alone.section(name, alone.start())
        two.section(name, two.start())


def test_turned_pictures_and_arrays_are_shown_as_the_model_sees_them(tmp_path) -> None:
    upright = example().image.resize((112, 84))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "a.png", exif=picture_files.exif(6))
    model = shipped("tiny-llava")
    whole = ExplorerViews(model, upright, prompt())
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), [tmp_path / "a.png"], np.asarray(upright)):
        one = ExplorerViews(model, given, prompt())
        assert one.scene() == whole.scene()
    assert ExplorerViews(model, None, prompt()).pictures == []
