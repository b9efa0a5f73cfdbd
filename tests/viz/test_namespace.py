"""`hones_lens.viz` has every view by name, and imports nothing before it is asked."""

from __future__ import annotations

import subprocess
import sys

import hones_lens.viz as viz


def test_every_name_is_there() -> None:
    for name in viz.__all__:
        value = getattr(viz, name)
        assert not callable(value) or value.__module__.startswith("hones_lens.viz."), name
    assert sorted(viz.__all__) == viz.__all__
    assert set(viz.__all__) <= set(dir(viz))
    assert not hasattr(viz, "pie_chart")


def test_importing_it_imports_nothing_else() -> None:
    code = (
        "import sys, hones_lens.viz\n"
        "heavy = {'torch', 'matplotlib', 'transformer_lens', 'circuitsvis', 'IPython'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
