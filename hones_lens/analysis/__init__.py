"""What is read off a model: attention, lenses, logit attribution, knockout, steering vectors, patching.

Others import these names from here, never from the modules inside; they are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
