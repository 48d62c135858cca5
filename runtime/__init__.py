"""Audio in, audio out: run a bundle with numpy and one inference engine.

from clapsep.runtime import Query, Separator

separator = Separator("model.clapsep")
target = separator.separate(mixture, sample_rate, positive="a dog barking", negative=Query(text="rain", audio=["rain.wav"]))
"""

from . import errors
from .audiofile import Limits
from .bundle import Bundle
from .files import separate_file
from .query import Query
from .separator import Separator
from .stream import Stream
from .windows import PRESETS

__all__ = ["PRESETS", "Bundle", "Limits", "Query", "Separator", "Stream", "errors", "separate_file"]
