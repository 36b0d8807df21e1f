"""Keep trained PyTorch image classifiers maintained by neuron-level semantic slicing (NeuSemSlice, arXiv 2407.20281).

>>> import nss
>>> data = nss.load_data("data")
>>> model = nss.build_model("nss.zoo:vgg_small", data.classes, data.image_shape, seed=0)
"""

import lazy_loader

__version__ = "0.1.0"

# What the package offers stands in __init__.pyi. A name is imported when it is first used: PyTorch takes seconds, and
# the pipeline asks for nss.errors alone in a cycle in which nothing is to be done.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
