"""Figures: functions that take results and return figures to show in Jupyter or save.

Others import these names from here, never from the modules inside; they are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
