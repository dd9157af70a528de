"""Text as bytes: a tokenizer with nothing to train, so every language is covered alike.

A token is one byte of the UTF-8 encoding. A sub-word vocabulary would be fitted to the mixture and
favour its large groups; bytes keep the vocabulary out of the balance between groups.
"""

import numpy as np

VOCAB_SIZE = 256

# 0xFF never occurs in UTF-8: a lead byte is at most 0xF4 (code points end at U+10FFFF), a
# continuation byte at most 0xBF. So it marks the end of a document and needs no 257th token.
END_OF_DOCUMENT = 0xFF


def encode(text: str) -> np.ndarray:
  """The UTF-8 bytes of `text`.

  Args:
    text: any string without lone surrogates.

  Returns:
    uint8 (number of bytes,), each in [0, 0xF4]; never `END_OF_DOCUMENT`.

  Raises:
    ValueError: `text` is no string, or holds a lone surrogate (which UTF-8 cannot write).

  >>> encode("né").tolist()
  [110, 195, 169]
  """
  if not isinstance(text, str):
    raise ValueError(f"text must be a str, got {type(text).__name__}")
  try:
    data = text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"text must be encodable as UTF-8, got the lone surrogate {text[error.start]!r} at "
      f"character {error.start}"
    ) from error
  return np.frombuffer(data, np.uint8)


def decode(tokens) -> str:
  """The text of a sequence of byte tokens; the inverse of `encode`.

  A window may start or end inside a character, and a model may write any bytes: what is not UTF-8,
  `END_OF_DOCUMENT` included, becomes U+FFFD, the replacement character.

  Args:
    tokens: integers (T,), each in [0, 256).

  Returns:
    A string.

  Raises:
    ValueError: `tokens` is not one-dimensional, not integer, or has a value outside [0, 256).

  >>> decode(encode("né"))
  'né'
  """
  tokens = np.asarray(tokens)
  if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
    raise ValueError(
      f"tokens must be a one-dimensional sequence of integers, got shape {tokens.shape} and dtype "
      f"{tokens.dtype}"
    )
  if tokens.size and (tokens.min() < 0 or tokens.max() >= VOCAB_SIZE):
    raise ValueError(
      f"tokens must be in [0, {VOCAB_SIZE}), got values in [{tokens.min()}, {tokens.max()}]"
    )
  return tokens.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
