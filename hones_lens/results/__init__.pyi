from .arrays import load_json as load_json, save_json as save_json
from .base import Plottable as Plottable, Result as Result, html_table as html_table
from .chance import not_above_chance as not_above_chance
from .codec import to_json as to_json
from .correlation import pearson as pearson, spearman as spearman
from .files import (
    Component as Component,
    largest as largest,
    naming as naming,
    ranked as ranked,
    read_json as read_json,
    replaced_atomically as replaced_atomically,
    round_floats as round_floats,
    write_json as write_json,
)
from .labelled import Labelled as Labelled
from .noise import (
    BELOW_NOISE as BELOW_NOISE,
    Noise as Noise,
    is_below as is_below,
    noise_legend as noise_legend,
    noise_mark as noise_mark,
    with_marks as with_marks,
)
from .racing import Race as Race, RaceResult as RaceResult, Racing as Racing
from .statistics import (
    DRAWS as DRAWS,
    Interval as Interval,
    benjamini_hochberg as benjamini_hochberg,
    bootstrap_ends as bootstrap_ends,
    bootstrap_interval as bootstrap_interval,
    bootstrap_intervals as bootstrap_intervals,
    mean_difference_interval as mean_difference_interval,
    mean_interval as mean_interval,
    mean_over_pairs as mean_over_pairs,
    metric_interval as metric_interval,
    permutation_p as permutation_p,
    relative_interval as relative_interval,
    sign_flip_p as sign_flip_p,
    two_sided_p as two_sided_p,
)
