"""`AutoModel` and friends, with and without `nomoe.register`."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nomoe
from nomoe import NomicMoEModel, data
from nomoe.integrations.transformers import (
    HFNomicMoEConfig,
    HFNomicMoEModel,
    is_registered,
)
from tests.hf import TEXTS, batch, change_config, native_can_load, write_dense

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture
def registered() -> Iterator[None]:
    nomoe.register()
    yield
    nomoe.unregister()


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No connection is made in a test of this file, nor tried, whoever would take its failure."""
    tried = []

    def refuse(*arguments: Any, **options: Any) -> None:
        tried.append(arguments)
        raise OSError("a test asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # for the processes it starts
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    assert not tried


@pytest.fixture
def no_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: Any, **options: Any) -> None:
        raise AssertionError("remote code was asked for")

    for module in ("auto_factory", "configuration_auto"):
        monkeypatch.setattr(
            f"transformers.models.auto.{module}.get_class_from_dynamic_module", fetch
        )


@torch.no_grad()
def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    return states


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> NomicMoEModel:
    """The class of nomoe itself."""
    model = NomicMoEModel.from_pretrained(folder, device="cpu", dtype=dtype)
    return model


def assert_same(
    model: nn.Module, folder: Path, inputs: dict[str, Tensor], atol: float = 0.0
) -> None:
    """Every hidden state equals that of nomoe's own class, bit for bit where atol is 0."""
    dtype = next(model.parameters()).dtype
    expected = hidden(plain_model(folder, dtype), inputs)
    for ours, theirs in zip(expected, hidden(model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


# ---- what register does


@pytest.mark.usefixtures("registered", "no_remote_code")
@pytest.mark.parametrize("trust", [None, False, True])
def test_loads_ours_whatever_is_trusted(trust: bool | None, tiny_folder: Path) -> None:
    assert "--" in json.loads((tiny_folder / "config.json").read_text())["auto_map"]["AutoModel"]
    config = AutoConfig.from_pretrained(tiny_folder, trust_remote_code=trust)
    assert type(config) is HFNomicMoEConfig
    assert config.hidden_size == config.n_embd == 96
    model = AutoModel.from_pretrained(tiny_folder, trust_remote_code=trust)
    assert type(model) is HFNomicMoEModel
    assert not model.training
    nomoe.check(model)
    assert_same(model, tiny_folder, batch(tiny_folder))
    again = AutoModel.from_pretrained(tiny_folder, config=config, trust_remote_code=trust)
    assert_same(again, tiny_folder, batch(tiny_folder))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", [*DTYPES, "auto", None])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_no_buffer_and_the_same_bits_in_every_dtype(
    dtype: str | None, name: str, tiny_folder: Path
) -> None:
    """Transformers 5 fills buffers that are not in the file with whatever is in memory."""
    given = getattr(torch, dtype) if dtype in DTYPES else dtype
    model = AutoModel.from_pretrained(tiny_folder, **{name: given})
    assert not list(model.buffers())
    assert model.dtype == (given if dtype in DTYPES else torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}
    long = [" ".join(TEXTS * 12), TEXTS[0]]
    assert_same(model, tiny_folder, batch(tiny_folder, long))


@pytest.mark.usefixtures("registered")
def test_golden_data(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(data.TINY)
    with safe_open(data.TINY / "cases.safetensors", framework="pt") as file:
        cases = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118 -- not a dict
        for case in cases:
            inputs = {
                name: file.get_tensor(f"{case}.{name}") for name in ("input_ids", "attention_mask")
            }
            for i, states in enumerate(hidden(model, inputs)):
                expected = file.get_tensor(f"{case}.hidden.{i}")
                torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


def test_registers_only_when_told_and_only_once(tiny_folder: Path) -> None:
    def contents() -> list[dict[Any, Any]]:
        names = [name for name in dir(transformers) if name.startswith("AutoModel")]
        mappings = [getattr(transformers, name)._model_mapping for name in names]
        known = [one._extra_content for one in mappings if hasattr(one, "_extra_content")]
        return [dict(one) for one in [CONFIG_MAPPING._extra_content, *known]]

    assert not is_registered()
    before = contents()
    nomoe.unregister()
    assert contents() == before
    nomoe.register()
    once = contents()
    assert once != before
    nomoe.register()
    assert contents() == once
    model = AutoModel.from_pretrained(tiny_folder)
    nomoe.unregister()
    assert contents() == before
    assert not is_registered()
    # what is loaded stays as it is
    assert_same(model, tiny_folder, batch(tiny_folder))
    assert type(AutoConfig.from_pretrained(tiny_folder)) is transformers.NomicBertConfig


def test_somebody_elses_registration_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(transformers.PretrainedConfig):  # type: ignore[misc]
        model_type = "nomic_bert"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "nomic_bert", Theirs)
    with pytest.raises(RuntimeError, match=r"Theirs is registered for nomic_bert already"):
        nomoe.register()
    nomoe.unregister()
    assert CONFIG_MAPPING._extra_content["nomic_bert"] is Theirs


def test_a_transformers_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers imports itself a second time: what this file calls by its name may be another
    held = "nomoe.integrations.transformers.transformers"
    monkeypatch.setattr(f"{held}.__version__", "4.57.6")
    with pytest.raises(RuntimeError, match=r"is 4\.57\.6, and nomoe\.register\(\) needs 5\.12"):
        nomoe.register()
    assert not is_registered()


@pytest.mark.usefixtures("registered")
def test_loading_and_saving_complain_of_nothing(
    tiny_folder: Path, tmp_path: Path, warnings_of_nomoe: pytest.LogCaptureFixture
) -> None:
    AutoModel.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    NomicMoEModel.from_pretrained(tmp_path, device="cpu")
    assert not warnings_of_nomoe.records


def test_loads_directly_without_registering(tiny_folder: Path) -> None:
    model, info = HFNomicMoEModel.from_pretrained(tiny_folder, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert_same(model, tiny_folder, batch(tiny_folder))
    assert not is_registered()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("trust", [None, True])
def test_heads_are_refused(trust: bool | None, tiny_folder: Path) -> None:
    auto_map = json.loads((tiny_folder / "config.json").read_text())["auto_map"]
    heads = auto_map.keys() - {"AutoConfig", "AutoModel"}
    assert len(heads) == 5
    for head in heads:
        with pytest.raises(ValueError, match=f"no model for {head}; nomoe.unregister"):
            getattr(transformers, head).from_pretrained(tiny_folder, trust_remote_code=trust)


# ---- dense nomic_bert: never a mix


@pytest.mark.usefixtures("no_remote_code")
@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize("trust", [None, False])
def test_dense_stays_native(trust: bool | None, with_code: bool, tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", with_code=with_code)
    ids = torch.arange(10)[None]
    before = AutoModel.from_pretrained(folder)
    nomoe.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        model = AutoModel.from_pretrained(folder, trust_remote_code=trust)
        from_config = AutoModel.from_config(config)
        masked = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust)
    finally:
        nomoe.unregister()
    assert type(config) is type(model.config) is transformers.NomicBertConfig
    assert type(model) is type(from_config) is transformers.NomicBertModel
    assert type(masked) is transformers.NomicBertForMaskedLM
    with torch.no_grad():
        assert torch.equal(model(ids)[0], before(ids)[0])
    with pytest.raises(ValueError, match=r"dense nomic_bert, a model without experts"):
        nomoe.check(model)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("experts", [0, False])
def test_dense_may_say_that_it_has_no_experts(experts: int, tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", with_code=False)
    change_config(folder, num_experts=experts, moe_top_k=0)
    assert type(AutoModel.from_pretrained(folder)) is transformers.NomicBertModel


@pytest.mark.parametrize("trust", [None, True])
def test_a_config_read_before_registering_gives_no_dense_model(
    trust: bool | None, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = native_can_load(tiny_folder, tmp_path / "moe")
    early = AutoConfig.from_pretrained(folder)
    assert type(early) is transformers.NomicBertConfig
    nomoe.register()
    try:
        with pytest.raises(ValueError, match=r"has 8 experts, and .* read it again"):
            AutoModel.from_pretrained(folder, config=early, trust_remote_code=trust)
        with pytest.raises(ValueError, match=r"has 8 experts, and .* read it again"):
            AutoModel.from_config(early)
    finally:
        nomoe.unregister()


@pytest.mark.usefixtures("registered")
def test_a_config_is_made_of_settings_that_name_experts(tiny_folder: Path) -> None:
    settings = json.loads((tiny_folder / "config.json").read_text())
    assert settings.pop("model_type") == "nomic_bert"
    config = AutoConfig.for_model("nomic_bert", **settings)
    assert (config.num_experts, config.hidden_size) == (8, 96)
    assert type(AutoModel.from_config(config)) is HFNomicMoEModel
    for given in ({}, {"hidden_size": 32}, settings | {"num_experts": 0}):
        with pytest.raises(ValueError, match=r"num_experts is absent or 0.*NomicBertConfig"):
            AutoConfig.for_model("nomic_bert", **given)
    # these make one without calling it
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_diff_dict() == config.to_diff_dict()


@pytest.mark.usefixtures("registered")
def test_dense_with_code_is_refused_or_native(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "code", with_code=True)
    for auto in (AutoModel, transformers.AutoModelForMaskedLM):
        with pytest.raises(RuntimeError, match=r"call nomoe\.unregister\(\) before"):
            auto.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"nomoe\.unregister\(\)"):
        transformers.AutoModelForMultipleChoice.from_pretrained(folder, trust_remote_code=True)
    # with no code there is nothing to mix
    plain = write_dense(tmp_path / "plain", with_code=False)
    model = AutoModel.from_pretrained(plain, trust_remote_code=True)
    assert type(model) is transformers.NomicBertModel


def test_dense_with_code_is_a_pair_after_unregister(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = write_dense(tmp_path / "code", with_code=True)
    change_config(folder, architectures=None)
    (folder / "model.safetensors").unlink()
    save_file(
        {"embeddings.weight": torch.zeros(64, 32)}, folder / "model.safetensors", {"format": "pt"}
    )
    nomoe.register()
    nomoe.unregister()
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert (type(model).__name__, type(model.config).__name__) == ("RemoteModel", "RemoteConfig")


# ---- saving, copying, moving


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    "auto_map",
    [{"AutoModel": "mine.X"}, {"AutoModel": "me/code--mine.X", "AutoConfig": "me/code--mine.C"}],
)
def test_a_map_of_its_own_is_kept_with_its_class(
    auto_map: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    change_config(folder, auto_map=auto_map, architectures=["X"])
    HFNomicMoEModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["auto_map"], saved["architectures"]) == (auto_map, ["X"])


def test_half_a_map_gives_way_to_the_published_pair(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    change_config(folder, auto_map={"AutoConfig": "mine.C"}, architectures=["X"])
    HFNomicMoEModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    published = data.real_config()
    for key in ("auto_map", "architectures"):
        assert saved[key] == published[key]


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "float32"), (-float("inf"), "bfloat16"), (1e6, "float16")]
)
def test_values_that_are_not_finite(
    value: float, dtype: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "spoiled"))
    name = "encoder.layers.3.mlp.experts.mlp.w2"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][5, 7] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"holds NaN, infinite .* in: {name}$"):
        HFNomicMoEModel.from_pretrained(folder, dtype=dtype)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("used", [False, True])
