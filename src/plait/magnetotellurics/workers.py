"""Tasks on several threads, each task's arithmetic on one of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def map_in_threads(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], *, num_workers: int
) -> list[_Result]:
    """Apply the function to every task and give the results in order.

    Inside a task PyTorch uses one thread, so that results do not depend on num_workers.
    """
    threads = torch.get_num_threads()
    try:
        # PyTorch's setting belongs to a thread, but new threads start with the latest one.
        with ThreadPoolExecutor(
            max_workers=num_workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(function, tasks))
    finally:
        torch.set_num_threads(threads)
