"""Run the reference Hugging Face code on some texts and store every layer's answer.

This is the one module that executes a repository's own code, so it is run as a process of its own,
and only by `nomoe verify --reference` and the parity tests.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_BATCH = 8


def main(arguments: list[str] | None = None) -> None:
    """Load a repository through its `auto_map`, run it in float32, store what each layer gave."""
    parser = argparse.ArgumentParser(prog="python -m nomoe.reference_hf", description=__doc__)
    parser.add_argument("repo")
    parser.add_argument("texts", type=Path, help="JSON list of texts")
    parser.add_argument("answers", type=Path, help="safetensors file to write")
    parser.add_argument("--revision")
    parser.add_argument("--code-revision")
    options = parser.parse_args(arguments)

    import transformers

    texts: list[str] = json.loads(options.texts.read_text(encoding="utf-8"))
    pinned = {"revision": options.revision} if options.revision else {}
    code = {"code_revision": options.code_revision} if options.code_revision else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.repo, **pinned)
    model = transformers.AutoModel.from_pretrained(
        options.repo, trust_remote_code=True, dtype=torch.float32, **pinned, **code
    ).eval()
    # transformers 5 has a native nomic_bert without experts, and may hand that back
    module = type(model).__module__
    if not module.startswith("transformers_modules."):
        raise SystemExit(f"transformers loaded {module}, not the repository's own code")
    save_file(run(model, tokenizer, texts), options.answers)


@torch.no_grad()
def run(model: nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Run a model of whatever class, reading its layers by the checkpoint's names.

    Returns:
        "ids" (T,) and "lengths" (B,); "hidden.{i}" (T, D), 0 after the embedding norm, then after
        each layer; "probabilities.{i}" (T, E) of each MoE layer i.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    for name, part in model.named_modules():
        words = name.split(".")
        if name == "emb_ln":
            key = "hidden.0"
        elif name.startswith("encoder.layers.") and len(words) == 3:
            key = f"hidden.{int(words[2]) + 1}"
        elif name.endswith(".mlp.router.layer"):
            key = f"probabilities.{words[2]}"
        else:
            continue
        handles.append(part.register_forward_hook(_keep(seen, key)))

    collected: dict[str, list[Tensor]] = {"ids": [], "lengths": []}
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            texts[start : start + _BATCH],
            padding=True,
            truncation=True,
            max_length=512,
            return_tensors="pt",
        )
        mask_BL = batch["attention_mask"].bool()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        collected["ids"].append(batch["input_ids"][mask_BL])
        collected["lengths"].append(mask_BL.sum(dim=1))
        for key, tensor in seen.items():
            real = tensor.reshape(*mask_BL.shape, -1)[mask_BL].float()
            collected.setdefault(key, []).append(
                real.softmax(dim=-1) if key.startswith("probabilities") else real
            )
    for handle in handles:
        handle.remove()
    answers = {key: torch.cat(parts).contiguous() for key, parts in collected.items()}
    broken = [key for key, one in answers.items() if not torch.isfinite(one.float()).all()]
    if broken:
        raise SystemExit(
            f"the reference code gave values that are not finite in {', '.join(broken)}; under "
            "transformers 5 its rotary buffers can be uninitialised memory: try transformers 4"
        )
    return answers


def _keep(seen: dict[str, Tensor], key: str) -> Any:
    def hook(part: nn.Module, inputs: Any, output: Any) -> None:
        seen[key] = output[0] if isinstance(output, tuple) else output

    return hook


if __name__ == "__main__":
    main()
