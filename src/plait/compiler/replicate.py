"""Replicas: the tokens in R parts, each with its own communication, where that is proven sound.

The pass walks the root in order. Of each kind of piece it asks which of its values have tokens
(`tokens.py`), which of them its users want in parts, and writes the piece once for each way in
which it is used (`replicate_joint.py`). Values that pass between two pieces in parts stay in parts.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from torch import fx

from plait.compiler.constant_masks import ConstantMasks
from plait.compiler.refute import Trials, refute
from plait.compiler.replicate_joint import Form, Parts, replicate_joint
from plait.compiler.replicate_root import Use, repeated, write_root
from plait.compiler.token_moves import Tokens
from plait.compiler.tokens import Certificate, Refusal, prove
from plait.errors import PlanError
from plait.graph.collectives import is_collective
from plait.graph.graph import (
    BACKWARD,
    FORWARD,
    Graph,
    Module,
    Node,
    Role,
    Template,
    call_of,
    describe,
)
from plait.graph.note import CAPTURE
from plait.graph.partition import part_joint

_ALIGNMENT = 64
"""Parts start at multiples of it where they can: kernels treat the rest of a vector apart."""


_NUM_REASONS = 4


class NotSplit(Exception):
    """The graph cannot be split in this way; the message says why."""


@dataclass(frozen=True)
class Replicated:
    """A graph in replicas, and of each kind of piece its parts and what was proven of it."""

    graph: Graph
    parts: dict[str, Parts]
    axis: str
    certificates: dict[str, Certificate]

    @property
    def collectives(self) -> list[tuple[str, str, int]]:
        """Of each piece the collectives that are split: piece, operator, how many."""
        return [
            (name, operator, count)
            for name, found in self.certificates.items()
            for operator, count in sorted(
                Counter(str(x.target) for x in found.region if is_collective(x)).items()
            )
        ]

    @property
    def refusals(self) -> list[Refusal]:
        """What is not split, each kind of piece once."""
        return [each for found in self.certificates.values() for each in found.refusals]


def replicate(
    graph: Graph,
    num_replicas: int | Sequence[int],
    *,
    axis: str | None = None,
    causal_split: bool = False,
    shares: Sequence[int] = (),
    trials: Trials | None = None,
) -> Replicated:
    """Split a joint graph in `num_replicas` parts of the batch, or of its tokens.

    num_replicas: one number, or one for each piece that communicates, in order; pieces between
    these take the number before. axis: "batch" or "token"; by default the batch if it is large
    enough. causal_split: on the token axis, split causal attention by its queries too. shares: of
    tokens, by replica, as near as parts can be; by default equal. trials: what was tried before of
    the same graph.

    Raises PlanError if there is nothing to split along, if a shard would have to be put together,
    if there are more or fewer such pieces, or if no attention can be split as asked.
    """
    numbers = (num_replicas,) if isinstance(num_replicas, int) else tuple(num_replicas)
    name = ",".join(map(str, numbers))
    if not graph.templates:
        raise PlanError(
            f"replicas={name}: the model was captured as one piece, and replicas are made "
            "piece by piece. A buffer that a layer changes, or a DTensor between layers, makes it "
            f"one{''.join(f' ({note.text})' for note in graph.notes if note.by == CAPTURE)}. "
            "Use replicas=1."
        )
    axis, total = _axis_of(graph, max(numbers), axis)
    if axis == "token":
        share = _share(graph)
        parts = {n: parts_of(total, n, share, shares) for n in set(numbers)}
    else:
        parts = {n: parts_of(total, n, 1) for n in set(numbers)}
    try:
        splits_causal = causal_split and axis == "token"
        each = tuple(parts[n] for n in numbers)
        replicator = _Replicator(graph, axis, each, splits_causal, trials or Trials())
        found = replicator.run(is_one_number=isinstance(num_replicas, int))
    except NotSplit as error:
        raise PlanError(f"replicas={name} along the {axis}: {error}") from error
    if max(numbers) > 1 and not found.collectives:
        refusals = dict.fromkeys(map(str, found.refusals)) if graph.groups else ()
        reasons = "; ".join(refusals) or "the graph has none"
        raise PlanError(
            f"replicas={name} along the {axis}: no collective can be split, so there is "
            f"nothing to hide: {reasons}. Use replicas=1, or sp=False where ranks share the tokens."
        )
    if causal_split and axis == "token":
        _check_causal(found)
    return found


def _check_causal(found: Replicated) -> None:
    if not any(each.causal for each in found.certificates.values()):
        reasons = dict.fromkeys(str(x) for x in found.refusals if "attention" in x.operator)
        raise PlanError(
            "causal_split=True: no attention can be split by its queries: "
            f"{'; '.join(reasons) or 'there is none of a known kind'}. Use causal_split=False."
        )


def parts_of(total: int, num_replicas: int, share: int, shares: Sequence[int] = ()) -> Parts:
    """Part `total` tokens; every part is a multiple of `share`, the ranks that share tokens.

    shares: relative sizes of the parts, as near as can be; by default equal.
    """
    for unit in (_ALIGNMENT * share, _ALIGNMENT, share):
        count = total // unit
        if unit % share == 0 and count >= num_replicas:
            break
    else:
        raise PlanError(
            f"{total} tokens over {share} ranks cannot be parted for {num_replicas} replicas. "
            f"Choose at most {max(total // share, 1)} replicas."
        )
    if shares:
        ends = [end * count // sum(shares) for end in accumulate(shares)]
        # A part without tokens is none: it takes a unit from where there are more.
        ends = [max(end, i + 1) for i, end in enumerate(ends)]
        ends = [min(end, count - (num_replicas - 1 - i)) for i, end in enumerate(ends)]
    else:
        least, num_larger = divmod(count, num_replicas)
        ends = [
            i * least + max(0, i - num_replicas + num_larger) for i in range(1, num_replicas + 1)
        ]
    sizes = [unit * (end - start) for start, end in pairwise((0, *ends))]
    sizes[-1] += total - sum(sizes)
    return Parts(tuple(sizes))


def _axis_of(graph: Graph, num_replicas: int, axis: str | None) -> tuple[str, int]:
    shapes = [value.shape for value in graph.values(Role.INPUT) if len(value.shape) > 1]
    if not shapes:
        raise PlanError("no input has both a batch and tokens: there is nothing to split along.")
    batch, tokens = shapes[0][:2]
    if axis is None:
        axis = "batch" if batch >= num_replicas else "token"
    if axis == "batch":
        if batch < num_replicas:
            raise PlanError(f"a batch of {batch} cannot be split in {num_replicas} replicas.")
        return axis, batch
    if batch != 1:
        raise PlanError(
            f"replicas={num_replicas} of a batch of {batch}: tokens are split where the local "
            f"batch is 1, and the batch where it is {num_replicas} or more. Use fewer replicas."
        )
    return axis, tokens


def _share(graph: Graph) -> int:
    """How many ranks share the tokens: sizes of the groups that gather or scatter."""
    sizes = {1}
    for template in graph.templates.values():
        for node in (template.joint or template.forward).graph.nodes:
            if is_collective(node):
                sizes |= {x for x in node.args if isinstance(x, int)}
    return max(sizes)


class _Replicator:
    def __init__(
        self,
        graph: Graph,
        axis: str,
        parts: tuple[Parts, ...],
        splits_causal: bool,
        trials: Trials,
    ) -> None:
        self.graph, self.axis, self.given_parts = graph, axis, parts
        self.total = parts[0].total
        self.parts: dict[Node, Parts] = {}  # by call
        self.masks = ConstantMasks(graph) if splits_causal else None
        self.axes = {name: group.size for name, group in graph.groups.items()}
        self.certificates: dict[str, Certificate] = {}
        self.trials = trials
        self.proofs: dict[tuple, Certificate] = {}
        self.known: dict[Form, Any] = {}
        self.templates: dict[Use, Template] = {}
        self.nodes: list[Node] = list(graph.root.graph.nodes)
        self.tokens: dict[Node, Tokens | None] = {}
        self.in_parts: set[Node] = set()
        self.uses: dict[Node, Use] = {}  # by forward call

    def run(self, *, is_one_number: bool) -> Replicated:
        self.label()
        self.share_out(is_one_number)
        self.choose_parts()
        for node in self.nodes:
            called = call_of(node)
            if called is not None and called[1] == FORWARD:
                self.uses[node] = use = self.use_of(node)
                if use not in self.templates:
                    self.templates[use] = self.replicated(use)
        graph = write_root(self.graph, self.uses, self.templates)
        parts = {new.name: use.parts for use, new in self.templates.items()}
        return Replicated(graph, parts, self.axis, self.certificates)

    def seed(self, node: Node) -> Tokens | None:
        value = node.meta["val"]
        if value.role is not Role.INPUT or len(value.shape) < 1:
            return None
        total = self.total
        if self.axis == "batch":
            return Tokens(0, total, total) if value.shape[0] == total else None
        fits = len(value.shape) > 1 and value.shape[:2] == (1, total)
        return Tokens(1, total, total) if fits else None

    def label(self) -> None:
        """Find the tokens of every value of the root; shards pass in parts, all else is whole."""
        for node in self.nodes:
            if node.op == "placeholder":
                self.tokens[node] = self.seed(node)
            called = call_of(node)
            if called is None or called[1] == BACKWARD:
                continue
            template = self.graph.templates[called[0]]
            given = tuple(self.tokens.get(x) for x in node.args[2:])
            proof = self.proof(template, given)
            outputs = _joint(template).graph.output_node().args[0]
            for user in node.users:
                if user.args[1] < len(template.results):
                    found = proof.tokens.get(outputs[user.args[1]])
                    self.tokens[user] = found if isinstance(found, Tokens) else None

    def share_out(self, is_one_number: bool) -> None:
        """Give each call its parts; a backward call has those of its forward."""
        calls = [node for node in self.nodes if call_of(node) is not None]
        forward = [node for node in calls if call_of(node) == (node.args[0], FORWARD)]
        talking = [node for node in forward if any(map(is_collective, self.region_of(node)))]
        if is_one_number:
            numbers = dict.fromkeys(forward, self.given_parts[0])
        elif len(talking) == len(self.given_parts):
            numbers = dict(zip(talking, self.given_parts, strict=True))
        else:
            raise NotSplit(
                f"{len(talking)} pieces communicate, and there are {len(self.given_parts)} "
                "numbers. Give one for each piece, in order."
            )
        parts = self.given_parts[0]
        for node in forward:
            parts = self.parts[node] = numbers.get(node, parts)
        for node in calls:
            if node not in self.parts:
                self.parts[node] = self.parts[node.meta["forward"]]

    def region_of(self, node: Node) -> set[Node]:
        """What is proven of a forward call with every argument whole, except for shards."""
        template = self.graph.templates[str(node.args[0])]
        return self.proof(template, tuple(self.tokens.get(x) for x in node.args[2:])).region

    def choose_parts(self) -> None:
        """Values that their users take in parts, and no one else sees, pass in parts."""
        for node in self.nodes:
            tokens = self.tokens.get(node)
            if node.target is not operator.getitem or tokens is None:
                continue
            producer = call_of(node.args[0])
            if producer is None or producer[1] == BACKWARD:
                continue
            template = self.graph.templates[producer[0]]
            result = _joint(template).graph.output_node().args[0][node.args[1]]
            is_split = result in self.region_of(node.args[0])
            users = [call_of(user) for user in node.users]
            if not is_split or any(user is None for user in users):
                continue
            if any(self.parts[user] != self.parts[node.args[0]] for user in node.users):
                if not tokens.is_natural:
                    raise NotSplit(
                        f"{node.name} is a share of the tokens, and layers that pass such to each "
                        "other need one number of replicas."
                    )
                continue
            forward = [user for user in node.users if (call_of(user) or ("", ""))[1] == FORWARD]
            if any(self.wants_parts(user, node) for user in forward):
                self.in_parts.add(node)

    def wants_parts(self, user: Node, value: Node) -> bool:
        """Whether an operator of the region of that call takes the value."""
        tokens = self.tokens[value]
        if tokens is not None and not tokens.is_natural:
            return True
        template = self.graph.templates[str(user.args[0])]
        region = self.region_of(user)
        placeholders = _joint(template).graph.find_nodes(op="placeholder")
        return any(
            _reaches(placeholders[i], region) for i, x in enumerate(user.args[2:]) if x is value
        )

    def proof(self, template: Template, given: tuple[Tokens | None, ...]) -> Certificate:
        """Prove with every argument whole, except for shards."""
        key = (template.name, given)
        if key not in self.proofs:
            placeholders = _joint(template).graph.find_nodes(op="placeholder")
            found = {x: t for x, t in zip(placeholders, given, strict=False) if t is not None}
            parts = {x for x, t in found.items() if not t.is_natural}
            self.proofs[key] = prove(
                _joint(template),
                found,
                parts,
                tangents=_tangents_of(template),
                axes=self.axes,
                is_causal_mask=self.is_causal_mask(template),
            )
        return self.proofs[key]

    def is_causal_mask(self, template: Template) -> Callable[[Node], bool] | None:
        return partial(self.masks.is_causal, template) if self.masks is not None else None

    def use_of(self, node: Node) -> Use:
        template = self.graph.templates[str(node.args[0])]
        users = {user.args[1]: user for user in node.users}
        return Use(
            template=template.name,
            parts=self.parts[node],
            tokens=tuple(self.tokens.get(x) for x in node.args[2:]),
            arguments_in_parts=tuple(x in self.in_parts for x in node.args[2:]),
            results_in_parts=tuple(
                users.get(i) in self.in_parts for i in range(len(template.results))
            ),
        )

    def replicated(self, use: Use) -> Template:
        """Prove and write the template for one use of it."""
        template = self.graph.templates[use.template]
        joint = _joint(template)
        placeholders = joint.graph.find_nodes(op="placeholder")
        outputs = joint.graph.output_node().args[0]
        given = {x: t for x, t in zip(placeholders, use.tokens, strict=False) if t is not None}
        parts = {x for x, p in zip(placeholders, use.arguments_in_parts, strict=False) if p}
        tangents = _tangents_of(template)
        in_parts = [use.results_in_parts[i] for i in template.differentiable]
        in_parts += [use.arguments_in_parts[i] for i in template.threaded]
        parts |= {x for x, is_parted in zip(tangents, in_parts, strict=True) if is_parted}
        flags = [*use.results_in_parts]
        if template.joint is not None:
            flags += [*use.arguments_in_parts]
        certificate = prove(
            joint,
            given,
            parts,
            tangents=tangents,
            whole_outputs=_whole(outputs, flags),
            axes=self.axes,
            is_causal_mask=self.is_causal_mask(template),
        )
        refute(certificate, self.trials)
        labels = [*(None for _ in template.results), *use.tokens][: len(flags)]
        for node, is_parted, label in zip(outputs, flags, labels, strict=True):
            if is_parted and isinstance(node, fx.Node):
                self.check_parted(node, label, certificate)
        name = f"{template.name}_x{len(use.parts.sizes)}"
        if sum(each.template == use.template for each in self.templates):
            name += f"_{len(self.templates)}"
        self.certificates[name] = certificate
        module = replicate_joint(
            joint,
            certificate,
            use.parts,
            num_tangents=len(tangents),
            results_in_parts=flags,
            known=self.known,
        )
        return self.described(template, use, module, name)

    def check_parted(self, node: Node, label: Tokens | None, certificate: Certificate) -> None:
        """Let a whole value that leaves in parts be cut, if a cut is part of the tokens."""
        tokens = certificate.tokens.setdefault(node, label)
        if node in certificate.region or (isinstance(tokens, Tokens) and tokens.is_natural):
            return
        reasons = "; ".join(map(str, certificate.refusals[:_NUM_REASONS]))
        raise NotSplit(
            f"{node.name} ({node.target}) must pass in parts, and cannot be split: {reasons}. "
            "Use replicas=1, or sp=False where ranks share the tokens."
        )

    def described(self, template: Template, use: Use, module: Module, name: str) -> Template:
        """The template of the split joint graph."""
        count = len(use.parts.sizes)
        arguments = repeated(range(len(template.arguments)), use.arguments_in_parts, count)
        results = repeated(range(len(template.results)), use.results_in_parts, count)
        placeholders = module.graph.find_nodes(op="placeholder")
        outputs = module.graph.output_node().args[0]
        new = replace(
            template,
            name=name,
            arguments=tuple(
                describe(Role.INPUT, template.arguments[i].name, node.meta["val"])
                for i, node in zip(arguments, placeholders, strict=False)
            ),
            results=tuple(
                describe(Role.OUTPUT, str(at), node.meta["val"])
                for at, (_, node) in enumerate(zip(results, outputs, strict=False))
            ),
            forward=module,
        )
        if template.joint is None:
            return new
        parts = part_joint(module, num_arguments=len(arguments), num_results=len(results))
        new.joint, new.forward, new.backward = module, parts.forward, parts.backward
        new.saved = parts.saved
        new.gradients = tuple(
            None if node is None else describe(Role.GRADIENT, str(i), node.meta["val"])
            for i, node in enumerate(outputs[len(results) :])
        )
        new.differentiable = tuple(
            at for i in template.differentiable for at, j in enumerate(results) if i == j
        )
        new.threaded = tuple(
            at for i in template.threaded for at, j in enumerate(arguments) if i == j
        )
        return new


def _joint(template: Template) -> Module:
    return template.joint or template.forward


def _tangents_of(template: Template) -> dict[Node, Node]:
    """Inputs of the joint graph that are gradients, and what they are the gradients of."""
    joint = _joint(template)
    placeholders = joint.graph.find_nodes(op="placeholder")
    outputs = joint.graph.output_node().args[0]
    sources = [outputs[i] for i in template.differentiable]
    sources += [placeholders[i] for i in template.threaded]
    return dict(zip(placeholders[len(template.arguments) :], sources, strict=True))


def _whole(outputs: Sequence, in_parts: Sequence[bool]) -> set[Node]:
    return {
        node
        for node, is_parted in zip(outputs, in_parts, strict=True)
        if isinstance(node, fx.Node) and not is_parted
    }


def _reaches(node: Node, region: set[Node]) -> bool:
    """Whether an operator of the region takes the value, itself or seen through views."""
    for user in node.users:
        if user in region:
            return True
        is_seen = getattr(user.target, "is_view", False) or user.target is operator.getitem
        if is_seen and _reaches(user, region):
            return True
    return False
