import pytest

from balance_jax.data import digests


@pytest.fixture
def prepared(tmp_path):
  directory = tmp_path / "set"
  (directory / "sub").mkdir(parents=True)
  (directory / "a.bin").write_bytes(bytes(range(64)))
  (directory / "sub" / "b.txt").write_text("text", encoding="utf-8")
  (directory / "empty").write_bytes(b"")
  digests.write_digests(directory, {"languages": ["é", "b"]})
  return directory


def test_unchanged_files_pass(prepared):
  assert digests.check_digests(prepared) == {"languages": ["é", "b"]}
  (prepared / "later").write_text("not ours", encoding="utf-8")
  assert digests.check_digests(prepared) == {"languages": ["é", "b"]}


@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt", digests.FILE_NAME])
def test_every_flipped_or_missing_byte_is_seen(prepared, name):
  path = prepared / name
  content = path.read_bytes()
  for position in range(len(content)):
    changed = bytearray(content)
    changed[position] ^= 1 << position % 8
    for damaged in (bytes(changed), content[:position]):
      path.write_bytes(damaged)
      with pytest.raises(digests.CorruptedDataError, match=f"{prepared}.*delete that directory"):
        digests.check_digests(prepared)


@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt", "empty", digests.FILE_NAME])
def test_a_missing_file_is_named(prepared, name):
  (prepared / name).unlink()
  with pytest.raises(digests.CorruptedDataError, match=f"{name} cannot be read: No such file"):
    digests.check_digests(prepared)


def test_an_addition_is_seen(prepared):
  (prepared / "empty").write_bytes(b"x")
  with pytest.raises(digests.CorruptedDataError, match="empty has changed"):
    digests.check_digests(prepared)
