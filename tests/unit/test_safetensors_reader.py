"""The safetensors reader: same tensors as the library, same files as transformers, and no torn files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from snaketune.checkpoints import stored_tensors
from snaketune.checkpoints.safetensors_files import open_safetensors
from snaketune.common.cli import UserError
from snaketune.common.files import write_json

TENSORS = {
    "half": torch.randn(7, 5).half(),
    "bfloat16": torch.randn(3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "whole": torch.arange(6).view(2, 3),
}


def test_what_the_library_reads_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_tensors, "CHUNK", 4)  # tensors in several pieces
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    save_file(
        {"half": torch.zeros(1)}, tmp_path / "consolidated.safetensors"
    )  # Mistral's folders also have this file
    found, expected = open_safetensors(tmp_path), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    assert torch.equal(torch.cat(list(found.stored["half"].chunks(3))), TENSORS["half"][:3].flatten())


def test_the_index_says_which_files(tmp_path):
    for number, name in enumerate(("half", "whole", "scalar")):
        save_file({name: TENSORS[name]}, tmp_path / f"{number}.safetensors")
    assert open_safetensors(tmp_path).keys() == {"half", "whole", "scalar"}
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"half": "0.safetensors", "whole": "1.safetensors"}})
    assert open_safetensors(tmp_path).keys() == {"half", "whole"}
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(UserError, match=r"1\.safetensors cannot be read"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: data + b"0", "bytes instead of"),
        (lambda data: data[:5], "shorter than its header"),
        (lambda data: b"\xff" * 8 + data[8:], "shorter than its header"),
        (lambda data: data.replace(b'"dtype":', b'"dtype";'), "delimiter"),
        (lambda data: data.replace(b'"BF16"', b'"FP16"'), "bfloat16 has type FP16"),
        (lambda data: data.replace(b"[7,5]", b"[7,6]"), "70 bytes for half"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, change, said):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    path.write_bytes(change(data))
    assert path.read_bytes() != data
    with pytest.raises(UserError, match=rf"(?s)model\.safetensors cannot be read.*{said}"):
        open_safetensors(tmp_path)


def test_a_folder_without_any_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no safetensors"):
        open_safetensors(tmp_path)
