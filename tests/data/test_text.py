import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from balance_jax import data


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(text):
  tokens = data.encode(text)
  assert tokens.dtype == np.uint8
  assert tokens.tolist() == list(text.encode("utf-8"))
  assert data.decode(tokens) == text
  assert data.decode(tokens.astype(np.int32)) == text


def test_end_of_document_occurs_in_no_code_point():
  everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
  tokens = data.encode(everything)
  assert tokens.max() == 0xF4 < data.END_OF_DOCUMENT < data.VOCAB_SIZE
  assert data.END_OF_DOCUMENT not in tokens


def test_decode_replaces_what_is_not_utf8():
  assert data.decode([65, data.END_OF_DOCUMENT, 66]) == "A\ufffdB"
  assert data.decode(data.encode("né")[:-1]) == "n\ufffd"
  assert data.decode([]) == ""


@pytest.mark.parametrize("bad", [b"abc", 3, None])
def test_encode_wants_a_string(bad):
  with pytest.raises(ValueError, match="text must be a str"):
    data.encode(bad)


def test_encode_names_a_lone_surrogate():
  with pytest.raises(ValueError, match=r"lone surrogate .* character 1"):
    data.encode("a\ud800")


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ([[1]], "one-dimensional"),
    ([1.5], "integers"),
    ([256], r"\[0, 256\)"),
    ([-1], r"\[0, 256\)"),
  ],
)
def test_decode_rejects(bad, message):
  with pytest.raises(ValueError, match=message):
    data.decode(bad)
