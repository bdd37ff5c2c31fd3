"""Export and import: what comes back is what went out, bit for bit or within FP8's step; what does not fit is named."""

import json
import sys
from dataclasses import replace
from subprocess import PIPE

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterflow.cli.loading import loaded
from counterflow.comm.mesh import Mesh
from counterflow.convert import fp8
from counterflow.convert.export import CONFIG, Form, differences, export
from counterflow.convert.load import load_folder
from counterflow.convert.shards import INDEX
from counterflow.data.tokenizer import SPECIALS, Tokenizer
from counterflow.data.tokenizer import load as load_tokenizer
from counterflow.data.tokenizer_files import Beside
from counterflow.errors import CheckpointError, ConfigError
from counterflow.model.weights import to_released
from tests import processes
from tests.data.test_tokenizer import learnt
from tests.model.configs import BASE, random_model

CONFIG_SMALL = replace(BASE, vocab_size=300, num_mtp_modules=2)
SMALL_SHARDS = 50_000 / 2**30
EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return learnt(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG_SMALL, seed=3)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    export(model, tokenizer, tmp_path / "out", Form("fp32", shard_gib=SMALL_SHARDS))
    return tmp_path / "out"


def rewrite(folder, change) -> None:
    """All tensors changed by `change` and stored as one file without an index."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_fp32_comes_back_bit_for_bit_from_many_shards(model, folder):
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 5
    back, _ = load_folder(folder)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_bf16_comes_back_rounded_once_and_biases_exact(model, tokenizer, tmp_path, precision):
    export(model, tokenizer, tmp_path / "out", Form())
    back, _ = load_folder(tmp_path / "out", precision)
    for name, value in model.state_dict().items():
        mine = back.state_dict()[name]
        if name.endswith("router.bias"):
            assert mine.dtype == torch.float32 and torch.equal(mine, value)
        else:
            assert mine.dtype == precision and torch.equal(mine.float(), value.bfloat16().float())


def test_fp8_blocks_stay_within_the_formats_step(tmp_path, tokenizer):
    """e4m3 has three bits after the point: half a step is 1/16 of an element, or 2⁻¹⁰ scales below 2⁻⁶ of them."""
    config = replace(CONFIG_SMALL, hidden_size=200, dense_intermediate_size=300)
    model = random_model(config)
    export(model, tokenizer, tmp_path / "out", Form("fp8"))
    back = dict(to_released(load_folder(tmp_path / "out")[0]))
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    assert stored["model.layers.0.mlp.gate_proj.weight"].dtype == fp8.E4M3
    assert stored["model.layers.0.mlp.gate_proj.weight_scale_inv"].shape == (3, 2)
    assert stored["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    changed = 0
    for name, value in to_released(model):
        scale = name.removesuffix("weight") + fp8.SCALE
        if scale in stored:
            changed += 1
            steps = stored[scale].repeat_interleave(128, 0)[: len(value)].repeat_interleave(128, 1)
            bound = torch.maximum(value.abs() / 16, steps[:, : value.shape[1]] / 1024)
            assert ((back[name] - value).abs() <= bound * 1.0001).all(), name
            assert not torch.equal(back[name], value)
        elif name.endswith("bias"):
            assert torch.equal(back[name], value)
        else:
            assert torch.equal(back[name], value.bfloat16().float()), name
    assert changed > 100


def test_a_folder_in_fp8_says_what_its_weights_become_and_another_nothing(tmp_path, model, tokenizer, capsys):
    for form in ("fp8", "bf16"):
        export(model, tokenizer, tmp_path / form, Form(form))
        loaded(tmp_path / form, False, "fp32", Mesh())
    said = capsys.readouterr().err
    assert said == "Its weights are FP8 and run unpacked to fp32: four times the memory.\n"


def test_fp8_zeros_and_large_values_survive():
    weight = torch.zeros(130, 260)
    weight[0, 0], weight[129, 259] = 1e4, -3e-5
    q, scales = fp8.to_blocks(weight)
    assert torch.allclose(fp8.from_blocks(q, scales), weight, rtol=1e-6)
    assert scales.shape == (2, 3) and scales[0, 1] == 1


def test_modules_left_out_are_not_promised(model, tokenizer, tmp_path):
    export(model, tokenizer, tmp_path / "out", Form("fp32", mtp=False))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["num_nextn_predict_layers"] == 0
    back, _ = load_folder(tmp_path / "out")
    tokens = torch.randint(0, 300, (2, 20))
    assert not len(back.mtp) and torch.equal(back.logits(tokens), model.logits(tokens))


def test_tokenizer_and_generation_files_say_where_documents_begin_and_end(folder, tokenizer):
    config = json.loads((folder / CONFIG).read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos
    assert {"topk_method", "scoring_func", "num_nextn_predict_layers", "rope_theta"} <= config.keys()
    again = load_tokenizer(folder / "tokenizer.json")
    assert again.encode("def f(x):") == tokenizer.encode("def f(x):")
    assert again.bpe.encode("def").ids == [tokenizer.bos, *tokenizer.encode("def")]


def test_transformers_reads_the_tokenizer(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert theirs("def f(x): 12345")["input_ids"] == [tokenizer.bos, *tokenizer.encode("def f(x): 12345")]
    assert theirs.eos_token_id == tokenizer.eos
    spelt = "".join(SPECIALS)
    assert theirs(spelt)["input_ids"] == [tokenizer.bos, *tokenizer.encode(spelt)]


def test_a_chat_template_and_all_ends_go_out_and_come_back(model, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    given = replace(
        tokenizer, beside=Beside(eos=SPECIALS[0], ends=(7, 0), template="{{ bos_token }}{{ messages }}")
    )
    export(model, given, tmp_path / "out", Form("fp32"))
    for file in (CONFIG, "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == [0, 7]
    _, again = load_folder(tmp_path / "out")
    assert again.ends == {0, 7} and again.beside.template == given.beside.template
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert theirs.chat_template == given.beside.template
    assert theirs(SPECIALS[1], add_special_tokens=False)["input_ids"] == [1]  # its templates need it


def test_what_transformers_does_otherwise_is_said(tokenizer):
    assert differences(CONFIG_SMALL, tokenizer) == []
    chats = replace(tokenizer, beside=Beside(template=""))
    said = differences(replace(CONFIG_SMALL, rms_norm_eps=1e-5), chats)
    assert len(said) == 2 and "split_special_tokens=True" in said[0] and "here 1e-05" in said[1]


def test_a_promised_module_without_weights_fails_with_its_name(model, tokenizer, tmp_path):
    export(model, tokenizer, tmp_path / "out", Form(mtp=False))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    (tmp_path / "out" / CONFIG).write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\..*there is no MTP module"):
        load_folder(tmp_path / "out")


def test_missing_extra_and_misshapen_tensors_are_named_before_anything_is_read(folder, monkeypatch):
    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("counterflow.convert.shards.Shards.read", read)
    rewrite(folder, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=f"'{EXPERT}' is not in the checkpoint"):
        load_folder(folder)
    for change, says in (
        ({EXPERT: torch.zeros(24, 47)}, rf"'{EXPERT}' is \[24, 47\]; the config makes it \[24, 48\]"),
        ({EXPERT: torch.zeros(24, 48), "model.layers.9.x": torch.zeros(1)}, r"'model\.layers\.9\.x'"),
    ):
        path = folder / "model.safetensors"
        save_file(load_file(path) | change, path)
        with pytest.raises(CheckpointError, match=says):
            load_folder(folder)


def test_a_copy_of_the_head_that_differs_is_refused(folder):
    name = "model.layers.4.shared_head.head.weight"
    rewrite(folder, lambda tensors: tensors[name].add_(1))
    with pytest.raises(CheckpointError, match=f"'{name}' differs"):
        load_folder(folder)


def test_torn_flipped_missing_and_mixed_shards_are_refused(folder):
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][EXPERT]
    whole = shard.read_bytes()

    def refused(says: str) -> None:
        with pytest.raises(CheckpointError, match=says) as caught:
            load_folder(folder)
        assert shard.name in str(caught.value)

    shard.write_bytes(whole[:-7])
    refused("no whole safetensors file")
    shard.write_bytes(b"")
    refused("no whole safetensors file")
    shard.write_bytes(whole[:-7] + bytes([whole[-7] ^ 4]) + whole[-6:])
    refused("is corrupt: its CRC")
    save_file({"other": torch.zeros(1)}, shard)
    refused(f"'{EXPERT}' is not in|is not in .*where")
    shard.unlink()
    refused("is missing")
    (folder / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="is no index of shards"):
        load_folder(folder)


def test_fp8_without_scales_is_refused(model, tokenizer, tmp_path):
    export(model, tokenizer, tmp_path / "out", Form("fp8"))
    rewrite(tmp_path / "out", lambda tensors: tensors.pop(EXPERT + "_scale_inv"))
    with pytest.raises(CheckpointError, match=f"'{EXPERT}' is FP8"):
        load_folder(tmp_path / "out")


def test_integer_scales_are_exponents_where_the_config_says_so_and_refused_otherwise(
    model, tokenizer, tmp_path
):
    export(model, tokenizer, tmp_path / "out", Form("fp8"))
    powers = {}

    def round_scales(tensors):
        for name in [name for name in tensors if name.endswith(fp8.SCALE)]:
            powers[name] = tensors[name].log2().ceil()
            tensors[name] = (powers[name] + 127).to(torch.uint8)

    rewrite(tmp_path / "out", round_scales)
    with pytest.raises(CheckpointError, match=r"_scale_inv' is stored as U8; .*scale_fmt 'ue8m0'"):
        load_folder(tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "out" / CONFIG).write_text(json.dumps(config))
    back = dict(to_released(load_folder(tmp_path / "out")[0]))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, power in powers.items():
        weight = name.removesuffix(fp8.SCALE) + "weight"
        assert torch.equal(back[weight], fp8.from_blocks(stored[weight], power.exp2()))
        assert torch.equal(back[weight], fp8.from_blocks(stored[weight], power.exp2().to(fp8.E8M0)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({EXPERT: torch.ones(24, 48, dtype=torch.int8)}, f"'{EXPERT}' is stored as I8"),
        ({EXPERT: torch.ones(24, 48).to(torch.float8_e5m2)}, "is stored as F8_E5M2"),
        ({EXPERT + "_scale_inv": torch.ones(1, 1)}, f"'{EXPERT}' is not FP8 and has"),
    ],
)
def test_weights_in_another_form_are_refused(folder, change, says):
    rewrite(folder, lambda tensors: tensors.update(change))
    with pytest.raises(CheckpointError, match=says):
        load_folder(folder)


def test_derived_buffers_are_left_out(folder, model):
    """As the shards of Moonlight and Kimi hold them."""
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    rewrite(folder, lambda tensors: tensors.update(buffers))
    back, _ = load_folder(folder)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())


def test_an_export_never_overwrites(folder, model, tokenizer):
    with pytest.raises(CheckpointError, match="is there already"):
        export(model, tokenizer, folder, Form())
    with pytest.raises(ConfigError, match="did you mean 'fp8'"):
        Form("fp9")


WRITE = """
import resource, sys, time
from pathlib import Path
import counterflow.convert.export as e
from counterflow.data.tokenizer import load
from tests.convert.test_export import CONFIG_SMALL, SMALL_SHARDS
from tests.model.configs import random_model
from counterflow.data.tokenizer_files import Beside
from counterflow.errors import CheckpointError
kind, out, tokenizer = sys.argv[1:]
if kind == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
else:
    stored = e._stored
    def slowly(*given):
        for number, item in enumerate(stored(*given)):
            if number == 60:
                print("half", flush=True)
                time.sleep(60)
            yield item
    e._stored = slowly
try:
    e.export(random_model(CONFIG_SMALL), load(Path(tokenizer)), Path(out), e.Form("fp32", shard_gib=SMALL_SHARDS * 2))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "killed"])
def test_a_full_disk_or_a_kill_leaves_nothing_that_looks_whole(kind, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    out = tmp_path / "out"
    words = [sys.executable, "-c", WRITE, kind, str(out), str(tmp_path / "tokenizer.json")]
    process = processes.Popen(words, stdout=PIPE, text=True)
    line = process.stdout.readline()
    if kind == "full":
        assert "could not be written" in line and "File too large" in line
        assert not list(tmp_path.glob("out*"))
    else:
        assert line == "half\n"
        process.kill()
        assert not out.exists() and list(tmp_path.glob("out.writing/*"))
        with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
            load_folder(tmp_path / "out.writing")
    process.stdout.close()
    process.wait(timeout=30)
