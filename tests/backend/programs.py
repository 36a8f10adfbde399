"""All programs, by topic."""

from . import (
    programs_autograd,
    programs_block_differences,
    programs_blocks,
    programs_containers,
    programs_control_flow,
    programs_state,
    programs_tensors,
)

PROGRAMS = [
    *programs_control_flow.PROGRAMS,
    *programs_state.PROGRAMS,
    *programs_autograd.PROGRAMS,
    *programs_blocks.PROGRAMS,
    *programs_block_differences.PROGRAMS,
    *programs_containers.PROGRAMS,
    *programs_tensors.PROGRAMS,
]
