"""Models by name: a local folder, a hub id, or random weights in known shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmsched_gym.config import ModelSpec
from llmsched_gym.real_backend.attention import NAME
from llmsched_gym.real_backend.errors import BackendError, one_line

_MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rope_theta": 1e6,
}
_TINY = {
    "model_type": "mistral",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "random:mistral-7b": _MISTRAL_7B,
    "random:tiny": _TINY,
    "random:tiny-llama": {**_TINY, "model_type": "llama"},
    "random:tiny-qwen2": {**_TINY, "model_type": "qwen2"},
}
"""Configurations that are built with normal-initialised weights; mistral-7b's are Mistral-7B-Instruct-v0.2's."""

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
KNOWN_ROPES = {"default", "linear", "llama3", "yarn"}
"""Position encodings that do not depend on the other sequences of a batch."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for hybrid batches."""

    name: str
    model: PreTrainedModel
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device


def load_model(
    model: str | PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None, seed: int = 0
) -> LoadedModel:
    """The model that `model` names, or the model itself, with the paged attention set.

    A folder or a hub id is read by transformers; a name of :data:`RANDOM_MODELS` needs no download. `dtype` defaults to
    bfloat16 on a GPU and float32 on the CPU. Raises :class:`BackendError` with one line for what cannot be used.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if not isinstance(model, str):
        name = model.config.name_or_path or type(model).__name__
        loaded = cast(Any, model).to(device)
        dtype = loaded.dtype
    elif model.startswith("random:"):
        name, loaded = model, _random(model, device, dtype, seed)
    else:
        name, loaded = model, _pretrained(model, device, dtype)
    _check_config(name, loaded.config)
    loaded.set_attn_implementation(NAME)
    return LoadedModel(name, loaded.eval(), model_spec(name, loaded.config, dtype), dtype, device)


def model_spec(name: str, config: Any, dtype: torch.dtype) -> ModelSpec:
    """The shapes that a cost profile keeps."""
    return ModelSpec(
        name=Path(name).name.removeprefix("random:"),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        vocab_size=config.vocab_size,
        bytes_per_value=dtype.itemsize,
    )


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _random(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    if name not in RANDOM_MODELS:
        raise BackendError(
            f"model {name!r}: expected one of {', '.join(RANDOM_MODELS)}, a local folder or an id of the hub"
        )
    settings = dict(RANDOM_MODELS[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    before = torch.get_default_dtype()
    # Built in place: a model moved from the meta device would lose the rotary frequencies, which no checkpoint holds.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except torch.OutOfMemoryError:
            raise BackendError(f"model {name!r}: its weights do not fit into the memory of {device}") from None
        finally:
            torch.set_default_dtype(before)


def _pretrained(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise BackendError(f"model {name!r}: the folder has no config.json; expected a saved transformers model")
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise BackendError(f"model {name!r}: no such folder")
    try:
        with _quiet():
            options = {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
            loaded, report = cast(Any, AutoModelForCausalLM).from_pretrained(name, **options)
    except Exception as error:  # transformers, hub, safetensors and network raise many kinds
        raise BackendError(_explain(name, error)) from None
    _check_report(name, report)
    try:
        return loaded.to(device)
    except torch.OutOfMemoryError:
        raise BackendError(f"model {name!r}: its weights do not fit into the memory of {device}") from None


def _explain(name: str, error: BaseException) -> str:
    """One line for why a checkpoint cannot be read, and what to do."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(chain) < 10:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {type(link).__name__ for link in chain}
    if "GatedRepoError" in kinds:
        return (
            f"model {name!r} is gated: accept its terms at https://huggingface.co/{name} and log in with "
            "`hf auth login`, or name a local folder or random:mistral-7b"
        )
    if "RepositoryNotFoundError" in kinds:
        return f"model {name!r}: no such folder and no such model on the hub (a private one needs `hf auth login`)"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
        return (
            f"model {name!r} is neither a local folder nor in the cache, and the hub cannot be reached: "
            "name a folder, or use random:mistral-7b or random:tiny"
        )
    return f"model {name!r}: cannot be loaded: {one_line(error)}"


def _check_report(name: str, report: dict[str, Any]) -> None:
    """Refuse checkpoints that do not fill the model that their config describes."""
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise BackendError(
            f"model {name!r}: wrong shape: the checkpoint's {key} is {list(found)}, its config.json asks for "
            f"{list(expected)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise BackendError(f"model {name!r}: the checkpoint lacks {missing[0]} ({len(missing)} weights in all)")
    places = (".weight", ".bias")
    surplus = sorted(key for key in report["unexpected_keys"] if ".layers." in key and key.endswith(places))
    if surplus:
        raise BackendError(
            f"model {name!r}: wrong shape: the checkpoint has {surplus[0]} ({len(surplus)} weights in all), for which "
            "its config.json has no place"
        )


def _check_config(name: str, config: Any) -> None:
    """Refuse what a hybrid batch would compute wrongly."""
    layers = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if layers:
        raise BackendError(f"model {name!r}: layers of kind {sorted(layers)[0]!r} are not supported")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in KNOWN_ROPES:
        raise BackendError(f"model {name!r}: position encoding {rope!r} depends on the batch and is not supported")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' load report and progress bars away: what matters of them is in our error."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