def test_saved_files_are_the_originals(used: bool, tiny_folder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_folder)
    if used:
        hidden(model, batch(tiny_folder))
    model.save_pretrained(tmp_path / "saved")
    original, saved = saved_tensors(tiny_folder), saved_tensors(tmp_path / "saved")
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[name], saved[name]) for name in original)
    before, after = (
        json.loads((one / "config.json").read_text()) for one in (tiny_folder, tmp_path / "saved")
    )
    assert after["architectures"] == ["NomicBertModel"]
    assert after["auto_map"] == before["auto_map"]
    # transformers' own business, and a setting of generation that it does not keep
    changed = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"}
    assert {key: v for key, v in before.items() if key not in changed} == {
        key: v for key, v in after.items() if key not in changed
    }
    for load in (AutoModel.from_pretrained, plain_model):
        assert_same(load(tmp_path / "saved"), tiny_folder, batch(tiny_folder))


def test_a_model_made_here_is_saved_for_everybody(tiny_folder: Path, tmp_path: Path) -> None:
    values = json.loads((tiny_folder / "config.json").read_text())
    for key in ("auto_map", "architectures", "n_inner", "layer_norm_epsilon"):
        del values[key]
    config = HFNomicMoEConfig(**values)
    model = HFNomicMoEModel(config)
    assert model.training
    assert (config.n_inner, config.layer_norm_epsilon) == (4 * 96, 1e-5)
    model.save_pretrained(tmp_path / "made")
    saved = json.loads((tmp_path / "made" / "config.json").read_text())
    assert saved["auto_map"] == data.real_config()["auto_map"]
    assert saved["architectures"] == data.real_config()["architectures"]
    ids = torch.arange(3, 20)[None]
    ours = plain_model(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(model.eval()(ids)[0], ours(ids)[0])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to itself": lambda model: model.to("cpu"),
    "there and back": lambda model: model.double().float(),
    "share_memory": lambda model: model.share_memory(),
    "train and back": lambda model: model.train().eval(),
    "state_dict": lambda model: model.load_state_dict(model.state_dict()) and model,
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_survive_use_and_change(change: str, tiny_folder: Path) -> None:
    model = HFNomicMoEModel.from_pretrained(tiny_folder)
    inputs = batch(tiny_folder)
    held = list(nn.Sequential(model).parameters())
    hidden(model, inputs)
    # whoever holds them, and by whatever road they are asked for
    assert all(one.isfinite().all() for one in held)
    for one, other in zip(nn.Sequential(model).parameters(), held, strict=True):
        assert one is other
    changed = CHANGES[change](model)
    state = changed.state_dict()
    for name, tensor in saved_tensors(tiny_folder).items():
        assert torch.equal(state[name], tensor), name
    # a copy lies at other addresses than the mapped file, and products may round otherwise there
    assert_same(changed, tiny_folder, inputs, atol=1e-5)


def test_moving_to_the_same_place_unpacks_nothing(tiny_folder: Path) -> None:
    """`Encoder.encode(device=...)` does so in every call; to pack again takes a second."""
    model = NomicMoEModel.from_pretrained(tiny_folder, device="cpu")
    hidden(model, batch(tiny_folder))
    linear = model.encoder.layers[0].attn.Wqkv
    assert linear.packed is not None
    [matrix] = linear.packed["weight"]
    nn.Sequential(model).to("cpu").eval()
    assert linear.packed["weight"][0] is matrix
    model.to(torch.bfloat16)
    assert linear.packed is None
    assert linear.weight.isfinite().all()


@pytest.mark.usefixtures("registered")
def test_another_process_registers_when_it_is_sent_a_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(tiny_folder)
    inputs = batch(tiny_folder)
    (tmp_path / "sent").write_bytes(pickle.dumps((model, inputs)))
    code = (
        "import pickle, sys; from pathlib import Path; import torch;"
        "torch.set_num_threads(1); torch.set_grad_enabled(False);"
        f"model, inputs = pickle.loads(Path({str(tmp_path / 'sent')!r}).read_bytes());"
        "from transformers import AutoModel;"
        f"again = AutoModel.from_pretrained({str(tiny_folder)!r});"
        f"torch.save([m(**inputs)[0] for m in (model, again)], {str(tmp_path / 'back')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with torch.no_grad():
        expected = model(**inputs)[0]
    for back in torch.load(tmp_path / "back"):
        # from other addresses products may round otherwise
        torch.testing.assert_close(back, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("registered")
def test_resizing_keeps_what_the_config_promises(tiny_folder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_folder)
    table = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(2050)
    assert model.get_input_embeddings().weight.shape == (2112, 96)
    model.save_pretrained(tmp_path / "resized")
    back = plain_model(tmp_path / "resized")
    assert torch.equal(back.embeddings.word_embeddings.weight[: len(table)], table)
    assert_same(model, tmp_path / "resized", {"input_ids": torch.tensor([[0, 2100, 2]])})


# ---- calling it


def test_outputs(tiny_folder: Path) -> None:
    model = HFNomicMoEModel.from_pretrained(tiny_folder)
    ours = plain_model(tiny_folder)
    inputs = batch(tiny_folder)
    with torch.no_grad():
        expected = ours(**inputs, output_hidden_states=True, output_routing=True)
        output = model(**inputs, output_hidden_states=True, output_routing=True)
        as_tuple = model(**inputs, return_dict=False)
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == 13
    assert isinstance(output, transformers.modeling_outputs.BaseModelOutput)
    assert output[0] is output.last_hidden_state
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.last_hidden_state)
    for name in ("hidden_states", "router_weights", "router_experts"):
        assert all(
            torch.equal(one, other)
            for one, other in zip(output[name], getattr(expected, name), strict=True)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_ids": torch.zeros(1, 3)}, "position_ids is not supported"),
        ({"input_ids": None}, "input_ids is missing"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 96)}, "inputs_embeds is not supp"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"head_mask": torch.ones(12)}, "head_mask is not supported"),
        ({"attention_mask": torch.full((1, 3), 2)}, "other than 0 and 1"),
        ({"token_type_ids": torch.ones(1, 3, dtype=torch.int64)}, "token_type_ids"),
    ],
)
def test_bad_calls(options: dict[str, Any], message: str, tiny_folder: Path) -> None:
    model = HFNomicMoEModel.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.tensor([[0, 5, 2]]), **options})


