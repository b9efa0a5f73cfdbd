"""The logit lens: what the residual stream would say if the model ended at a layer."""

from hones_lens.lens.difference import LensDifference, LensToken, lens_difference
from hones_lens.lens.image import image_token_lens
from hones_lens.lens.table import LogitLens, Place, logit_lens

__all__ = [
    "LensDifference",
    "LensToken",
    "LogitLens",
    "Place",
    "image_token_lens",
    "lens_difference",
    "logit_lens",
]
