"""Caches of runs that compute or keep fewer positions: the final norm's axis is that of the blocks."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin
from torch import Tensor

from hones_lens import VLMInputs

EPS = 1e-3
Trim = int | Tensor
TRIMS = [1, 3, torch.tensor([5, 9, -1]), torch.tensor([-1, 4])]


class Run:
    """A hooked model and Hugging Face's own on a mixed batch, where no run keeps all logits."""

    def __init__(self, made: ModuleType) -> None:
        self.twin = Twin(made, seed=31, text={"num_key_value_heads": 2})
        self.model = self.twin.model
        self.inputs: VLMInputs = made.mixed_batch(self.model)
        self.logits = self.twin.logits(self.inputs)
        theirs = self.twin.seen(self.inputs)
        self.end = theirs["blocks.2.hook_resid_post"]
        self.scale = (self.end.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        self.real = self.inputs.attention_mask.bool()


@pytest.fixture(scope="module", params=[random_llava, random_qwen])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("trim", TRIMS)
def test_the_final_norm_is_kept_where_the_stream_is(run: Run, trim: Trim) -> None:
    logits, cache = run.model.run_with_cache(run.inputs, logits_to_keep=trim)
    index = trim if isinstance(trim, Tensor) else slice(-trim, None)
    close(logits[run.real[:, index]], run.logits[:, index][run.real[:, index]])
    close(cache["ln_final.hook_scale"][run.real], run.scale[run.real])
    close(cache["ln_final.hook_normalized"][run.real], (run.end / run.scale)[run.real])


@pytest.mark.parametrize("trim", TRIMS)
def test_contributions_add_up_to_hfs_logits_at_every_position(run: Run, trim: Trim) -> None:
    _, cache = run.model.run_with_cache(run.inputs, logits_to_keep=trim)
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition()):
        found = cache.logit_attrs(stack, tokens=9).sum(0)
        close(found[run.real], run.logits[..., 9][run.real])
    last = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), tokens=9, pos_slice=-1).sum(0)
    close(last, run.logits[:, -1, 9])
    close(cache.accumulated_resid(apply_ln=True)[-1][run.real] @ run.model.W_U, run.logits[run.real])
    close(cache.logit_lens(positions=None).values[-1][run.real], run.logits[run.real])


@pytest.mark.parametrize("cut", [-1, (4, -2), [0, 3, -2], slice(None, None, 5)])
def test_kept_positions_and_kept_logits_together(run: Run, cut) -> None:
    _, cache = run.model.run_with_cache(run.inputs, logits_to_keep=1, pos_slice=cut)
    index = [cut] if isinstance(cut, int) else slice(*cut) if isinstance(cut, tuple) else cut
    real = run.real[:, index]
    close(cache["ln_final.hook_scale"][real], run.scale[:, index][real])
    found = cache.logit_attrs(cache.decompose_resid(), tokens=9).sum(0)
    close(found[real], run.logits[:, index, 9][real])


def test_an_edit_of_the_final_norm_means_the_same_position(run: Run) -> None:
    """An edit at one position of `ln_final`, wherever logits are asked for."""

    def edit(x: Tensor, hook) -> Tensor:
        return torch.cat((x[:, :7], 2 * x[:, 7:8], x[:, 8:]), dim=1)

    hooks = [("ln_final.hook_normalized", edit)]
    at = torch.tensor([7, 8])
    found = run.model.run_with_hooks(run.inputs, fwd_hooks=hooks, logits_to_keep=at)
    expected = run.logits[:, at] * torch.tensor([2.0, 1.0])[None, :, None]
    close(found[run.real[:, at]], expected[run.real[:, at]])


def test_a_scale_by_head_is_refused(run: Run) -> None:
    """Where the split inputs run, the norm before attention has a scale for every head."""
    names = [name for name in run.model.hook_dict if name.startswith("blocks")]
    _, cache = run.model.run_with_cache(run.inputs, names_filter=names)
    for row in (cache, cache.apply_slice_to_batch_dim(0)):
        stack = row.decompose_resid(layer=1, incl_embeds=False)
        with pytest.raises(ValueError, match=r"blocks\.1\.ln1\.hook_scale is by head"):
            row.apply_ln_to_stack(stack, layer=1)
        with pytest.raises(ValueError, match="by head"):
            row.stack_neuron_results(1, apply_ln=True, project_output_onto=torch.ones(32))
        assert row.apply_ln_to_stack(stack, layer=1, mlp_input=True).shape == stack.shape


def test_a_stack_of_other_positions_is_refused(run: Run) -> None:
    """Without a pos_slice the scale is of all positions, and a stack of one would be broadcast to them."""
    _, cache = run.model.run_with_cache(run.inputs)
    rows, n = run.inputs.input_ids.shape
    last = cache.decompose_resid(pos_slice=-1)
    for stack in (last, last[:, :, None], cache.decompose_resid(pos_slice=[3])):
        shape = list(stack.shape[1:-1])
        with pytest.raises(
            ValueError, match=f"{shape} does not fit the norm's scale [{rows}, {n}]".replace("[", r"\[")
        ):
            cache.logit_attrs(stack, tokens=9)
    with pytest.raises(ValueError, match="does not fit"):
        cache.logit_attrs(cache.decompose_resid(), tokens=9, pos_slice=-1)
    with pytest.raises(ValueError, match="does not fit"):
        cache.apply_ln_to_stack(cache.decompose_resid()[:, 0], has_batch_dim=False)
    for cut in (-1, (3, 9), [2, 5]):
        close_at = cache.logit_attrs(cache.decompose_resid(pos_slice=cut), tokens=9, pos_slice=cut).sum(0)
        index = slice(*cut) if isinstance(cut, tuple) else cut
        close(close_at[run.real[:, index]], run.logits[:, index, 9][run.real[:, index]])


@pytest.mark.parametrize("row", [0, 1, 2])
def test_attributions_of_one_row(run: Run, row: int) -> None:
    """By batch_slice, by a sliced cache, and of a cache without a batch axis."""
    _, cache = run.model.run_with_cache(run.inputs, logits_to_keep=1)
    real, expected = run.real[row], run.logits[row, :, 9][run.real[row]]
    of_row = cache.logit_attrs(cache.decompose_resid(), tokens=9, batch_slice=row).sum(0)
    close(of_row[real], expected)
    alone = cache.apply_slice_to_batch_dim(row)
    close(alone.logit_attrs(alone.decompose_resid(), tokens=9, has_batch_dim=False).sum(0)[real], expected)
    close(alone.logit_attrs(alone.decompose_resid(), tokens=9).sum(0)[real], expected)
    close(alone.logit_lens(positions=None).values[-1][..., 9][real], expected)
    kept = cache.apply_slice_to_batch_dim([row])
    close(kept.logit_attrs(kept.decompose_resid(), tokens=9).sum(0)[0, real], expected)
    close(
        kept.logit_attrs(kept.decompose_resid()[:, 0], tokens=9, has_batch_dim=False).sum(0)[real], expected
    )
    heads = alone.stack_head_results(incl_remainder=True)
    close(alone.logit_attrs(heads, tokens=9, has_batch_dim=False).sum(0)[real], expected)
    neurons = alone.get_full_resid_decomposition()
    close(alone.logit_attrs(neurons, tokens=9, has_batch_dim=False).sum(0)[real], expected)
    some = cache.logit_lens(positions=None, batch_slice=row).values[-1][..., 9]
    close(some[real], expected)
