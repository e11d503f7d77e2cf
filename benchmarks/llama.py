"""llama.cpp as a peer: a checkpoint's tensors written to GGUF, and run through its Python bindings.

    pip install llama-cpp-python gguf

The architecture `nomic-bert-moe` has no slot for the experts' bias, so the two compute the same
where that is zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nomoe import NomicMoEConfig
from nomoe.batching import make_batches

# of a GGUF file: all matrices in one type, norms and biases in float32
TYPES = ("f32", "bf16", "q8_0")


def obstacle() -> str | None:
    """Why llama.cpp cannot run here, or None."""
    missing = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def write_gguf(
    path: Path, config: NomicMoEConfig, tensors: Mapping[str, Tensor], matrices: str
) -> None:
    """Write a checkpoint's tensors as a GGUF file without a vocabulary: it takes token ids.

    Args:
        path: The file.
        config: Sizes and settings.
        tensors: Under the checkpoint's names; the experts' bias is left out.
        matrices: Type of the matrices, one of `TYPES`.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "nomic-bert-moe")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.embedding_rows)
    writer.add_token_type_count(config.type_vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_rope_freq_base(config.rotary_emb_base)
    writer.add_moe_every_n_layers(config.moe_every_n_layers)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.moe_top_k)

    quantized = {
        "f32": gguf.GGMLQuantizationType.F32,
        "bf16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[matrices]

    def add(name: str, tensor: Tensor) -> None:
        array = np.ascontiguousarray(tensor.detach().float().numpy())
        # like llama.cpp's own converter, which leaves the router and the token-type row in float32
        is_matrix = array.ndim > 1 and not name.startswith("token_types") and "gate" not in name
        kind = quantized if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    def by_expert(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (config.num_experts, -1))

    add("token_embd.weight", tensors["embeddings.word_embeddings.weight"])
    add("token_types.weight", tensors["embeddings.token_type_embeddings.weight"])
    pairs = {"token_embd_norm": "emb_ln"}
    for index in range(config.n_layer):
        ours, theirs = f"encoder.layers.{index}.", f"blk.{index}."
        pairs |= {
            theirs + "attn_qkv": ours + "attn.Wqkv",
            theirs + "attn_output": ours + "attn.out_proj",
            theirs + "attn_output_norm": ours + "norm1",
            theirs + "layer_output_norm": ours + "norm2",
        }
        if config.is_moe_layer(index):
            experts = ours + "mlp.experts.mlp."
            add(theirs + "ffn_gate_inp.weight", tensors[ours + "mlp.router.layer.weight"])
            add(theirs + "ffn_up_exps.weight", by_expert(tensors[experts + "w1"]))
            add(theirs + "ffn_down_exps.weight", by_expert(tensors[experts + "w2"]).mT)
        else:
            pairs |= {theirs + "ffn_up": ours + "mlp.fc1", theirs + "ffn_down": ours + "mlp.fc2"}
    for theirs, ours in pairs.items():
        for part in ("weight", "bias"):
            add(f"{theirs}.{part}", tensors[f"{ours}.{part}"])

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp on a GGUF file of this model.

    Args:
        path: What `write_gguf` wrote.
        matrices: Type of its matrices, for the name.
        most_tokens: Most tokens of a batch.
        most_texts: Most texts of a batch.
        threads: CPU threads.
    """

    def __init__(
        self, path: Path, matrices: str, most_tokens: int, most_texts: int, threads: int
    ) -> None:
        import llama_cpp

        self.name = f"llama.cpp ({matrices})"
        self._library = llama_cpp
        # it reports each tensor it loads
        self._quiet: Any = llama_cpp.llama_log_callback(lambda *message: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        # a batch is encoded in one go, so that all its tokens share each expert's product
        settings.n_ctx = settings.n_batch = settings.n_ubatch = most_tokens
        settings.n_seq_max = most_texts
        settings.n_threads = settings.n_threads_batch = threads
        settings.embeddings = True
        settings.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_MEAN
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {most_tokens} tokens")
        self._most = (most_tokens, most_texts)
        self._batch = llama_cpp.llama_batch_init(most_tokens, 0, 1)
        self._width = llama_cpp.llama_model_n_embd(self._model)

    def available(self) -> str | None:
        """It is loaded."""
        return None

    def __call__(self, texts: list[list[int]]) -> Tensor:
        """Embed, (B, D)."""
        pooled_BD = torch.empty(len(texts), self._width)
        for positions in make_batches([len(ids) for ids in texts], *self._most):
            pooled_BD[positions] = self._embed([texts[position] for position in positions])
        return pooled_BD

    def _embed(self, texts: list[list[int]]) -> Tensor:
        library, batch = self._library, self._batch
        batch.n_tokens = 0
        for sequence, ids in enumerate(texts):
            for position, one in enumerate(ids):
                slot = batch.n_tokens
                batch.token[slot], batch.pos[slot] = one, position
                batch.n_seq_id[slot], batch.seq_id[slot][0] = 1, sequence
                batch.logits[slot] = 1
                batch.n_tokens += 1
        status = library.llama_encode(self._context, batch)
        if status:
            raise RuntimeError(f"llama.cpp returned {status}")
        rows = [
            np.ctypeslib.as_array(
                library.llama_get_embeddings_seq(self._context, sequence), (self._width,)
            ).copy()
            for sequence in range(len(texts))
        ]
        return torch.from_numpy(np.stack(rows))

    def close(self) -> None:
        """Free its memory."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
