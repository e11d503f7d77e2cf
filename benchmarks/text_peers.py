"""Other software that embeds strings with this model, one adapter each.

An adapter loads a checkpoint's folder in a dtype on a device, takes whole texts, prompt included,
and gives unit vectors. What it cannot do without is looked for before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

import nomoe
from nomoe.arguments import DTYPES

# (n, D) float32, unit norm, in the order of the texts
EmbedTexts = Callable[[list[str]], Tensor]

# requests under way at a time: the server makes batches of what waits
_REQUESTS = 16
_TIMEOUT_S = 600


class Setting(NamedTuple):
    """What every adapter is to run."""

    # a checkpoint in the published format
    folder: Path
    # a key of `nomoe.arguments.DTYPES`
    dtype: str
    device: torch.device
    # base address of a running text-embeddings-inference, or None
    tei: str | None = None
    # run the code that the checkpoint names
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TextPeer:
    """One adapter."""

    name: str
    # why it cannot run here, or None
    obstacle: Callable[[Setting], str | None]
    load: Callable[[Setting], EmbedTexts]


def _missing(package: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"


def _load_nomoe(setting: Setting) -> EmbedTexts:
    encoder = nomoe.Encoder.from_pretrained(
        setting.folder, dtype=setting.dtype, device=setting.device
    )

    def embed(texts: list[str]) -> Tensor:
        # the prompt is in the text already
        vectors = encoder.encode(texts, prompt="", show_progress_bar=False)
        return torch.from_numpy(vectors)

    return embed


def _load_sentence_transformers(setting: Setting) -> EmbedTexts:
    from sentence_transformers import SentenceTransformer

    nomoe.register()
    model = SentenceTransformer(
        str(setting.folder),
        device=str(setting.device),
        model_kwargs={"dtype": DTYPES[setting.dtype]},
    )
    nomoe.check(model)

    def embed(texts: list[str]) -> Tensor:
        vectors = model.encode(texts, show_progress_bar=False, convert_to_tensor=True)
        return vectors.float().cpu()

    return embed


def _remote_obstacle(setting: Setting) -> str | None:
    if not setting.trust_remote_code:
        return "it runs code from the Hub; --trust-remote-code allows that"
    config = json.loads((setting.folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" not in config:
        return f"{setting.folder} names no code"
    return _missing("transformers")


def _load_remote(setting: Setting) -> EmbedTexts:
    import transformers

    from nomoe import reference_hf

    model = reference_hf.build(setting.folder, None)
    reference_hf.fill(model, setting.folder)
    reference_hf.complete(model)
    model.to(setting.device, DTYPES[setting.dtype])
    tokenizer = transformers.AutoTokenizer.from_pretrained(setting.folder)

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        # as sentence-transformers does: longest first, 32 to a batch
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]), reverse=True)
        parts = []
        for start in range(0, len(order), 32):
            batch = tokenizer(
                [texts[place] for place in order[start : start + 32]],
                padding=True,
                truncation=True,
                max_length=512,
                return_tensors="pt",
            ).to(setting.device)
            hidden_BLD = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            mask_BL1 = batch["attention_mask"][..., None]
            parts.append((hidden_BLD.float() * mask_BL1).sum(1) / mask_BL1.sum(1))
        rows = torch.nn.functional.normalize(torch.cat(parts).cpu(), dim=1)
        return torch.empty_like(rows).index_copy_(0, torch.tensor(order), rows)

    return embed


def _vllm_obstacle(setting: Setting) -> str | None:
    if setting.device.type != "cuda":
        return "it is compared on CUDA alone"
    return _missing("vllm")


def _load_vllm(setting: Setting) -> EmbedTexts:
    import vllm

    model = vllm.LLM(
        model=str(setting.folder),
        runner="pooling",
        dtype=setting.dtype,
        max_model_len=512,
        # of the whole card, on which others are already
        gpu_memory_utilization=0.3,
    )

    def embed(texts: list[str]) -> Tensor:
        outputs = model.encode(
            texts, pooling_task="embed", truncate_prompt_tokens=-1, use_tqdm=False
        )
        vectors = torch.stack([one.outputs.data for one in outputs]).float().cpu()
        return torch.nn.functional.normalize(vectors, dim=1)

    return embed


def _tei_obstacle(setting: Setting) -> str | None:
    if setting.tei is None:
        return "no server was named; --tei takes the address of one that serves this checkpoint"
    try:
        info = _ask(setting.tei + "/info")
    except (URLError, OSError, ValueError) as error:
        return f"{setting.tei} does not answer: {error}"
    if (served := info.get("model_dtype")) != setting.dtype:
        return f"{setting.tei} serves {served}, and {setting.dtype} is compared"
    return None


def _load_tei(setting: Setting) -> EmbedTexts:
    assert setting.tei is not None
    address = setting.tei
    most = int(_ask(address + "/info").get("max_client_batch_size", 32))

    def request(texts: list[str]) -> Any:
        return _ask(address + "/embed", {"inputs": texts, "normalize": True, "truncate": True})

    def embed(texts: list[str]) -> Tensor:
        parts = [texts[start : start + most] for start in range(0, len(texts), most)]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            rows = [row for part in pool.map(request, parts) for row in part]
        return torch.tensor(rows, dtype=torch.float32)

    return embed


def _ask(address: str, body: object = None) -> Any:
    """GET, or POST a JSON body; what came back."""
    data = None if body is None else json.dumps(body).encode()
    asked = Request(address, data, {"Content-Type": "application/json"})
    with urlopen(asked, timeout=_TIMEOUT_S) as response:
        return json.load(response)


def why_not_fastembed() -> str:
    """Say why fastembed is not among the peers: no version that was looked at has this model."""
    if reason := _missing("fastembed"):
        return reason
    from fastembed import TextEmbedding

    known = [one["model"].lower() for one in TextEmbedding.list_supported_models()]
    if not any("nomic-embed-text-v2-moe" in name for name in known):
        return f"fastembed {version('fastembed')} does not have this model"
    return f"fastembed {version('fastembed')} has this model by now, but no adapter here yet"


# what the peers are made of
PACKAGES = ("transformers", "sentence-transformers", "megablocks", "vllm")

NOMOE = TextPeer("nomoe, Encoder", lambda setting: None, _load_nomoe)
PEERS = (
    NOMOE,
    TextPeer(
        "sentence-transformers over nomoe",
        lambda setting: _missing("sentence_transformers"),
        _load_sentence_transformers,
    ),
    TextPeer("the published code", _remote_obstacle, _load_remote),
    TextPeer("vLLM", _vllm_obstacle, _load_vllm),
    TextPeer("text-embeddings-inference", _tei_obstacle, _load_tei),
)
