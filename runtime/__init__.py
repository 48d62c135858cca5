"""Audio in, audio out: run a bundle with numpy and one inference engine.

from clapsep.runtime import Query, Separator

separator = Separator("model.clapsep")
target = separator.separate(mixture, sample_rate, positive="a dog barking", negative=Query(text="rain", audio=["rain.wav"]))
"""

from . import errors
from .bundle import Bundle
from .query import Query
from .separator import Separator

__all__ = ["Bundle", "Query", "Separator", "errors"]
