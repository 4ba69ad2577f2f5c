"""A model as accelerate prepared it in; gradients, whole weights and checkpoints of its engine out.

engine   weights            gradients of a micro-batch
DDP      whole              reduced with the last one's
FSDP2    split over ranks   reduced and split at once
ZeRO-1   whole              reduced with the last one's
ZeRO-2   whole              reduced and split at once
ZeRO-3   split over ranks   reduced and split at once
"""

from .base import TrainingEngine
from .choose import check_launch, make_training_engine

__all__ = ["TrainingEngine", "check_launch", "make_training_engine"]
