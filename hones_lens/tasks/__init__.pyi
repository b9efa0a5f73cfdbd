from .base import (
    Task as Task,
    mean_metric as mean_metric,
    mean_statistics as mean_statistics,
    summed_metric as summed_metric,
)
from .registry import load_task as load_task, task_names as task_names
