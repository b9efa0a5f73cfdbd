"""Every function of `transformer_lens.patching` on pictures, against patches on Hugging Face's own model."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.hf_patching import ALL_POS, BY_POS, Case, log_prob, per_example, scalar
from torch import Tensor
from transformer_lens import patching
from transformer_lens.utilities.statistics import derive_generator

TOLERANCE = 5e-5
PLAIN = (
    *("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_head_pattern_by_pos"),
    *(f"{name}_by_pos" for name in BY_POS),
    *(f"{name}_all_pos" for name in ALL_POS),
)
NAMES = (*PLAIN, "attn_head_pattern_dest_src_pos")
EVERY = ("block_every", "attn_head_all_pos_every", "attn_head_by_pos_every")


@pytest.fixture(scope="module", params=["llava", "qwen, gqa"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module", params=["llava", "qwen, mha"])
def mha(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def function(name: str) -> Callable:
    return getattr(patching, f"get_act_patch_{name}")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_no_function_is_forgotten() -> None:
    """Every public function that takes a model is tested in this file."""
    direct = ("direct_path", "direct_path_all_sources")
    tested = {f"get_act_patch_{name}" for name in (*NAMES, *EVERY, *direct)}
    public = {
        name
        for name, value in vars(patching).items()
        if callable(value) and not name.startswith("_") and "model" in _parameters(value)
    }
    assert public == {*tested, "generic_activation_patch"}


def _parameters(value: Callable) -> list[str]:
    home = getattr(getattr(value, "func", value), "__module__", "")
    return list(inspect.signature(value).parameters) if home == patching.__name__ else []


# -- single functions ----------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PLAIN)
def test_patches_are_those_on_hugging_faces_model(case: Case, name: str) -> None:
    kept = {key: value.clone() for key, value in case.cache.items()}
    given = {key: value.clone() for key, value in case.corrupted.to_hf().items()}
    bound = case.encoded if name.endswith("by_pos") else case.bound
    found = function(name)(bound, case.tokens, case.cache, per_example, reduce="none")
    expected = case.expected(name)
    close(found.values, expected)
    assert (expected - case.baseline).abs().amax() > 1e-2, "no patch has any effect"
    pictures = (expected - case.baseline).flatten(0, -2)[:, :2]
    assert pictures.abs().amax() > 1e-2, "no patch has an effect on a row with a picture"
    assert all(torch.equal(case.cache[key], value) for key, value in kept.items())
    assert all(torch.equal(case.bound.inputs.to_hf()[key], value) for key, value in given.items())


def test_single_entries_of_the_pattern(case: Case) -> None:
    """A sample of the entries: an index of one's own, which every function takes."""
    name = "attn_head_pattern_dest_src_pos"
    cells = [at for at in itertools.product(*map(range, case.shape(name))) if at[3] <= at[2]][::9]
    index = pd.DataFrame(cells, columns=["layer", "head_index", "dest_pos", "src_pos"])
    options = {"index_axis_names": None, "index_df": index}
    found = function(name)(case.bound, case.tokens, case.cache, per_example, reduce="mean", **options)
    expected = torch.stack([per_example(case.patched(name, at)).mean() for at in cells])
    close(found, expected)
    assert (expected - case.baseline.mean()).abs().amax() > 1e-3


def test_all_entries_of_the_pattern(case: Case) -> None:
    """On a text of five tokens; above the diagonal there is nothing to patch, so the metric stays."""
    clean, corrupted = torch.tensor([[5, 6, 21, 22, 23]]), torch.tensor([[5, 9, 21, 31, 23]])
    cache = case.model.run_with_cache(clean)[1]
    bound = case.model.bind(corrupted)
    found = patching.get_act_patch_attn_head_pattern_dest_src_pos(bound, corrupted, cache, scalar)
    assert found.shape == (case.layers, case.heads, 5, 5)
    baseline = scalar(case.twin.logits(bound.inputs))
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    close(found[..., above], baseline.expand_as(found[..., above]))
    theirs = [case.twin.attentions(case.model.as_inputs(x))[1] for x in (clean, corrupted)]
    for head, key in itertools.product(range(case.heads), range(5)):
        pattern = theirs[1].clone()
        pattern[:, head, 4, key] = theirs[0][:, head, 4, key]
        expected = scalar(case.twin.logits(bound.inputs, case.twin.mix_by(1, pattern)))
        close(found[1, head, 4, key], expected)
    assert (found[1, :, 4] - baseline).abs().amax() > 1e-2


