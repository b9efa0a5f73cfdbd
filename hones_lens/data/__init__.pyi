from .check import check_data as check_data
from .examples import Example as Example, check_on_error as check_on_error
from .loading import load_examples as load_examples, reads_files as reads_files, tasks_of as tasks_of
from .pairs import CounterfactualPair as CounterfactualPair, counterfactual_pairs as counterfactual_pairs
from .records import (
    BadRecord as BadRecord,
    Format as Format,
    NotForTask as NotForTask,
    Record as Record,
    Row as Row,
)
from .shapes import (
    ATTRIBUTES as ATTRIBUTES,
    COLORS as COLORS,
    IMAGE_SIZE as IMAGE_SIZE,
    NUMBER_WORDS as NUMBER_WORDS,
    SHAPES as SHAPES,
    THING_NAMES as THING_NAMES,
    Scene as Scene,
    SeededRandom as SeededRandom,
    counterfactual_scenes as counterfactual_scenes,
    questions as questions,
    random_image_size as random_image_size,
    random_question as random_question,
    random_scene as random_scene,
)
from .shapes_varied import IMAGE_SIDES as IMAGE_SIDES
from .splits import check_split as check_split
