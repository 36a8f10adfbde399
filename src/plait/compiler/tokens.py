"""Proof that nodes treat tokens apart: which of them may run on one part of the tokens at a time.

Walks a joint graph in order and says of each value which dim counts tokens, and of each node
whether its result for some tokens rests on just those tokens of its operands. The rules of one
operator stand in `token_rules.py`; here they are put together, checked at the edges, and kept as a
`Certificate`: what was proven, and for every node that stopped the proof, why.

A value is *natural* when its tokens stand in the order of the program. Under sequence parallelism a
rank holds a *shard* of them; split by replicas, it holds its share of each replica's tokens
instead. So shards may not leave the region, except into sums over all of them.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from plait.compiler.causal import CausalParts, causal_parts, causal_tokens
from plait.compiler.token_moves import Stop, Tokens
from plait.compiler.token_rules import is_mask, is_order_free, place_of_whole, rule_of
from plait.graph.collectives import is_collective
from plait.graph.graph import Module, Node
from plait.graph.partition import is_view
from plait.graph.source import source_of

_NO_TOKENS = "what it sends has no tokens, as the sum of a weight's gradient over the ranks"
_LOST = "its tokens cannot be told apart behind an operator that mixes them"
_NOT_SPLIT = "what it sends is not split"


@dataclass(frozen=True)
class Refusal:
    """Why a node is not split: an operator that mixes tokens, or that no rule knows."""

    node: str
    operator: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        """As in "aten.cumsum.default (model.py:12): it sums along the tokens"."""
        where = f" ({self.source})" if self.source else ""
        return f"{self.operator}{where}: {self.reason}"


@dataclass(frozen=True)
class Drawn:
    """A mask in the order of ranks: its tokens, and the axis that shares them."""

    tokens: Tokens
    axis: str


@dataclass
class Certificate:
    """What is proven of a joint graph.

    tokens: of each value that has them, the dim of tokens (of a node with several results, of
    each). region: nodes that may be split. refusals: those with tokens that may not. drawn: random
    masks for shards, which every rank draws alike, and where they have tokens. causal: attentions
    of the region that are split by queries (`causal.py`). num_tried: distinct operators of the
    region that were tried out (`refute.py`). not_tried: why others were not.
    """

    tokens: dict[Node, object] = field(default_factory=dict)
    region: set[Node] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)
    drawn: dict[Node, Drawn] = field(default_factory=dict)
    causal: dict[Node, CausalParts] = field(default_factory=dict)
    num_tried: int = 0
    not_tried: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Each operator of the region with its count, then what is left out and why."""
        split = Counter(str(node.target) for node in self.region if node.op == "call_function")
        lines = [f"split along tokens: {sum(split.values())} nodes"]
        lines += [f"  {count:4} {name}" for name, count in sorted(split.items())]
        if self.causal:
            lines.append(f"by queries, to rounding: {len(self.causal)} causal attentions")
        lines.append(f"tried by execution: {self.num_tried} distinct operators")
        lines += [f"  not tried: {n}, {why}" for why, n in sorted(self.not_tried.items())]
        lines += [f"whole: {refusal}" for refusal in self.refusals]
        return "\n".join(lines)


def prove(
    joint: Module,
    given: Mapping[Node, Tokens],
    parts: set[Node],
    *,
    tangents: Mapping[Node, Node] | None = None,
    whole_outputs: Collection[Node] | None = None,
    axes: Mapping[str, int] | None = None,
    is_causal_mask: Callable[[Node], bool] | None = None,
) -> Certificate:
    """Prove what can be split in a joint graph.

    given: the dim of tokens of inputs. parts: inputs that arrive in parts; the others are whole.
    tangents: of each input that is a gradient, the value it is the gradient of: it has the tokens
    that this has. whole_outputs: nodes whose values leave whole; if None, it is not known yet, and
    shards are supposed to arrive and leave in parts. axes: sizes of the groups that communicate.
    is_causal_mask: says of a mask whether it is causal; if given, causal attention is split by its
    queries, which is not exact.
    """
    found = Certificate(tokens=dict(given), region=set(parts))
    stops: dict[Node, str] = {}
    waiting = dict(tangents or {})
    total = max((tokens.total for tokens in given.values()), default=0)
    for node in joint.graph.nodes:
        if node.op == "call_function":
            for tangent in [t for t, source in waiting.items() if source in found.tokens]:
                tokens = found.tokens[tangent] = found.tokens[waiting.pop(tangent)]
                if whole_outputs is None and not _are_natural(tokens):
                    found.region.add(tangent)
                    parts = parts | {tangent}
            causal = causal_parts(node, is_causal_mask) if is_causal_mask else None
            if isinstance(causal, CausalParts) and _take_causal(node, causal, found):
                continue
            _take(node, found, stops, total, axes or {})
            if isinstance(causal, str) and node in stops:
                stops[node] = causal
    _drop_escaping(joint, found, stops, parts, whole_outputs or ())
    for node in joint.graph.nodes:
        if is_collective(node) and node not in found.region and node not in stops:
            stops[node] = _reason_of(node, found, total)
    found.refusals = [
        Refusal(node.name, str(node.target), reason, source_of(node))
        for node, reason in stops.items()
    ]
    return found


