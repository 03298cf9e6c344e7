"""Step time and peak memory on a CPU with fused operators, which run their references there, and without.

    python -m benchmarks.kernels.on_cpu [--model NAME ...] [--repeat N] [--json PATH]

One process of one thread. The two programs take turns, a step each. Seconds are CPU seconds, which other
processes change little, and medians; peaks are of what torch allocates in a step.
A large vocabulary shows that logits are never whole: the last row has 16,384 words and 2,048 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import autopart
from autopart.kernels.table import KERNELS
from benchmarks.accuracy.memory import Memory

WIDTH, HEADS, LAYERS, WORDS, LARGE = 256, 4, 4, 2048, 16384
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "vocab_size": WORDS, **SPECIAL,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 512, "vocab_size": WORDS, **NO_DROPOUT}
T5 = {
    "d_model": WIDTH, "d_ff": 4 * WIDTH, "d_kv": 64, "num_heads": HEADS, "num_layers": 2, "vocab_size": WORDS,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
BLOOM = {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": WORDS, **SPECIAL}
MPT = {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 256, "vocab_size": WORDS}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"head_dim": 64, "sliding_window": 64}
DEEPSEEK = {
    **LLAMA, "num_key_value_heads": HEADS, "moe_intermediate_size": WIDTH, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 2, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 64, "first_k_dense_replace": 1, "rope_scaling": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA),
    "t5": ("T5ForConditionalGeneration", T5),
    "mixtral": ("MixtralForCausalLM", LLAMA | EXPERTS),
    "mistral, windows": ("MistralForCausalLM", LLAMA | WINDOW),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | WINDOW),
    "bloom": ("BloomForCausalLM", BLOOM),
    "mpt": ("MptForCausalLM", MPT),
    "gpt_oss": ("GptOssForCausalLM", LLAMA | EXPERTS | WINDOW),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    f"llama, {LARGE} words": ("LlamaForCausalLM", LLAMA | {"vocab_size": LARGE}),
}
"""Name -> class of transformers, and its configuration."""


def compare(name: str, repeat: int) -> dict[str, Any]:
    """Fused and not, in turns."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kind, options = MODELS[name]
    model_class: Any = getattr(transformers, kind)
    model = model_class(model_class.config_class(**options))
    tokens = torch.randint(3, WORDS, (8, 256))
    batch = {"input_ids": tokens, "labels": tokens}
    programs, seconds, losses, peaks = {}, {}, {}, {}
    for text, off in (("fused", []), ("unfused", list(KERNELS))):
        program = autopart.compile(copy.deepcopy(model), "1:cpu", batch, recompute="none", micro_batch=8, no_fuse=off)
        program.optimizer(torch.optim.SGD, lr=1e-3)
        losses[text] = float(program.step(batch))
        with Memory() as memory:
            program.step(batch)
        programs[text], seconds[text], peaks[text] = program, [], memory.peak
    for _ in range(repeat):
        for text, program in programs.items():
            start = time.process_time()
            program.step(batch)
            seconds[text].append(time.process_time() - start)
    medians = {text: statistics.median(each) for text, each in seconds.items()}
    pairs = [a / b for a, b in zip(seconds["fused"], seconds["unfused"], strict=True)]
    return {
        "model": name, "seconds": medians, "ratio": statistics.median(pairs), "peak_bytes": peaks,
        "loss_error": abs(losses["fused"] / losses["unfused"] - 1),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, help="names (default: all)")
    parser.add_argument("--repeat", type=int, default=21, help="steps of each (default: 21)")
    parser.add_argument("--json", type=Path, help="a file, written after each model; rows of others stay")
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text())["rows"] if asked.json and asked.json.exists() else []
    for name in asked.model or MODELS:
        row = compare(name, asked.repeat)
        rows = sorted([row, *(r for r in rows if r["model"] != name)], key=lambda r: [*MODELS].index(r["model"]))
        fused, plain = (1e3 * row["seconds"][key] for key in ("fused", "unfused"))
        peaks = " -> ".join(f"{row['peak_bytes'][key] / 2**20:.1f} MiB" for key in ("unfused", "fused"))
        print(f"{name:20} {plain:7.1f} -> {fused:7.1f} ms, ratio {row['ratio']:.3f}; peak {peaks}; "
              f"losses {row['loss_error']:.0e} apart", flush=True)  # fmt: skip
        if asked.json:
            found = {
                "command": f"python -m benchmarks.kernels.on_cpu --repeat {asked.repeat} --json {asked.json}",
                "rows": rows,
            }
            asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
