from .base import (
    Task as Task,
    mean_metric as mean_metric,
    mean_statistics as mean_statistics,
    summed_metric as summed_metric,
)
from .metrics import (
    anls as anls,
    corpus_bleu as corpus_bleu,
    ndcg as ndcg,
    normalize_answer as normalize_answer,
    sentence_bleu as sentence_bleu,
    vqa_accuracy as vqa_accuracy,
    yes_no_metrics as yes_no_metrics,
)
from .own_text import own_prompt as own_prompt, takes_text as takes_text
from .registry import (
    load_task as load_task,
    task_names as task_names,
    task_of_examples as task_of_examples,
)
