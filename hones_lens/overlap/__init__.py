"""Across tasks (HONES eq. H6): shared neurons, what masking them costs, what they write."""

from hones_lens.overlap.group_masking import GroupMasking, mask_groups
from hones_lens.overlap.groups import Overlap, Shared, overlap
from hones_lens.overlap.lens import LensDelta, LensToken, lens_delta

__all__ = [
    "GroupMasking",
    "LensDelta",
    "LensToken",
    "Overlap",
    "Shared",
    "lens_delta",
    "mask_groups",
    "overlap",
]
