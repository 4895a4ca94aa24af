"""Sampling: schedulers, trajectories and the call that turns labels into images."""

from .decoding import decode
from .measure import measure_costs
from .sampling import denoise, sample
from .schedulers import ReferenceDDIM, make_scheduler
from .trajectory import Trajectory, check_labels, image_noise

__all__ = ["ReferenceDDIM", "Trajectory", "check_labels", "decode", "denoise", "image_noise", "make_scheduler",
           "measure_costs", "sample"]
