from .check import check_data as check_data
from .examples import Example as Example
from .loading import load_examples as load_examples, tasks_of as tasks_of
from .pairs import CounterfactualPair as CounterfactualPair, counterfactual_pairs as counterfactual_pairs
from .shapes import (
    ATTRIBUTES as ATTRIBUTES,
    COLORS as COLORS,
    NAMES as NAMES,
    NUMBERS as NUMBERS,
    SHAPES as SHAPES,
    SIZE as SIZE,
    Dice as Dice,
    Scene as Scene,
    ask as ask,
    changed as changed,
    questions as questions,
    random_scene as random_scene,
    random_size as random_size,
)
from .shapes_varied import SIDES as SIDES
