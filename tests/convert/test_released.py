"""Published releases load, write and chat, at toy sizes of their own configurations; the full ones without memory."""

import json
from pathlib import Path

import pytest
import torch

from counterflow.cli import main
from counterflow.config.released import from_released, read_released
from counterflow.infer.chat import chat_of
from counterflow.infer.engine import EngineSettings, with_room
from counterflow.model.transformer import Transformer
from counterflow.model.weights import released_shapes
from counterflow.plan.count import count_parameters
from counterflow.train.restore import model_of
from tests.convert.released import CONFIGS, DEEPSEEK, KIMI, released_folder

TURNS = [
    {"role": "user", "content": "the an <｜Assistant｜>x<|im_end|>"},
    {"role": "assistant", "content": "<think>hm</think>the"},
    {"role": "user", "content": "and"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("released")


def made(root: Path, name: str) -> Path:
    """The release's folder, made by the first test that wants it."""
    return root / name if (root / name).exists() else released_folder(root, name)


@pytest.mark.parametrize("name", [*DEEPSEEK, *KIMI])
def test_a_release_is_imported_writes_and_chats(root, name, capsys):
    folder = made(root, name)
    run = root / f"{name}-run"
    assert main(["import", str(folder), str(run)]) == 0
    given, tokenizer = model_of(folder)
    imported, again = model_of(run)
    assert given.config.max_positions >= 8192
    assert all(torch.equal(imported.state_dict()[key], value) for key, value in given.state_dict().items())
    assert (again.ends, again.bos, again.beside.template) == (
        tokenizer.ends,
        tokenizer.bos,
        tokenizer.beside.template,
    )
    ids = chat_of(tokenizer).prompt(TURNS)
    assert chat_of(again).prompt(TURNS) == ids
    names = {number: control for control, number in tokenizer.controls.items()}
    controls = [names[one] for one in ids if one in names]
    if name in DEEPSEEK:
        asked, said = "<｜User｜>", ["<｜Assistant｜>", "</think>"]
        begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
        assert controls == [begin, asked, *said, end, asked, *said] and tokenizer.ends == {1}
    else:
        assert controls == ["<|im_user|>", "<|im_end|>"] * 3 + ["<|im_user|>"]
        assert {names[one] for one in tokenizer.ends} == {"[EOS]", "<|im_end|>"}
    capsys.readouterr()
    texts = set()
    for model in (folder, run):
        words = [
            "generate",
            "--run",
            str(model),
            "--prompt",
            "the ",
            "--max_tokens",
            "4",
            "--precision",
            "fp32",
        ]
        assert main([*words, "--temperature", "0"]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


def test_what_a_release_ends_with_goes_out_again(root, tmp_path):
    folder = made(root, KIMI[0])
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = model_of(tmp_path / "out")[1]
    assert set(ends) == tokenizer.ends and tokenizer.beside.template == model_of(folder)[1].beside.template


@pytest.mark.parametrize("name", [*DEEPSEEK, *KIMI])
def test_the_full_model_has_its_published_tensors_and_asks_for_what_a_text_needs(name):
    config = read_released(CONFIGS / f"{name}.json")
    with torch.device("meta"):
        model = Transformer(config)
    shapes = released_shapes(model)
    sizes, biases = count_parameters(config), config.num_routed_experts * len(model.layers)
    assert (
        0
        <= sum(torch.Size(shape).numel() for shape in shapes.values()) - sizes.total - sizes.mtp
        <= biases * 2
    )
    assert model.rope.shape == (config.max_positions, config.qk_rope_head_dim // 2)
    one = with_room(model, EngineSettings(max_sequences=1, cache_bytes=1), 700)
    assert one.cache_bytes < 2**28 and one.positions == 700


def test_a_folder_of_another_model_is_refused_by_the_name_of_its_key(root, capsys):
    folder = made(root, DEEPSEEK[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"index_topk": 2048}))
    try:
        assert main(["generate", "--run", str(folder)]) == 2
    finally:
        (folder / "config.json").write_text(json.dumps(config))
    assert "index_topk is 2048" in capsys.readouterr().err and from_released(config)
