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
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checkpoint import find_weights

_BATCH = 8


def main(arguments: list[str] | None = None) -> None:
    """Load a repository through its `auto_map`, run it in float32, store what each layer gave.

    Raises:
        SystemExit: The reference cannot be compared with; the message says why.
    """
    parser = argparse.ArgumentParser(prog="python -m nomoe.reference_hf", description=__doc__)
    parser.add_argument("repo")
    parser.add_argument("texts", type=Path, help="JSON list of texts")
    parser.add_argument("answers", type=Path, help="safetensors file to write")
    parser.add_argument("--revision")
    parser.add_argument("--code-revision")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of the longest text")
    options = parser.parse_args(arguments)

    import transformers

    texts: list[str] = json.loads(options.texts.read_text(encoding="utf-8"))
    folder = Path(options.repo)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(
                options.repo,
                revision=options.revision,
                allow_patterns=["*.json", "*.py", "*.safetensors"],
            )
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = build(folder, options.code_revision)
    fill(model, folder)
    save_file(run(model, tokenizer, texts, options.max_length), options.answers)


def build(folder: Path, code_revision: str | None) -> nn.Module:
    """Build a checkpoint's own model class in float32, with random weights.

    Its `from_pretrained` is not used. The published code's ignores the revision it is asked for,
    and transformers 5's fills buffers that are not in the checkpoint, such as rotary frequencies,
    with uninitialised memory.

    Args:
        folder: The checkpoint.
        code_revision: Of the repository that its `auto_map` names; None for the main branch.

    Raises:
        SystemExit: The class is transformers' own.
    """
    import transformers

    code = {"code_revision": code_revision} if code_revision else {}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, **code)
    auto: Any = transformers.AutoModel
    model: nn.Module = auto.from_config(config, trust_remote_code=True, dtype=torch.float32, **code)
    # transformers 5 has a native nomic_bert without experts, and may hand that back
    module = type(model).__module__
    if not module.startswith("transformers_modules."):
        raise SystemExit(f"transformers loaded {module}, not the repository's own code")
    return model


def fill(model: nn.Module, folder: Path) -> None:
    """Give a model the checkpoint's tensors, all of them and no others.

    Raises:
        SystemExit: They do not fit.
    """
    tensors: dict[str, Tensor] = {}
    for path in find_weights(folder):
        tensors |= load_file(path)
    parameters = {name for name, _ in model.named_parameters()}
    loaded = model.load_state_dict(tensors, strict=False)
    # the published class builds a pooler unless told not to; no hidden state depends on it
    absent = [
        name
        for name in loaded.missing_keys
        if name in parameters and not name.startswith("pooler.")
    ]
    if absent or loaded.unexpected_keys:
        raise SystemExit(
            f"the reference code does not fit {folder}: the checkpoint lacks {absent}, the code "
            f"has no place for {loaded.unexpected_keys}"
        )


def complete(model: nn.Module) -> None:
    """Put a model in eval mode, with a method that transformers 5.23 no longer gives its class."""
    model.eval()
    if not hasattr(model, "get_extended_attention_mask"):
        type(model).get_extended_attention_mask = extended_mask  # type: ignore[attr-defined]


@torch.no_grad()
def run(model: nn.Module, tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """Run a model of whatever class, reading its layers by the checkpoint's names.

    Returns:
        "ids" (T,) and "lengths" (B,); "hidden.{i}" (T, D), 0 after the embedding norm, then after
        each layer; "probabilities.{i}" (T, E) of each MoE layer i.

    Raises:
        SystemExit: The model gives values that are not finite, or leaves out one of those modules.
    """
    complete(model)
    seen: dict[str, Tensor] = {}
    handles = {}
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
        handles[key] = part.register_forward_hook(_keep(seen, key))

    collected: dict[str, list[Tensor]] = {"ids": [], "lengths": []}
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            texts[start : start + _BATCH],
            padding=True,
            truncation=True,
            max_length=max_length,
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
    for handle in handles.values():
        handle.remove()
    if unseen := sorted(handles.keys() - seen.keys()):
        raise SystemExit(f"the reference code does not call the modules that give {unseen}")
    answers = {key: torch.cat(parts).contiguous() for key, parts in collected.items()}
    broken = [key for key, one in answers.items() if not torch.isfinite(one.float()).all()]
    if broken:
        raise SystemExit(f"the reference code gave values that are not finite in {broken}")
    return answers


def extended_mask(model: nn.Module, mask_BL: Tensor, shape: Any) -> Tensor:
    """Mask to be added to attention scores, (B, 1, 1, L): 0 for tokens, very low for padding."""
    return (1 - mask_BL[:, None, None, :].float()) * torch.finfo(torch.float32).min


def _keep(seen: dict[str, Tensor], key: str) -> Any:
    def hook(part: nn.Module, inputs: Any, output: Any) -> None:
        seen[key] = output[0] if isinstance(output, tuple) else output

    return hook


if __name__ == "__main__":
    main()
