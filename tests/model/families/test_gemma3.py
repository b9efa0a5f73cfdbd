"""Gemma 3: pictures among the tokens, the attention of their tokens, what is refused, the processor."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_gemma, random_llava
from PIL import Image
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from hones_lens import HookedVLM
from hones_lens.app.runs.lengths import Lengths
from hones_lens.interventions import Box, token_mask
from hones_lens.model import model_without_weights


@pytest.fixture(scope="module")
def pair() -> tuple[Any, HookedVLM]:
    """Pictures of two times two tokens, whose pixels at the right and at the bottom fill no patch."""
    return random_gemma.make_pair(random_gemma.make_config(vision={"image_size": 30}), 5)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_a_mark_moves_the_cells_that_lie_on_it(pair: tuple[Any, HookedVLM]) -> None:
    """Tower, embeddings, heat map, box and positions agree, in both pictures of a row."""
    model = pair[1]
    blank = Image.new("RGB", (240, 180), (114, 114, 114))
    clean = model.prepare([blank, blank], "what is it?")
    assert clean.grids == (((2, 2), (2, 2)),) and clean.patch_grids == (((4, 4), (4, 4)),)
    for image in (0, 1):
        read = 28 / 30
        assert clean.regions[0][image] == pytest.approx((0, 0, 240 * read, 180 * read))
        for row, column in ((0, 1), (1, 0), (1, 1)):
            x, y = (column + 0.5) * 120 * read, (row + 0.5) * 90 * read
            marked = blank.copy()
            marked.paste((255, 255, 255), (int(x) - 4, int(y) - 4, int(x) + 4, int(y) + 4))
            inputs = model.prepare([marked, blank] if image == 0 else [blank, marked], "what is it?")
            names = ["vision_projector.hook_in", "vision_encoder.hook_embed"]
            both = [model.run_with_cache(i, names_filter=names)[1] for i in (clean, inputs)]
            tokens, patches = ((both[1][n] - both[0][n])[image].norm(dim=-1) for n in names)
            assert divmod(int(clean.heatmap(patches, 0, image).argmax()), 4) in {
                (2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)
            }
            values = torch.zeros(clean.input_ids.shape[1])
            values[clean.image_positions(0, image)] = tokens
            assert torch.equal(clean.heatmap(values, 0, image), tokens.view(2, 2))
            box = token_mask(clean, Box(x - 2, y - 2, x + 2, y + 2, image=image))[0].nonzero()[:, 0]
            assert box.tolist() == [int(clean.cell_positions(0, image)[row, column])]


def test_each_cell_is_embedded_at_its_position(pair: tuple[Any, HookedVLM]) -> None:
    """What enters the stream there is the projection of the mean of its patches, not scaled as words are."""
    hf, model = pair
    inputs = random_gemma.mixed_batch(model)
    _, cache = model.run_with_cache(inputs)
    tower: Any = model.vision_encoder.ln_post
    patches = cache["vision_encoder.ln_post.hook_normalized"] * tower.weight + tower.bias
    projector = hf.model.multi_modal_projector
    for row, before in ((0, 0), (1, 1)):
        for image in range(len(inputs.grids[row])):
            of_image = patches[before + image].view(4, 4, -1)
            for r, c in ((0, 0), (0, 1), (1, 0)):
                mean = of_image[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1))
                expected = projector.mm_soft_emb_norm(mean) @ projector.mm_input_projection_weight
                position = int(inputs.cell_positions(row, image)[r, c])
                torch.testing.assert_close(cache["hook_embed"][row, position], expected, atol=1e-5, rtol=1e-4)
    word = int(inputs.input_ids[2, -1])
    scaled = model.embed.weight[word] * model.cfg.d_model**0.5
    torch.testing.assert_close(cache["hook_embed"][2, -1], scaled)


def sees(inputs: Any, row: int, query: int, key: int, window: int | None) -> bool:
    """The rule: causal, or of one run of image tokens; in layers that slide, no more than a window back."""
    tokens, image = inputs.attention_mask[row].bool(), inputs.image_mask[row]
    if query == key:
        return True
    run = bool(image[min(query, key) : max(query, key) + 1].all())
    near = window is None or query - key < window
    return bool(tokens[key]) and near and (key < query or run)


def test_who_sees_whom(pair: tuple[Any, HookedVLM]) -> None:
    """Padding, two pictures a row; in the sliding layers a window of three, within pictures too."""
    text = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    _, model = random_gemma.make_pair(random_gemma.make_config(text=text), 2)
    inputs = random_gemma.mixed_batch(model)
    _, cache = model.run_with_cache(inputs, names_filter=[f"blocks.{i}.attn.hook_pattern" for i in range(3)])
    n = inputs.input_ids.shape[1]
    for layer, window in ((0, 3), (1, None), (2, 3)):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"] > 0
        for row in range(3):
            expected = torch.tensor([[sees(inputs, row, q, k, window) for k in range(n)] for q in range(n)])
            assert bool((pattern[row] == expected).all()), (layer, row)


def test_an_edit_of_a_later_image_token_reaches_an_earlier_one(pair: tuple[Any, HookedVLM]) -> None:
    model = pair[1]
    inputs = random_gemma.mixed_batch(model)
    first, last = inputs.image_positions(1, 0)[[0, -1]].tolist()

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[1, last] += 1
        return x

    names = ["blocks.1.hook_resid_post"]
    _, clean = model.run_with_cache(inputs, names_filter=names)
    with model.hooks(fwd_hooks=[("hook_embed", edit)]):
        _, changed = model.run_with_cache(inputs, names_filter=names)
    moved = (changed[names[0]] - clean[names[0]])[1].abs().amax(-1)
    assert bool((moved[first:last] > 1e-4).all()) and not bool(moved[:first].any())


def test_hugging_faces_processor_gives_the_same(pair: tuple[Any, HookedVLM]) -> None:
    hf, model = pair
    prepared = random_gemma.mixed_batch(model)
    one, two, three = random_gemma.make_images()
    chats = [
        [
            {
                "role": "user",
                "content": [*[{"type": "image"}] * n, {"type": "text", "text": words}],
            }
        ]
        for n, words in zip((1, 2, 0), random_llava.QUESTIONS, strict=True)
    ]
    theirs = random_gemma.hugging_faces_processor(model.processor)
    texts = [
        model.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats
    ]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
    mapping = dict(theirs(images=[[one], [two, three], []], text=texts, **options))
    assert torch.equal(mapping["input_ids"], prepared.input_ids)
    assert torch.equal(mapping["token_type_ids"], prepared.to_hf()["token_type_ids"])
    read = model.as_inputs(mapping)
    assert torch.equal(read.pixel_values, prepared.pixel_values) and read.grids == prepared.grids
    assert torch.equal(model(mapping), model(prepared))
    expected = hf(**mapping).logits
    assert random_llava.relative_difference(model(mapping), expected, prepared) <= 2e-5
    assert torch.equal(hf(**prepared.to_hf()).logits, expected)


def test_bfloat16_is_rounded_as_hugging_face_rounds() -> None:
    """The factor on embeddings to its type, the norms once behind their weight."""
    hf = random_gemma.make_hf(random_gemma.make_config(text={"hidden_size": 36}), 3).to(torch.bfloat16)
    model = HookedVLM.from_hf(hf, random_gemma.make_processor(hf.config))
    model.set_unembed_in_float32(False)
    inputs = random_gemma.mixed_batch(model)
    embeds, theirs = model.embed_text(inputs.input_ids), hf.get_input_embeddings()(inputs.input_ids)
    assert embeds.dtype == torch.bfloat16 and torch.equal(embeds, theirs)
    assert model.embed_scale == 6.0 and torch.equal(model.W_E, model.embed.weight * 6)
    x = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = hf.model.language_model.layers[1]
    assert torch.equal(model.blocks[1].ln1_post(x), layer.post_attention_layernorm(x))
    assert (
        random_llava.relative_difference(model(inputs).float(), hf(**inputs.to_hf()).logits.float(), inputs)
        < 0.05
    )
    odd = random_gemma.make_hf(random_gemma.make_config(text={"hidden_size": 44}), 3).to(torch.bfloat16)
    rounded = HookedVLM.from_hf(odd, random_gemma.make_processor(odd.config)).embed_text(inputs.input_ids)
    assert torch.equal(rounded, odd.get_input_embeddings()(inputs.input_ids))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("text_config", "attn_logit_softcapping", 50.0, r"attn_logit_softcapping=50\.0 is not handled"),
        ("text_config", "final_logit_softcapping", 30.0, r"final_logit_softcapping=30\.0 is not handled"),
        ("text_config", "use_bidirectional_attention", True, "use_bidirectional_attention=True"),
        ("text_config", "attention_bias", True, "attention_bias=True"),
        ("text_config", "attention_dropout", 0.1, r"attention_dropout=0\.1"),
        ("text_config", "layer_types", ["full_attention"] * 2 + ["linear_attention"], "linear_attention"),
        ("text_config", "layer_types", ["full_attention"] * 2, "2 entries for 3 layers"),
        ("text_config", "num_key_value_heads", 3, "num_key_value_heads=3 does not divide the 4 heads"),
        ("text_config", "hidden_activation", "nope", "hidden_activation='nope'"),
        ("text_config", "sliding_window", None, "sliding_window=None"),
        ("text_config", "vocab_size", 5, "image_token_index=.* is outside the vocabulary of 5"),
        (
            None,
            "mm_tokens_per_image",
            9,
            "mm_tokens_per_image=9 is not handled; handled: squares of a divisor",
        ),
        (None, "mm_tokens_per_image", 8, "mm_tokens_per_image=8 is not handled"),
        ("vision_config", "model_type", "clip_vision_model", "model_type='clip_vision_model'"),
        ("vision_config", "num_channels", 4, "num_channels=4"),
    ],
)
def test_config_values_that_are_refused(
    pair: tuple[Any, HookedVLM], part: str | None, key: str, value: Any, message: str
) -> None:
    config = deepcopy(pair[0].config)
    object.__setattr__(getattr(config, part) if part else config, key, value)
    with pytest.raises(ValueError, match=message):
        type(pair[1]).from_config(config, "gemma", torch.device("cpu"), torch.float32)


def test_a_rope_that_is_not_handled(pair: tuple[Any, HookedVLM]) -> None:
    config = deepcopy(pair[0].config)
    config.text_config.rope_parameters["full_attention"]["rope_type"] = "longrope"
    with pytest.raises(ValueError, match="rope_type='longrope' is not handled"):
        type(pair[1]).from_config(config, "gemma", torch.device("cpu"), torch.float32)


def test_token_types_are_read_as_hugging_face_reads_them(pair: tuple[Any, HookedVLM]) -> None:
    hf, model = pair
    mapping = random_gemma.mixed_batch(model).to_hf()
    types = mapping.pop("token_type_ids")
    with pytest.raises(ValueError, match="pixel_values without token_type_ids"):
        model(mapping)
    causal = hf(**mapping).logits
    assert (causal - hf(**mapping, token_type_ids=types).logits).abs().max() > 1e-2, (
        "it would be another model"
    )
    wrong = types.clone()
    wrong[1] = 0
    with pytest.raises(ValueError, match=r"row 1: token_type_ids mark 0 image tokens, input_ids have 8"):
        model({**mapping, "token_type_ids": wrong})
    text = model.prepare(None, ["is it red?"])
    alone = {name: value for name, value in text.to_hf().items() if name != "token_type_ids"}
    assert torch.equal(model(alone), model(text))


def test_inputs_that_are_refused(pair: tuple[Any, HookedVLM]) -> None:
    model = pair[1]
    mapping = random_gemma.mixed_batch(model).to_hf()
    cases = {
        "12 image tokens in input_ids, but pixel_values hold 2 images of 4 tokens": {
            "pixel_values": mapping["pixel_values"][:2]
        },
        r"this model reads \[n_images, 3, 30, 30\]": {"pixel_values": mapping["pixel_values"][..., :28]},
        "inputs key 'image_grid_thw' is not read by gemma3": {"image_grid_thw": torch.ones(3, 3).long()},
        "inputs key 'pixel_values_videos': video is not handled": {
            "pixel_values_videos": mapping["pixel_values"]
        },
    }
    for message, changed in cases.items():
        with pytest.raises(ValueError, match=message):
            model({**mapping, **changed})
    with pytest.raises(ValueError, match="already holds '<start_of_image>'"):
        model.prepare(None, "what is <start_of_image>?")
    with pytest.raises(ValueError, match="already holds '<image_soft_token>'"):
        model.prepare(None, "what is <image_soft_token>?")


def test_pan_and_scan_is_refused(pair: tuple[Any, HookedVLM]) -> None:
    processor = deepcopy(pair[1].processor)
    processor.image_processor.do_pan_and_scan = True
    model = HookedVLM.from_hf(pair[0], processor)
    with pytest.raises(ValueError, match=r"image_processor\.do_pan_and_scan=True is not handled"):
        model.prepare(random_gemma.make_images()[0], "is it red?")


def test_a_tokenizer_of_another_model(pair: tuple[Any, HookedVLM]) -> None:
    hf = deepcopy(pair[0])
    hf.config.eoi_token_index = 40
    with pytest.raises(ValueError, match=r"the model's eoi token: at eoi_token_index=40 it has"):
        HookedVLM.from_hf(hf, pair[1].processor).prepare(random_gemma.make_images()[0], "is it red?")


def test_a_template_of_text_alone_gets_the_marker_in_front(pair: tuple[Any, HookedVLM]) -> None:
    processor = deepcopy(pair[1].processor)
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %} model:"
    )
    model = HookedVLM.from_hf(pair[0], processor)
    with pytest.warns(UserWarning, match="takes only text"):
        inputs = model.prepare(random_gemma.make_images()[0], "is it red?")
    text = model.tokenizer.decode(inputs.input_ids[0])
    assert text.startswith("<bos>user: \n\n<start_of_image><image_soft_token>")
    assert "<end_of_image>\n\nis it red?" in text


def test_without_a_template_the_familys_is_used(pair: tuple[Any, HookedVLM]) -> None:
    processor = deepcopy(pair[1].processor)
    processor.chat_template = processor.tokenizer.chat_template = None
    model = HookedVLM.from_hf(pair[0], processor)
    for made in (random_gemma.mixed_batch, lambda m: random_gemma.mixed_batch(m, ["yes", "2", "no"])):
        assert torch.equal(made(model).input_ids, made(pair[1]).input_ids)


def test_a_saved_copy_is_read_by_both(pair: tuple[Any, HookedVLM], tmp_path: Path) -> None:
    model = pair[1]
    model.save_pretrained(tmp_path)
    again, inputs = HookedVLM.from_pretrained(str(tmp_path)), random_gemma.mixed_batch(model)
    assert torch.equal(random_gemma.mixed_batch(again).input_ids, inputs.input_ids)
    assert torch.equal(again(inputs), model(inputs))
    theirs = Gemma3ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert random_llava.relative_difference(theirs(**inputs.to_hf()).logits, model(inputs), inputs) <= 2e-5
    assert '"image_seq_length": 4' in (tmp_path / "processor_config.json").read_text(encoding="utf-8")


def test_plans_count_the_tokens_of_pictures() -> None:
    model = model_without_weights("gemma-3-4b")
    assert Lengths(model).of_picture((640, 480)) == 256
    assert model.cfg.vision.merge_size == 4 and model.cfg.sliding_window == 1024
    assert [block.attn.sliding for block in model.blocks[:7]] == [True] * 5 + [False, True]
    assert model.sliding_rotary is not None
    local, whole = model.sliding_rotary.inv_freq, model.rotary.inv_freq
    torch.testing.assert_close(local[1], torch.tensor(1e4 ** (-2 / 256)))
    torch.testing.assert_close(whole[1], torch.tensor(1e6 ** (-2 / 256) / 8))
