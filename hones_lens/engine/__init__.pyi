from .arms import stack_hooks as stack_hooks
from .batches import (
    Batch as Batch,
    answer_batches as answer_batches,
    as_task as as_task,
    chance_of as chance_of,
    check_examples as check_examples,
    prompt_batches as prompt_batches,
)
from .evaluation import Evaluation as Evaluation, evaluate as evaluate
from .forks import LayerStep as LayerStep, layer_steps as layer_steps
from .full_passes import (
    MAX_NEW_TOKENS as MAX_NEW_TOKENS,
    Prediction as Prediction,
    error_context as error_context,
)
from .measurement import (
    Outcome as Outcome,
    measure as measure,
    measure_log_probs as measure_log_probs,
)
from .memory import Budget as Budget
from .options import (
    BatchKeywords as BatchKeywords,
    ResumedKeywords as ResumedKeywords,
    SweepKeywords as SweepKeywords,
    SweepOptions as SweepOptions,
    split_keywords as split_keywords,
)
from .preflight import (
    Fault as Fault,
    find_faults as find_faults,
    usable_examples as usable_examples,
)
from .resumable import TensorJournal as TensorJournal, resumed_batches as resumed_batches
from .rounding import (
    MOST_COMPARED as MOST_COMPARED,
    dtype_name as dtype_name,
    type_noise as type_noise,
    values_in_float32 as values_in_float32,
)
from .segments import Segment as Segment, split_shared_prefix as split_shared_prefix
from .speculation import Tally as Tally
from .sweep import Sweep as Sweep, logits_under as logits_under
from .units import (
    Done as Done,
    SharedJournal as SharedJournal,
    Unit as Unit,
    check_shareable as check_shareable,
    chunks as chunks,
    expect as expect,
    layer_blocks as layer_blocks,
)
