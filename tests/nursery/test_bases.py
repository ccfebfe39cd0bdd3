"""The bases: what the shipped decoder is, and how the others come about."""

import ast
import json
import math
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from deltaworks import nursery
from deltaworks.nursery import bases, corpus
from deltaworks.nursery.pretraining import bits_per_byte

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}


@pytest.fixture(scope="module")
def decoder():
    return nursery.base("nursery:decoder")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAWORKS_CACHE", str(tmp_path))
    return tmp_path


def held_out(count: int, characters: int) -> list[str]:
    """Pieces of the held-out text at equal distances."""
    whole = "".join(document.text for document in corpus.documents("validation"))
    distance = len(whole) // count
    return [whole[start : start + characters] for start in range(0, distance * count, distance)]


def test_the_decoder_fits_its_promise(decoder):
    model, tokenizer = decoder
    folder = nursery.base_path("decoder")
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    assert 4_500_000 < model.num_parameters() < 5_500_000
    assert (model.config.model_type, model.dtype, model.training) == ("llama", torch.float32, False)
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert not [path for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pkl", ".pickle"}]


def test_the_decoder_is_a_folder_like_any_other(decoder):
    folder = nursery.resolve("nursery:decoder")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = 'def zürich(x):\n\treturn "→" * 2\r\n'
    ids = tokenizer(text)["input_ids"]
    assert ids == decoder[1](text)["input_ids"]
    assert (ids[0], tokenizer.decode(ids, skip_special_tokens=True)) == (tokenizer.bos_token_id, text)
    assert {name: getattr(tokenizer, name) for name in SPECIAL} == SPECIAL


def test_the_decoder_reads_chats(decoder):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    tokenizer = decoder[1]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole == "<|bos|><|user|>\nHello<|end|>\n<|assistant|>\nHi<|eos|>"
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|bos|><|user|>\nHello<|end|>\n<|assistant|>\n"


def test_held_out_bits_per_byte_are_what_the_card_says(decoder):
    model, tokenizer = decoder
    card = (nursery.base_path("decoder") / "README.md").read_text()
    claimed = float(re.search(r"([\d.]+) bits per byte", card)[1])
    texts = held_out(16, 4000)
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    size = sum(len(text.encode()) for text in texts)
    measured = bits_per_byte(model, ids, size)
    assert measured == pytest.approx(claimed, rel=0.1)  # a sample of the held-out text, and perhaps another Python

    counts = torch.bincount(torch.tensor([token for row in ids for token in row[1:]]), minlength=4096).float()
    unigram = float(torch.special.entr(counts / counts.sum()).sum()) * float(counts.sum()) / math.log(2) / size
    assert measured < 0.7 * unigram


def test_the_decoder_writes_plausible_python(decoder):
    model, tokenizer = decoder
    torch.manual_seed(0)
    prompt = tokenizer(["class Stack:\n    def __init__(self):\n        self"] * 12, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=96, do_sample=True, temperature=0.7, top_p=0.9)
    valid = 0
    for text in tokenizer.batch_decode(written, skip_special_tokens=True):
        whole, _, _ = text.rpartition("\n")  # the last line is cut off where the tokens ran out
        try:
            valid += len(ast.dump(ast.parse(whole))) > 400
        except SyntaxError:
            continue
    assert valid >= 3


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["encoder", "seq2seq", "vision", "conv", "moe", "ssm", "decoder-facts"])
def test_a_grown_base_is_the_same_from_the_same_seed_whatever_the_threads(name, tmp_path, request):
    if name in bases.VISION:
        pytest.importorskip("sklearn")
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    for threads, attempt in enumerate(("first", "second"), start=1):
        torch.set_num_threads(threads)
        (tmp_path / attempt).mkdir()
        state = torch.get_rng_state()
        with torch.no_grad():
            bases.grow(name, tmp_path / attempt, steps=2, seed=3)
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    first, second = (folder_bytes(tmp_path / attempt) for attempt in ("first", "second"))
    assert first == second
    assert len(first["model.safetensors"]) < 12_000_000


def test_a_base_is_grown_once(own_cache, monkeypatch, capsys):
    folder = bases.cached("moe", steps=2)
    assert folder.parent == own_cache / "nursery"
    assert "nursery:moe" in capsys.readouterr().err
    monkeypatch.setattr(bases, "grow", lambda *_, **__: pytest.fail("grown again"))
    assert bases.cached("moe", steps=2) == folder
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_local_experts == 4
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(bases.SHIPPED).get_vocab()


def test_a_base_that_failed_to_grow_leaves_nothing_behind(own_cache, monkeypatch):
    def fail(name, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(bases, "grow", fail)
    with pytest.raises(KeyboardInterrupt):
        bases.cached("encoder")
    assert [path for path in (own_cache / "nursery").iterdir() if path.is_dir()] == []


def test_a_grown_base_has_learnt_more_than_how_frequent_tokens_are(tmp_path):
    bases.grow("decoder-xs", tmp_path, steps=60)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["held_out_loss"] < facts["unigram_loss"] - 0.5


def test_another_seed_gives_another_base(tmp_path):
    weights = []
    for seed in (0, 1):
        bases.grow("decoder-xs", tmp_path, steps=1, seed=seed)
        weights.append((tmp_path / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_every_base_but_the_shipped_one_has_a_recipe():
    assert set(nursery.BASES) == {"decoder", *bases.VISION, *bases.TEXT}


def test_the_decoders_of_other_sizes_grow_in_order(tmp_path):
    sizes = [bases.TEXT[f"decoder-{size}"].model().num_parameters() for size in ("xs", "s", "m")]
    assert sizes == sorted(sizes) and sizes[2] < nursery.base("decoder")[0].num_parameters()


def test_each_kind_frames_a_text_as_its_models_do():
    ids = {framing: bases.entries(framing)("x")["input_ids"] for framing in ("causal", "masked", "seq2seq")}
    x = ids["causal"][1:]
    assert ids == {"causal": [1, *x], "masked": [1, *x, 2], "seq2seq": [*x, 2]}
    pair = bases.entries("masked")("x", "x")["input_ids"]
    assert pair == [1, *x, 2, *x, 2]


@pytest.mark.parametrize("name", list(bases.VISION))
def test_a_vision_base_takes_a_new_head(name, tmp_path):
    pytest.importorskip("sklearn")
    bases.grow(name, tmp_path, steps=2)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=10)
    from transformers import AutoImageProcessor

    assert model.config.id2label[3] == "3"
    images = [row["image"] for row in nursery.data("digits")["train"].select(range(3))]
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")
    assert model(**pixels).logits.shape == (3, 10)
