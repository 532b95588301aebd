"""Dumps survive a round trip, and a bad file is one line of BadInput."""

import os
import resource

import numpy as np
import pytest

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity.dump import FORMAT, read_dump, write_dump


@pytest.fixture
def taps():
    rng = np.random.default_rng(0)
    return {
        "model.input_embed": rng.normal(size=(5, 3)).astype(np.float32),
        "ffn_moe_topk-0": rng.integers(0, 9, (5, 2)).astype(np.int32),
        "empty-0": np.zeros((0, 4), np.float32),
        "attn_norm-0": rng.normal(size=(5, 3, 2)).astype(np.float64),
        "scalar": np.float32(3),
    }


@pytest.fixture
def path(tmp_path, taps):
    path = tmp_path / "a.dump"
    write_dump(
        path,
        taps,
        engine="test 1",
        model="m",
        arch="qwen35",
        tokens=np.array([7, 8, 9, 10, 11]),
        weights={"attn_norm-0": ("blk.0.attn_norm.weight", "F32")},
        config={"eps": np.float32(0.5), "sections": np.arange(3)},
    )
    return path


def test_round_trip(path, taps):
    dump = read_dump(path)
    assert (dump.format, dump.engine, dump.model, dump.arch) == (FORMAT, "test 1", "m", "qwen35")
    assert list(dump) == list(taps)  # execution order, though safetensors sorts its keys
    assert dump.tokens == [7, 8, 9, 10, 11]
    assert dump.weights["attn_norm-0"] == ("blk.0.attn_norm.weight", "F32")
    assert dump.config == {"eps": 0.5, "sections": [0, 1, 2]}
    for name, value in taps.items():
        assert dump[name].shape == np.shape(value)
        np.testing.assert_array_equal(dump[name], np.asarray(value, dump[name].dtype))
    assert not list(path.parent.glob("*.tmp"))


def test_reading_is_lazy(path):
    assert isinstance(read_dump(path)["attn_norm-0"], np.memmap)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_truncated(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(BadInput, match=r"a\.dump") as error:
        read_dump(path)
    assert "\n" not in str(error.value)


def test_foreign_files(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(BadInput, match="expected 'scarlet-taps/1'"):
        read_dump(tmp_path / "plain.safetensors")
    with pytest.raises(BadInput, match="cannot be read"):
        read_dump(tmp_path / "absent")
    with pytest.raises(BadInput):
        read_dump(tmp_path)
    (tmp_path / "text").write_text("hello world, this is not a dump")
    with pytest.raises(BadInput):
        read_dump(tmp_path / "text")


@pytest.mark.parametrize("key", ["tokens", "order", "weights", "config"])
def test_broken_metadata(tmp_path, key):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "d", {"format": FORMAT, key: "[1, "})
    with pytest.raises(BadInput, match=key):
        read_dump(tmp_path / "d")


def test_unwritable(tmp_path, taps):
    with pytest.raises(BadInput, match="cannot be written"):
        write_dump(tmp_path / "no" / "folder", taps, engine="", tokens=[])
    with pytest.raises(BadInput, match="dtype"):
        write_dump(tmp_path / "d", {"a": np.array(["text"])}, engine="", tokens=[])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a file size limit in a child process")
def test_no_space_leaves_nothing(tmp_path):
    child = os.fork()
    if child == 0:  # a file size limit stands in for a full disk: both fail in the middle of writing
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_dump(tmp_path / "d", {"a": np.zeros(10000, np.float32)}, engine="", tokens=[])
        except BadInput:
            os._exit(0 if not list(tmp_path.iterdir()) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
