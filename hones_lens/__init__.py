"""hones_lens: find, read and steer circuits in vision–language models.

Names are imported when first used, so that `hones --help` need not wait for PyTorch; they are listed in
`__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