def test_patching_everything_gives_the_clean_metric(case: Case) -> None:
    """At the first layer the stream is all that there is; in a row of text alone that is one patch."""

    def all_of_it(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
        return clean.clone()

    clean = per_example(case.twin.logits(case.clean))
    found = patching.generic_activation_patch(
        case.bound,
        case.tokens,
        case.cache,
        per_example,
        all_of_it,
        "resid_pre",
        index_df=pd.DataFrame({"layer": range(case.layers)}),
        reduce="none",
    )
    close(found.values, clean.expand(case.layers, -1))
    assert (clean - case.baseline).abs().min() > 1e-3


def test_patching_with_itself_changes_nothing(case: Case) -> None:
    own = case.corrupted_cache
    for name in ("resid_pre", "resid_mid", "mlp_out", "attn_head_out_all_pos", "attn_head_q_all_pos"):
        found = function(name)(case.bound, case.tokens, own, per_example, reduce="none").values
        close(found, case.baseline.expand_as(found))


def test_results_do_not_depend_on_the_order(case: Case) -> None:
    """Setters write in place: nothing that a later run reads may have been written to."""
    names = [f"{name}_all_pos" for name in ALL_POS] + ["mlp_out"]

    def run(order: list[str]) -> dict[str, Tensor]:
        args = (case.bound, case.tokens, case.cache, scalar)
        return {name: function(name)(*args) for name in order}

    first, again = run(names), run(names[::-1])
    assert all(torch.equal(first[name], again[name]) for name in names)
    kept = case.encoded.inputs.image_embeds.clone()
    found = patching.get_act_patch_resid_pre(case.encoded, case.tokens, case.cache, scalar)
    close(found, case.expected("resid_pre").mean(-1))
    assert torch.equal(case.encoded.inputs.image_embeds, kept)


# -- functions of several ------------------------------------------------------------------------


def padded(case: Case, name: str) -> Tensor:
    """[*axes batch] with zeros for heads that keys and values do not have; the head axis is the last."""
    values = case.expected(name)
    if name == "attn_head_pattern_by_pos":
        values = values.transpose(1, 2)
    return torch.nn.functional.pad(values, (0, 0, 0, case.heads - values.shape[-2]))


def every(case: Case, name: str) -> Tensor:
    if name == "block_every":
        return torch.stack([case.expected(part) for part in ("resid_pre", "attn_out", "mlp_out")])
    suffix = name.removeprefix("attn_head").removesuffix("_every")
    return torch.stack([padded(case, part + suffix) for part in ALL_POS])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EVERY)
def test_functions_of_several(case: Case, name: str) -> None:
    options = {"reduce": "none", "baseline": True} if name == "block_every" else {}
    metric = per_example if options else scalar
    found = function(name)(case.encoded, case.tokens, case.cache, metric, **options)
    expected = every(case, name)
    if not options:
        close(found, expected.mean(-1))
        return
    close(found.values, expected)
    close(found.baseline, case.baseline)
    assert found.axis_names == ["patch_type", "layer", "pos"]
    assert found.patch_type_names == ["resid_pre", "attn_out", "mlp_out"]


# -- the statistics of a PatchingResult ----------------------------------------------------------


@pytest.fixture(scope="module")
def result(case: Case) -> patching.PatchingResult:
    with torch.no_grad():
        metrics = {"difference": per_example, "log_prob": log_prob}
        args = (case.bound, case.tokens, case.cache, metrics)
        return patching.get_act_patch_resid_mid(*args, reduce="none", baseline=True)


def test_several_metrics_and_what_they_were_before(case: Case, result: patching.PatchingResult) -> None:
    close(result["difference"].values, case.expected("resid_mid"))
    at = (1, case.n - 1)
    close(result["log_prob"].values[at], log_prob(case.patched("resid_mid", at)))
    close(
        result.baseline, torch.stack([f(case.twin.logits(case.corrupted)) for f in (per_example, log_prob)])
    )
    frame = result.to_dataframe()
    chosen = frame.query("metric == 'difference' and layer == 1 and pos == @at[1] and example == 0")
    assert chosen["value"].item() == pytest.approx(case.expected("resid_mid")[1, -1, 0].item(), abs=TOLERANCE)
    assert len(frame) == 2 * case.layers * case.n * 3


def test_effects_and_recovery(case: Case, result: patching.PatchingResult) -> None:
    one, expected = result["difference"], case.expected("resid_mid")
    clean = per_example(case.twin.logits(case.clean))
    close(one.effect(), expected - case.baseline)
    gap = clean - case.baseline
    assert gap.abs().min() > 1e-2
    torch.testing.assert_close(one.normalized(clean), (expected - case.baseline) / gap, atol=5e-3, rtol=1e-3)
    close(one.mean(), expected.mean(-1))
    by_numpy = np.std(expected.double().numpy(), axis=-1, ddof=1) / np.sqrt(3)
    close(one.stderr(), torch.tensor(by_numpy, dtype=torch.float32))


