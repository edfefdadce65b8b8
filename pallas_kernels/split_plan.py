"""How many keys a split takes, from static sizes alone: never from the lengths that a batch happens to have."""

from __future__ import annotations

PROCESSORS = 132  # of an H100; others come close enough
STEP = 128  # split sizes are multiples of this
MOST_SPLITS = 128
# In units of one step's time on a full GPU: starting and ending a program, and merging, per call and per program.
_START, _MERGE, _MERGE_EACH = 3.0, 1.0, 0.01


def choose_split_size(programs: int, capacity: int, *, processors: int = PROCESSORS) -> int:
    """The split size with the least estimated time for sequences near the capacity.

    Args:
        programs: how many there are of one split: sequences times row blocks.
        capacity: keys a sequence may hold.
        processors: programs that run at once.
    """
    steps = max(1, -(-capacity // STEP))
    best, best_time = steps, float("inf")
    for splits in range(1, min(steps, MOST_SPLITS) + 1):
        each = -(-steps // splits)
        number = programs * -(-steps // each)
        time = -(-number // processors) * (each + _START)
        if each < steps:
            time += _MERGE + _MERGE_EACH * number
        if time < best_time:
            best, best_time = each, time
    return best * STEP


def number_of_splits(capacity: int, split_size: int) -> int:
    """Splits of a sequence that fills the capacity."""
    return max(1, -(-capacity // split_size))
