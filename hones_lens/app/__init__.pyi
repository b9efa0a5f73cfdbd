from .cli import main as main
from .explorer.explore import explore as explore
from .explorer.serve import listen as listen, prepare as prepare, subject as subject
from .explorer.views import Views as Views
from .report.report import write_report as write_report
from .report.run_folder import read_view as read_view
from .runs.data_choice import DataChoice as DataChoice
from .runs.plan import plan as plan
from .runs.stages import (
    find_heads as find_heads,
    find_neurons as find_neurons,
    mask_neurons as mask_neurons,
    start_run as start_run,
)
