"""Sampling and generation."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from plait.checkpoint.chat_template import ChatTemplate, Message, read_chat_template
from plait.checkpoint.huggingface import end_tokens, load_tokenizer
from plait.errors import ConfigError, ModelError
from plait.models.decoder import Decoder, DecoderConfig
from plait.serve.generate import generate, stream_text
from plait.serve.sampling import Sampling, sample_token
from plait.train.corpus import CorpusSettings, find_corpus
from plait.train.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_size=8,
        max_positions=40,
        init_std=0.3,
    )
    model = Decoder(config).eval()
    model.initialize(torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def test_greedy_generation_equals_the_argmax_of_full_forwards(model):
    tokens = [3, 1, 4]
    expected = list(tokens)
    for _ in range(20):
        expected.append(int(model.logits(model(torch.tensor([expected])))[0, -1].argmax()))
    sampling = Sampling(temperature=0, max_new_tokens=20)
    assert list(generate(model, tokens, sampling)) == expected[3:]


def test_the_seed_decides_what_is_drawn(model):
    def draw(seed):
        sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=20, seed=seed)
        return list(generate(model, [1], sampling))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_generation_ends_at_a_stop_token_and_does_not_yield_it(model):
    sampling = Sampling(temperature=0, max_new_tokens=20)
    everything = list(generate(model, [3, 1, 4], sampling))
    stop = everything[5]
    first = everything.index(stop)
    stopped = list(generate(model, [3, 1, 4], sampling, stop_tokens=[stop]))
    assert stopped == everything[:first]


def test_generation_ends_at_the_models_limit(model):
    sampling = Sampling(temperature=0, max_new_tokens=1000)
    assert len(list(generate(model, [1] * 10, sampling))) == 31  # the last one is never fed back


@pytest.mark.parametrize(("length", "message"), [(0, "prompt is empty"), (40, "limit is 40")])
def test_a_prompt_that_does_not_fit_is_refused(model, length, message):
    with pytest.raises(ModelError, match=message):
        list(generate(model, [1] * length, Sampling()))


LOGITS = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log()


def _frequencies(sampling, draws=4000):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(draws):
        counts[sample_token(LOGITS, sampling, generator)] += 1
    return counts / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1, top_k=0, top_p=1), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Sampling(temperature=1, top_k=2, top_p=1), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(temperature=1, top_k=0, top_p=0.6), [0, 5 / 7, 2 / 7, 0, 0]),
        (Sampling(temperature=1, top_k=0, top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1e-40, top_k=0, top_p=1), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0.5, top_k=0, top_p=1), [0.0308, 0.7692, 0.1231, 0.0692, 0.0077]),
    ],
)
def test_tokens_are_drawn_with_the_stated_probabilities(sampling, expected):
    # Four standard deviations of 4,000 draws are at most 4 * 0.5 / sqrt(4000) = 0.032.
    torch.testing.assert_close(
        _frequencies(sampling), torch.tensor(expected, dtype=torch.float), atol=0.032, rtol=0
    )


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError, match="sampling needs"):
        Sampling(**change)


def _tokenizer(tmp_path):
    text = "a naïve café in 東京 🙂 " * 50
    path = tmp_path / "text.txt"
    path.write_text(text)
    documents = find_corpus(str(path), CorpusSettings(), split=False).heldout
    return train_tokenizer(documents, vocab_size=300)


def test_streamed_text_never_splits_a_character(tmp_path):
    tokenizer = _tokenizer(tmp_path)
    text = "東京 is naïve 🙂🙂 ok"
    pieces = list(stream_text(tokenizer, iter(tokenizer.encode(text).ids)))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_tokens_come_from_all_files_that_name_them(tmp_path):
    save_tokenizer(_tokenizer(tmp_path), tmp_path, max_positions=8)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert end_tokens(tmp_path) == [0, 7, 9]


def test_a_tokenizer_that_would_cut_texts_does_not(tmp_path):
    tokenizer = _tokenizer(tmp_path)
    tokenizer.enable_truncation(4)
    save_tokenizer(tokenizer, tmp_path, max_positions=8)
    assert len(load_tokenizer(tmp_path).encode("a naïve café in 東京").ids) > 4


def test_streamed_text_keeps_the_spaces_of_a_llama_2_tokenizer():
    vocabulary = {"<unk>": 0, "\u2581hello": 1, "\u2581world": 2, ".": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert "".join(stream_text(tokenizer, iter([1, 2, 3]))) == "hello world."


def test_a_chat_template_renders_and_its_own_errors_are_clear():
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        {"bos_token": "<s>"},
    )
    assert template.render([Message("user", "hi")]) == "<s>[user] hi\n[assistant]"
    failing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ModelError, match="roles must alternate"):
        failing.render([])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(attack):
    with pytest.raises(ModelError, match="chat template failed"):
        ChatTemplate(attack, {}).render([Message("user", "hi")])


def test_a_template_is_found_in_either_file(tmp_path):
    assert read_chat_template(tmp_path) is None
    settings = {"chat_template": "old", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_chat_template(tmp_path) == ChatTemplate("old", {"eos_token": "</s>"})
    several = {
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | several))
    assert read_chat_template(tmp_path) == ChatTemplate("d", {"eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("new")
    assert read_chat_template(tmp_path) == ChatTemplate("new", {"eos_token": "</s>"})