def test_what_is_not_supported_may_be_none(tiny_folder: Path) -> None:
    model = HFNomicMoEModel.from_pretrained(tiny_folder)
    names = ("position_ids", "inputs_embeds", "head_mask", "output_attentions")
    inputs = batch(tiny_folder)
    with torch.no_grad():
        assert torch.equal(model(**inputs, **dict.fromkeys(names))[0], model(**inputs)[0])
    with pytest.raises(TypeError, match="labels"):
        model(**inputs, labels=None)


def test_what_it_cannot_do_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    model = HFNomicMoEModel.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match=r"does not support .* checkpointing"):
        model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"spreads the model over cpu, disk"):
        HFNomicMoEModel.from_pretrained(tiny_folder, device_map={"encoder": "disk", "": "cpu"})
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        HFNomicMoEModel.from_pretrained(tiny_folder, attn_implementation="flash_attention_2")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        HFNomicMoEModel.from_pretrained(tiny_folder, nomoe_backend="triton", dtype=torch.float64)


def test_settings_that_are_not_understood_are_refused(tiny_folder: Path) -> None:
    config = HFNomicMoEConfig.from_pretrained(tiny_folder)
    config.num_shared_experts = 1
    with pytest.raises(ValueError, match="num_shared_experts=1"):
        HFNomicMoEModel(config)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_tensors_that_do_not_fit(fault: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Transformers would draw random ones and log it."""
    folder = native_can_load(tiny_folder, tmp_path / "faulty")
    tensors = saved_tensors(folder)
    name = "encoder.layers.5.mlp.experts.mlp.w1"
    if fault == "unexpected":
        tensors["encoder.layers.0.mlp.extra"] = torch.zeros(1)
        name = "encoder.layers.0.mlp.extra"
    elif fault == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = {"ignore_mismatched_sizes": True} if fault == "mismatched" else {}
    # transformers 5.12 calls what it does not know by another name
    name = name.removeprefix("encoder.")
    with pytest.raises(ValueError, match=rf"does not fit its config(?s:.*){name}.*: {fault}"):
        HFNomicMoEModel.from_pretrained(folder, **options)


def test_trains_on_torch_and_refuses_on_triton(tiny_folder: Path) -> None:
    inputs = batch(tiny_folder)
    model = HFNomicMoEModel.from_pretrained(tiny_folder).train()
    model(**inputs)[0].square().mean().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
    pytest.importorskip("triton")
    on_triton = HFNomicMoEModel.from_pretrained(tiny_folder, nomoe_backend="triton")
    assert on_triton.backend.name == "triton"
    with pytest.raises(RuntimeError, match=r"no backward pass.*nomoe_backend='torch'"):
        on_triton.train()(**inputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("registered")
@torch.no_grad()
def test_on_cuda_it_runs_what_nomoes_own_class_runs(tiny_folder: Path) -> None:
    inputs = {name: tensor.cuda() for name, tensor in batch(tiny_folder).items()}
    ours = NomicMoEModel.from_pretrained(tiny_folder, device="cuda", dtype="float16")
    model = AutoModel.from_pretrained(tiny_folder, dtype=torch.float16).to("cuda")
    assert model.backend.name == ours.backend.name
    assert torch.equal(model(**inputs)[0], ours(**inputs)[0])
