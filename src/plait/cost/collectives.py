"""How long collectives take: the alpha-beta model of ring algorithms.

A ring of n ranks does n - 1 steps, in each of which every rank sends 1/n of the whole to its
neighbour [Thakur, Rabenseifner and Gropp 2005, doi:10.1177/1094342005051521, sections 4.1 and 4.2;
Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002]:

    time = latency + steps * step_latency + bytes_sent / bandwidth

`num_bytes` is always the size of the larger side on one rank: what all_gather yields, what
reduce_scatter takes, and the whole tensor for all_reduce and all_to_all.
"""

from enum import StrEnum

from plait.cost.clusters import Link
from plait.errors import PlanError


class Collective(StrEnum):
    """The collectives that can stand in a graph."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"


def sent_bytes(collective: Collective, num_bytes: float, num_ranks: int) -> float:
    """Bytes that each rank sends: (n - 1) / n of the whole, twice that for all_reduce."""
    if num_ranks < 1:
        raise PlanError(f"a collective needs ranks, got {num_ranks}.")
    rounds = 2 if collective is Collective.ALL_REDUCE else 1
    return rounds * (num_ranks - 1) / num_ranks * num_bytes


def collective_s(collective: Collective, num_bytes: float, num_ranks: int, link: Link) -> float:
    """Time of a collective, in seconds; none among one rank.

    all_reduce is a reduce_scatter and an all_gather: 2 (n - 1) steps. all_to_all sends its n - 1
    parts one after another over the rank's link.
    """
    sent = sent_bytes(collective, num_bytes, num_ranks)
    if num_ranks == 1:
        return 0.0
    steps = (2 if collective is Collective.ALL_REDUCE else 1) * (num_ranks - 1)
    return link.latency_s + steps * link.step_latency_s + sent / link.bandwidth_bytes_per_s


_OPERATORS = {
    "all_reduce": Collective.ALL_REDUCE,
    "all_reduce_": Collective.ALL_REDUCE,
    "all_reduce_coalesced": Collective.ALL_REDUCE,
    "all_gather_into_tensor": Collective.ALL_GATHER,
    "all_gather_into_tensor_out": Collective.ALL_GATHER,
    "all_gather_into_tensor_coalesced": Collective.ALL_GATHER,
    "reduce_scatter_tensor": Collective.REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced": Collective.REDUCE_SCATTER,
    "all_to_all_single": Collective.ALL_TO_ALL,
}


def collective_of(operator: str) -> Collective | None:
    """The collective that an operator launches, by a name as in a schedule; None if it is none.

    As in "_c10d_functional.all_reduce.default".
    """
    namespace, _, rest = operator.partition(".")
    if namespace not in ("_c10d_functional", "c10d_functional", "_c10d_functional_autograd"):
        return None
    return _OPERATORS.get(rest.split(".")[0])


def waits(operator: str) -> bool:
    """Whether an operator waits for a collective, by a name as in a schedule."""
    return operator.endswith(".wait_tensor.default")
