"""attend and attend_backward on the visiting keys of one step, by the backend of the call."""

from cpflex.kernels.call import Call
from cpflex.kernels.reference import attend, attend_backward
from cpflex.kernels.state import State, empty, finish

__all__ = ["Call", "State", "attend", "attend_backward", "empty", "finish"]
