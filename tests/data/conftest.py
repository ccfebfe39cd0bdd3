"""Tokenizers as fixtures."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_from_nothing import CHATML, byte_level, word_level


@pytest.fixture(scope="session")
def decoder_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    return word_level()
