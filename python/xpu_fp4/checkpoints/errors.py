# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, said with the names of the file and the tensor."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: damaged, inconsistent, or of a kind that is none of ours."""