def test_bootstrap_intervals(case: Case, result: patching.PatchingResult) -> None:
    low, high = result["difference"].bootstrap_ci(n_resamples=200, seed=5, of_effect=True)
    effects = (case.expected("resid_mid") - case.baseline).double().numpy()
    generator = derive_generator(5, "bootstrap", "mean")
    draws = torch.randint(0, 3, (200, 3), generator=generator).numpy()
    means = np.stack([effects[..., rows].mean(-1) for rows in draws], axis=-1)
    for found, quantile in ((low, 0.025), (high, 0.975)):
        close(found, torch.tensor(np.quantile(means, quantile, axis=-1), dtype=torch.float32))
    assert (low < high).any()


def test_permutation_p_values(case: Case, result: patching.PatchingResult) -> None:
    """All eight ways to flip the signs of three effects, one at a time."""
    found = result["difference"].permutation_pvalue(alternative="greater")
    effects = (case.expected("resid_mid") - case.baseline).double()
    clear = effects.abs().amin(-1) > 1e-3  # an effect of nothing but rounding is a matter of chance
    for at in clear.nonzero().tolist():
        effect = effects[tuple(at)]
        flips = [(effect * torch.tensor(s)).mean() for s in itertools.product((1.0, -1.0), repeat=3)]
        hits = sum(float(flip >= effect.mean() - 1e-9) for flip in flips)
        assert found[tuple(at)].item() == pytest.approx(hits / 8)
    assert clear.any()


# -- direct paths --------------------------------------------------------------------------------


def direct_path(case: Case, source: tuple[int, int], letter: str, target: tuple[int, int]) -> Tensor:
    """The source's change of writing, added to what one later head alone reads."""
    layer, head = source
    rows = slice(head * case.twin.d_head, (head + 1) * case.twin.d_head)
    z = (
        case.hf_clean[f"blocks.{layer}.attn.hook_z"][:, :, head]
        - case.twin.seen(case.corrupted)[f"blocks.{layer}.attn.hook_z"][:, :, head]
    )
    o_proj = case.twin.hf.get_submodule(f"model.language_model.layers.{layer}.self_attn.o_proj")
    wrote = z @ o_proj.weight[:, rows].T
    return scalar(
        case.twin.logits(case.corrupted, case.twin.fork(target[0], letter, target[1], lambda x: x + wrote))
    )


def check_direct_paths(case: Case, letter: str) -> None:
    args = (case.bound, case.tokens, case.cache, case.corrupted_cache, scalar)
    found = patching.get_act_patch_direct_path(
        *args, src_layer=0, src_head=1, component=letter, verbose=False
    )
    assert found.shape == (case.layers, case.heads) and (found[0] == 0).all()
    expected = torch.stack([direct_path(case, (0, 1), letter, (1, head)) for head in range(case.heads)])
    close(found[1], expected)
    assert (expected - case.baseline.mean()).abs().amax() > 1e-3
    assert not case.model.cfg.use_split_qkv_input


def test_direct_paths_into_queries(case: Case) -> None:
    check_direct_paths(case, "q")


@pytest.mark.parametrize("letter", ["k", "v"])
def test_direct_paths_into_keys_and_values(mha: Case, letter: str) -> None:
    check_direct_paths(mha, letter)


def test_direct_paths_of_all_sources(case: Case) -> None:
    args = (case.bound, case.tokens, case.cache, case.corrupted_cache, scalar)
    found = patching.get_act_patch_direct_path_all_sources(*args, verbose=False)
    assert found.shape == (case.layers, case.heads) * 2
    assert (found[1] == 0).all() and (found[0, :, 0] == 0).all()
    for source, target in ((0, 1), (1, 0), (case.heads - 1, case.heads - 1)):
        close(found[0, source, 1, target], direct_path(case, (0, source), "q", (1, target)))


def test_direct_paths_into_shared_keys_are_refused(case: Case) -> None:
    if case.kv == case.heads:
        return
    args = (case.bound, case.tokens, case.cache, case.corrupted_cache, scalar)
    for letter in "kv":
        with pytest.raises(ValueError, match="GQA/MQA"):
            patching.get_act_patch_direct_path(*args, src_layer=0, src_head=0, component=letter)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_model_refuses_image_tokens_without_pictures(case: Case, name: str) -> None:
    with pytest.raises(ValueError, match=r"8 image tokens in input_ids, but pixel_values hold 0 images"):
        function(name)(case.model, case.tokens, case.cache, scalar)


def test_a_model_in_training_mode_is_refused(case: Case) -> None:
    case.model.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            patching.get_act_patch_resid_pre(case.bound, case.tokens, case.cache, scalar)
    finally:
        case.model.eval()
