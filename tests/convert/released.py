"""Folders in the form of published releases at toy sizes: their configurations' own keys, weights in their blocks,
their kinds of tokenizer, templates and generation settings.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as Bpe

from counterflow.config.released import from_released
from counterflow.convert import fp8
from counterflow.convert.export import Form, export
from counterflow.convert.shards import INDEX
from counterflow.data.tokenizer import load
from tests.data.test_tokenizer import RANKS, learnt, tiktoken_folder
from tests.model.configs import random_model

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
SMALL = {
    "vocab_size": 528,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "initializer_range": 0.1,
}
"""All else stays as published: groups, scores, YaRN, positions, shared experts, MTP modules."""
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜></think>' + message['content'].split('</think>')[-1] + eos_token }}{% else %}"
    "{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜></think>' }}{% endif %}"
)
KIMI_TEMPLATE = """{%- for message in messages -%}
  {{ '<|im_user|>' }}{{ message['role'] }}: {{ message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_user|>assistant:
{%- endif -%}"""
DEEPSEEK, KIMI = ("deepseek-r1", "deepseek-v3.1"), ("moonlight-16b-a3b", "kimi-k2")


def config_of(name: str) -> dict:
    """The published configuration at toy sizes."""
    released = json.loads((CONFIGS / f"{name}.json").read_text())
    small = SMALL | ({"q_lora_rank": 24} if released["q_lora_rank"] else {})
    ids = {"bos_token_id": 0, "eos_token_id": 1} if name in DEEPSEEK else kimi_ids()
    return released | small | ids


def kimi_ids() -> dict:
    """As both releases: a text ends at a turn's end, which is not the end of a document."""
    return {"bos_token_id": len(RANKS), "eos_token_id": len(RANKS) + 2}


def released_folder(root: Path, name: str) -> Path:
    """The folder, below `root`."""
    folder, released = root / name, config_of(name)
    model = random_model(from_released(released), seed=1).requires_grad_(False)
    deepseek_tokenizer(root / f"{name}-tokenizer")
    packed = "quantization_config" in released
    export(
        model, load(root / f"{name}-tokenizer" / "tokenizer.json"), folder, Form("fp8" if packed else "bf16")
    )
    rewrite(folder, released)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).unlink()
    if name in DEEPSEEK:
        for path in (root / f"{name}-tokenizer").glob("*.json"):
            path.rename(folder / path.name)
    else:
        tiktoken_folder(folder)
        (folder / "chat_template.jinja").write_text(KIMI_TEMPLATE)
        end = {"eos_token_id": kimi_ids()["eos_token_id"], "max_length": 131072}
        (folder / "generation_config.json").write_text(json.dumps(end))
    (folder / "config.json").write_text(json.dumps(released))
    return folder


def deepseek_tokenizer(folder: Path) -> None:
    """Begin and end are special, roles and thoughts are not, and the template stands in the tokenizer's settings."""
    folder.mkdir()
    text = learnt(folder, 300).bpe.to_str()
    for old, new in {"<|eos_token|>": BEGIN, "<|fim_begin|>": END}.items():
        text = text.replace(json.dumps(old), json.dumps(new, ensure_ascii=False))
    bpe = Bpe.from_str(text)
    bpe.add_tokens([AddedToken(mark, special=False, normalized=True) for mark in MARKS])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": BEGIN}, "eos_token": {"content": END}, "pad_token": {"content": END}}
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "chat_template": DEEPSEEK_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')


def rewrite(folder: Path, released: dict) -> None:
    """One shard, with scales of powers of two where the configuration says so, and Moonlight's and Kimi's buffers."""
    tensors = {}
    for path in [*folder.glob("*.safetensors")]:
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    if released.get("quantization_config", {}).get("scale_fmt"):
        tensors |= {
            name: scale.log2().ceil().exp2() for name, scale in tensors.items() if name.endswith(fp8.SCALE)
        }
    if not released["num_nextn_predict_layers"]:
        layers = range(released["num_hidden_layers"])
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in layers}
    save_file(tensors, folder / "model.safetensors")
