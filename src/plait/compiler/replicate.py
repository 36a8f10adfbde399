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
    Value,
    call,
    call_of,
    describe,
    module_of,
)
from plait.graph.partition import part_joint

_ALIGNMENT = 64
"""Parts start at multiples of it where they can: kernels treat the rest of a vector apart."""


_NUM_REASONS = 4


class NotSplit(Exception):
    """The graph cannot be split in this way; the message says why."""


@dataclass(frozen=True)
class Use:
    """How a call uses its template: tokens of its arguments, and what passes in parts."""

    template: str
    tokens: tuple[Tokens | None, ...]
    arguments_in_parts: tuple[bool, ...]
    results_in_parts: tuple[bool, ...]


@dataclass(frozen=True)
class Replicated:
    """A graph in replicas, and what was proven of each kind of piece."""

    graph: Graph
    parts: Parts
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
    num_replicas: int,
    *,
    axis: str | None = None,
    causal_split: bool = False,
    shares: Sequence[int] = (),
    trials: Trials | None = None,
) -> Replicated:
    """Split a joint graph in `num_replicas` parts of the batch, or of its tokens.

    axis: "batch" or "token"; by default the batch if it is large enough. causal_split: on the token
    axis, split causal attention by its queries too. shares: of tokens, by replica, as near as parts
    can be; by default equal. trials: what was tried before of the same graph.

    Raises PlanError if there is nothing to split along, if a shard would have to be put together,
    or if no attention can be split as asked.
    """
    if not graph.templates:
        raise PlanError(
            f"replicas={num_replicas}: the model was captured as one piece, and replicas are made "
            "piece by piece. A buffer that a layer changes, or a DTensor between layers, makes it "
            "one. Use replicas=1."
        )
    axis, total = _axis_of(graph, num_replicas, axis)
    if axis == "token":
        parts = parts_of(total, num_replicas, _share(graph), shares)
    else:
        parts = parts_of(total, num_replicas, 1)
    try:
        splits_causal = causal_split and axis == "token"
        found = _Replicator(graph, axis, parts, splits_causal, trials or Trials()).run()
    except NotSplit as error:
        raise PlanError(f"replicas={num_replicas} along the {axis}: {error}") from error
    if num_replicas > 1 and not found.collectives:
        refusals = dict.fromkeys(map(str, found.refusals)) if graph.groups else ()
        reasons = "; ".join(refusals) or "the graph has none"
        raise PlanError(
            f"replicas={num_replicas} along the {axis}: no collective can be split, so there is "
            f"nothing to hide: {reasons}. Use replicas=1."
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
        self, graph: Graph, axis: str, parts: Parts, splits_causal: bool, trials: Trials
    ) -> None:
        self.graph, self.axis, self.parts = graph, axis, parts
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

    def run(self) -> Replicated:
        self.label()
        self.choose_parts()
        for node in self.nodes:
            called = call_of(node)
            if called is not None and called[1] == FORWARD:
                self.uses[node] = use = self.use_of(node)
                if use not in self.templates:
                    self.templates[use] = self.replicated(use)
        graph = _RootWriter(self).write()
        return Replicated(graph, self.parts, self.axis, self.certificates)

    def seed(self, node: Node) -> Tokens | None:
        value = node.meta["val"]
        if value.role is not Role.INPUT or len(value.shape) < 1:
            return None
        total = self.parts.total
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

    def choose_parts(self) -> None:
        """Values that their users take in parts, and no one else sees, pass in parts."""
        for node in self.nodes:
            if node.target is not operator.getitem or self.tokens.get(node) is None:
                continue
            producer = call_of(node.args[0])
            if producer is None or producer[1] == BACKWARD:
                continue
            template = self.graph.templates[producer[0]]
            given = tuple(self.tokens.get(x) for x in node.args[0].args[2:])
            result = _joint(template).graph.output_node().args[0][node.args[1]]
            is_split = result in self.proof(template, given).region
            users = [call_of(user) for user in node.users]
            if not is_split or any(user is None for user in users):
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
        given = tuple(self.tokens.get(x) for x in user.args[2:])
        region = self.proof(template, given).region
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
        name = f"{template.name}_x{len(self.parts.sizes)}"
        if sum(each.template == use.template for each in self.templates):
            name += f"_{len(self.templates)}"
        self.certificates[name] = certificate
        module = replicate_joint(
            joint,
            certificate,
            self.parts,
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
        count = len(self.parts.sizes)
        arguments = _repeated(range(len(template.arguments)), use.arguments_in_parts, count)
        results = _repeated(range(len(template.results)), use.results_in_parts, count)
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


def _repeated(items: Sequence[int], in_parts: Sequence[bool], count: int) -> list[int]:
    return [
        i
        for i, is_parted in zip(items, in_parts, strict=True)
        for _ in range(count if is_parted else 1)
    ]


def _reaches(node: Node, region: set[Node]) -> bool:
    """Whether an operator of the region takes the value, itself or seen through views."""
    for user in node.users:
        if user in region:
            return True
        is_seen = getattr(user.target, "is_view", False) or user.target is operator.getitem
        if is_seen and _reaches(user, region):
            return True
    return False


class _RootWriter:
    """Writes the root anew, with calls of the new templates."""

    def __init__(self, replicator: _Replicator) -> None:
        self.replicator = replicator
        self.old = replicator.graph
        self.count = len(replicator.parts.sizes)
        self.graph = fx.Graph()
        self.at: dict[Node, list[Node]] = {}
        self.calls: dict[Node, Node] = {}

    def write(self) -> Graph:
        for node in self.replicator.nodes:
            called = call_of(node)
            if called is not None and called[1] == FORWARD:
                self.forward(node)
            elif called is not None:
                self.backward(node)
            elif node.op in ("placeholder", "get_attr"):
                self.at[node] = [self.graph.node_copy(node)]
        outputs: Any = self.old.root.graph.output_node().args[0]
        self.graph.output(tuple(self.single(x) for x in outputs))
        templates = {each.name: each for each in self.replicator.templates.values()}
        return replace(self.old, root=module_of(self.old.root, self.graph), templates=templates)

    def single(self, node: Node) -> Node:
        (only,) = self.at[node]
        return only

    def forward(self, node: Node) -> None:
        use = self.replicator.uses[node]
        template = self.replicator.templates[use]
        operands = [x for source in node.args[2:] for x in self.at[source]]
        new = self.calls[node] = self.call(template, FORWARD, operands)
        old = self.old.templates[use.template]
        users = {user.args[1]: user for user in node.users}
        positions = _repeated(range(len(old.results)), use.results_in_parts, self.count)
        for at, i in enumerate(positions):
            if i in users:
                part = self.part(new, at, template.results[at])
                self.at.setdefault(users[i], []).append(part)

    def backward(self, node: Node) -> None:
        forward = node.meta["forward"]
        use = self.replicator.uses[forward]
        template, old = self.replicator.templates[use], self.old.templates[use.template]
        new_forward = self.calls[forward]
        num_tangents = len(old.differentiable) + len(old.threaded)
        tangents = [x for t in node.args[len(node.args) - num_tangents :] for x in self.at[t]]
        computed = iter(range(len(template.results), len(template.yields(FORWARD))))
        saved = []
        for value in template.saved:
            if value.role is Role.INPUT:
                saved.append(new_forward.args[2 + int(value.name)])
            else:
                saved.append(self.part(new_forward, next(computed), value))
        new = self.call(template, BACKWARD, [*saved, *tangents])
        new.meta["forward"] = new_forward
        users = {user.args[1]: user for user in node.users}
        wanted = [i for i, gradient in enumerate(old.gradients) if gradient is not None]
        in_parts = [use.arguments_in_parts[i] for i in wanted]
        gradients = template.yields(BACKWARD)
        for at, i in enumerate(_repeated(range(len(wanted)), in_parts, self.count)):
            if i in users:
                value = users[i].meta["val"] if not in_parts[i] else gradients[at]
                self.at.setdefault(users[i], []).append(self.part(new, at, value))

    def call(self, template: Template, part: str, operands: Sequence[Node]) -> Node:
        name = f"{template.name}_{part}".lower()
        return self.graph.create_node(
            "call_function", call, (template.name, part, *operands), name=name
        )

    def part(self, node: Node, i: int, value: Value) -> Node:
        part = self.graph.call_function(operator.getitem, (node, i))
        part.meta["val"] = value
        return part
