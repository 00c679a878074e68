# SPDX-License-Identifier: Apache-2.0
"""Whether gemm_small, the kernel for few rows, keeps enough bytes on their way from memory. Modelled: nothing is run.

In a round each sub-group asks for its quad of weights, waits for it, computes, and waits for the others of its work-group.
Taken for the worst: all sub-groups of an engine wait together and then compute one after the other. Where the next round's
weights have been asked for before, a round only waits for what is left of the latency.
"""

from dataclasses import dataclass

QUAD_BYTES = 64 + 4  # of a column: codes and scales


@dataclass(frozen=True)
class Round:
    """Of one vector engine, in its clocks."""

    sub_groups: float
    bytes: float  # of a sub-group's quad
    bandwidth: float  # bytes that memory brings to the engine in a clock
    compute: float  # of a sub-group
    latency: float
    ahead: bool  # the next round's weights are asked for before this one's are used

    @property
    def unbound(self) -> float:
        """Clocks of a round if memory brought any number of bytes at once."""
        computing = self.sub_groups * self.compute
        return max(self.latency, computing) if self.ahead else self.latency + computing

    @property
    def in_flight(self) -> float:
        """Bytes that would then be on their way at a time, on average."""
        return self.sub_groups * self.bytes * self.latency / self.unbound

    @property
    def needed(self) -> float:
        return self.bandwidth * self.latency

    @property
    def share(self) -> float:
        """Of the bandwidth that is reached."""
        return min(1.0, self.in_flight / self.needed)
