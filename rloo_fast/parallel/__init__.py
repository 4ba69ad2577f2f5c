"""What the training engine (one process, DDP, FSDP2, DeepSpeed) makes different in a step.

engine   weights            gradients of a micro-batch
DDP      whole              reduced with the last one's
FSDP2    split over ranks   reduced and split at once
ZeRO-1   whole              reduced with the last one's
ZeRO-2   whole              reduced and split at once
ZeRO-3   split over ranks   reduced and split at once
"""

from .base import Parallel
from .choose import check_launch, make_parallel, prepare_args

__all__ = ["Parallel", "check_launch", "make_parallel", "prepare_args"]
