"""The user's line behind a backward operator: that of the forward operator it differentiates."""

from torch import fx


def name_sources(joint: fx.GraphModule) -> None:
    """Give nodes without a stack trace the one of the forward node with their sequence number.

    Autograd numbers its nodes as the forward makes them, and both directions carry the number.
    """
    traces: dict[int, str] = {}
    for node in joint.graph.nodes:
        number, trace = node.meta.get("seq_nr"), node.meta.get("stack_trace")
        if number is None:
            continue
        if trace:
            traces.setdefault(number, trace)
        elif number in traces:
            node.meta["stack_trace"] = traces[number]