def _reason_of(node: Node, found: Certificate, total: int) -> str:
    if node in found.tokens:
        return _NOT_SPLIT
    is_lost = len(node.meta["val"].shape) > 1 and total in node.meta["val"].shape
    return _LOST if is_lost else _NO_TOKENS


def _take(
    node: Node, found: Certificate, stops: dict[Node, str], total: int, axes: Mapping[str, int]
) -> None:
    sources = node.all_input_nodes
    if not any(source in found.tokens for source in sources):
        place = place_of_whole(node, total)
        if place is None:
            return
        labelled, tokens = place
        found.tokens[labelled] = tokens
        if labelled is node:
            return
    is_whole = not any(source in found.region for source in sources)
    if is_whole and _has_sharded(node, found):
        is_whole = False  # a shard that is whole has no place here: the rule will say so
    drawn = _find_drawn(node, found, axes)
    if drawn:
        found.drawn.update(drawn)
        tokens = {**found.tokens, **{x: each.tokens for x, each in drawn.items()}}
        result = rule_of(node, tokens, found.region | set(drawn))
    else:
        result = rule_of(node, found.tokens, found.region)
    if isinstance(result, Stop):
        if result.tokens is not None:
            found.tokens[node] = result.tokens
        if result.reason:
            stops[node] = result.reason
        return
    found.tokens[node] = result
    if not (is_whole and is_view(node)):  # a view of what is whole stays so: slices are cut later
        found.region.add(node)


def _take_causal(node: Node, parts: CausalParts, found: Certificate) -> bool:
    """Take a causal attention into the region, if all its operands have tokens."""
    tokens = causal_tokens(node, parts, found.tokens)
    if tokens is None:
        return False
    found.tokens[node] = tokens
    found.region.add(node)
    found.causal[node] = parts
    return True


def _find_drawn(node: Node, found: Certificate, axes: Mapping[str, int]) -> dict[Node, Drawn]:
    """The operands of a node on a shard that are random masks of the shard's shape.

    All ranks draw the same numbers (see `graph/parallelize.py`), so the mask of any token, in
    whatever order, is known to every rank.
    """
    drawn = {}
    shards = [(x, found.tokens.get(x)) for x in node.all_input_nodes]
    for source, tokens in shards:
        if not isinstance(tokens, Tokens) or not tokens.is_shard:
            continue
        axis = next((a for a, size in axes.items() if size * tokens.length == tokens.total), None)
        for mask in node.all_input_nodes:
            is_like = mask.meta["val"].shape == source.meta["val"].shape
            if axis is not None and is_like and is_mask(mask):
                drawn[mask] = Drawn(tokens, axis)
    return drawn


def _has_sharded(node: Node, found: Certificate) -> bool:
    return not all(_are_natural(found.tokens.get(source)) for source in node.all_input_nodes)


def _are_natural(tokens: object) -> bool:
    each = tokens if isinstance(tokens, tuple) else (tokens,)
    return all(x.is_natural for x in each if isinstance(x, Tokens))


def _drop_escaping(
    joint: Module,
    found: Certificate,
    stops: dict[Node, str],
    parts: set[Node],
    whole_outputs: Collection[Node],
) -> None:
    """Take nodes out until no shard crosses the region's edge, other than into a sum over all."""
    dropped: set[Node] = set()
    changed = True
    while changed:
        changed = False
        for node in joint.graph.nodes:
            escape = _escape(node, found, whole_outputs)
            if escape is None or node in parts:
                continue
            reason, blamed = escape
            found.region.discard(node)
            found.causal.pop(node, None)
            changed = True
            if blamed not in dropped:  # else it is a consequence of what is listed already
                stops[node] = reason
            dropped.add(node)


def _escape(
    node: Node, found: Certificate, whole_outputs: Collection[Node]
) -> tuple[str, Node | None] | None:
    """Why the node cannot be in the region, and the other node that is to blame."""
    if node not in found.region or node.op != "call_function":
        return None
    for source in node.all_input_nodes:
        if source not in found.region and not _are_natural(found.tokens.get(source)):
            return f"its operand {source.name} is a shard in the order of ranks", source
    if _are_natural(found.tokens[node]):
        return None
    if node in whole_outputs:
        return "its shard would have to leave whole", None
    for user in node.users:
        if user.op == "output" or user in found.region or is_order_free(user, found.tokens):
            continue
        if not is_view(user) or any(u.op == "output" for u in user.users):
            return f"its shard is used by {user.name}, which is not split", user
    return None
