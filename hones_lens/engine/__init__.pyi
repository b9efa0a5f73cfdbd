from .evaluation import Evaluation as Evaluation, evaluate as evaluate
from .forks import Segment as Segment, Step as Step, stacked as stacked, steps_of as steps_of
from .memory import Budget as Budget, free_bytes as free_bytes
from .speculation import Tally as Tally
from .sweep import (
    MAX_NEW_TOKENS as MAX_NEW_TOKENS,
    Batch as Batch,
    Outcome as Outcome,
    Prediction as Prediction,
    Sweep as Sweep,
    answer_batches as answer_batches,
    as_task as as_task,
    behind_shared_prefix as behind_shared_prefix,
    check_examples as check_examples,
    logits_under as logits_under,
    measure as measure,
    measure_log_probs as measure_log_probs,
    naming as naming,
    prompt_batches as prompt_batches,
)
