"""Graphs as text, as differences and as a page: everything is there, once, and escaped."""

import re
from html.parser import HTMLParser

import pytest
import torch

from plait.graph.display import diff, to_html, to_text
from plait.graph.graph import Role

from .programs import captured_step

ATEN = torch.ops.aten


@pytest.fixture(scope="module")
def step():
    return captured_step()


def block(graph):
    return next(t for t in graph.templates.values() if t.block == "Block")


def test_the_text_shows_each_template_once_and_says_how_often_it_is_called(step):
    text = to_text(step)
    name = block(step).name
    assert text.count(f"template {name} (Block), called 3 times forward, 3 backward") == 1
    assert text.count(f"= {name}.forward(") == 3
    assert text.count("aten.native_dropout.default(") == len(step.templates) - 1


def test_a_line_names_operator_operands_form_and_source(step):
    lines = [line.strip() for line in to_text(step).splitlines()]
    assert "relu = aten.relu.default(addmm)  -> float32[5, 12]  # programs.py:24" in lines
    assert "t = aten.t.default(arg3_1)  -> float32[6, 12] strides (1, 6)  # programs.py:24" in lines
    assert "layers_0_up_weight = parameter layers.0.up.weight  -> float32[12, 6]" in lines
    assert any(re.fullmatch(r"gradient head.bias = \w+\.2  -> float32\[4\]", x) for x in lines)


def test_the_text_is_the_same_for_the_same_program(step):
    assert to_text(captured_step()) == to_text(step)


def test_two_equal_graphs_have_no_difference(step):
    assert diff(step, step.copy()) == ""


def test_a_difference_shows_the_changed_lines_of_the_changed_template_only(step):
    after = step.copy()
    (relu,) = block(after).forward.graph.find_nodes(op="call_function", target=ATEN.relu.default)
    relu.target = ATEN.sigmoid.default
    text = diff(step, after)
    assert text.startswith(f"template {block(step).name}, forward: 1 changed\n")
    changes = [line for line in text.splitlines() if re.match(r"[+-] ", line)]
    assert [line.split("(")[0] for line in changes] == [
        "-  relu = aten.relu.default",
        "+  relu = aten.sigmoid.default",
    ]
    assert "root" not in text


def test_a_difference_counts_what_is_new_and_gone(step):
    after = step.copy()
    graph = block(after).forward.graph
    (relu,) = graph.find_nodes(op="call_function", target=ATEN.relu.default)
    with graph.inserting_before(relu):
        new = graph.call_function(ATEN.neg.default, (relu.args[0],))
    new.meta["val"] = relu.meta["val"]
    relu.args = (new,)
    assert "1 added, 1 changed" in diff(step, after)
    assert "1 removed, 1 changed" in diff(after, step)


def test_a_difference_names_templates_that_come_and_go(step):
    after = step.copy()
    del after.templates[block(after).name]
    text = diff(step, after)
    assert f"template {block(step).name}, backward: " in text


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_no_network_and_has_search_and_both_themes(step):
    text = to_html(step)
    page = Page(text)
    links = [value for name, value in page.attributes if name in ("href", "src")]
    assert all(link.startswith("#") for link in links)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert "http" not in text
    assert ("type", "search") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_every_role_and_every_operator(step):
    page = Page(to_html(step))
    for word in ("parameter layers.0.up.weight", "tangent 0", "saved relu", "argument 0"):
        assert word in page.texts, word
    assert page.texts.count("aten.native_dropout.default") == len(step.templates) - 1
    for value in step.values(Role.GRADIENT):
        assert f"gradient {value.name}" in page.texts
    anchors = {value for name, value in page.attributes if name == "id"}
    links = {value[1:] for name, value in page.attributes if name == "href"}
    assert links <= anchors


def test_the_page_escapes_whatever_a_name_holds(step):
    after = step.copy()
    evil = "<script>alert('x')</script>{{ 7 * 7 }}\" onclick=\"y"
    template = block(after)
    template.block = evil
    (relu,) = template.forward.graph.find_nodes(op="call_function", target=ATEN.relu.default)
    relu.args = (evil,)
    text = to_html(after)
    assert evil not in text
    assert any(evil in shown for shown in Page(text).texts)
    assert Page(text).tags.count("script") == 1
    assert "49" not in text.split("<main>")[1].split("</main>")[0]
