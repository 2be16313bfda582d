"""Methods x source tasks x target tasks x seeds on one model, with everything shared that can be shared."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
