from .cli import main as main
from .explorer.explore import explore as explore
from .explorer.serve import (
    build_server as build_server,
    open_listener as open_listener,
    picture_and_prompt as picture_and_prompt,
)
from .explorer.views import ExplorerViews as ExplorerViews
from .report.report import write_report as write_report
from .report.run_folder import read_view as read_view
from .runs.data_choice import DataChoice as DataChoice
from .runs.machines import GPUS as GPUS, Machines as Machines
from .runs.plan import plan as plan
from .runs.stages import (
    find_heads as find_heads,
    find_neurons as find_neurons,
    mask_neurons as mask_neurons,
    start_run as start_run,
)
