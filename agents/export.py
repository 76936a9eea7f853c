"""From a torch model to a policy folder; of an SB3 zip: ``python -m llmsched_gym.agents.export MODEL.zip FOLDER``.

And back: :func:`load_actor` lets a training go on from a folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from llmsched_gym.agents.decision_time import finish
from llmsched_gym.agents.networks import ACTIVATIONS, Normaliser, RowsExtractor
from llmsched_gym.agents.options import fail_in_one_line
from llmsched_gym.config import EnvConfig
from llmsched_gym.env.features import MIXING
from llmsched_gym.help_text import OneLineParser
from llmsched_gym.interrupts import leave
from llmsched_gym.policies import PolicySpec
from llmsched_gym.policies.folder import read_folder, spec_for
from llmsched_gym.policies.sb3_zip import as_it_is, num_features, read_zip, zip_config, zip_normaliser
from llmsched_gym.scheduler import PolicyError


def export(policy: Any, config: EnvConfig, **fields: Any) -> tuple[PolicySpec, dict[str, np.ndarray]]:
    """Spec and tensors of an SB3 policy trained on `config`; `fields` (training, decision_s) go into the spec."""
    architecture, tensors = _actor(policy)
    arrays = {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in tensors.items()}
    return spec_for(config, architecture, num_features(policy.observation_space), **fields), arrays


def load_actor(policy: Any, config: EnvConfig, folder: str | Path) -> None:
    """Give an SB3 policy for `config` the decisions of a policy folder; the critic, which folders lack, stays as it is.

    A folder may see the price of mixing where the policy's profile has none, and the other way round. Raises
    :class:`PolicyError` with one line if its actions, observations or network are others.
    """
    spec, arrays = read_folder(folder)
    architecture, tensors = _actor(policy)
    wanted = spec_for(config, architecture, num_features(policy.observation_space))
    if spec.architecture == architecture:
        spec, arrays = _with_features(spec, arrays, wanted.observation["features"])
    for name in ("action", "observation", "architecture"):
        theirs, ours = dict(getattr(spec, name)), dict(getattr(wanted, name))
        for key in sorted({*theirs, *ours}, key=lambda key: (key != "kind", key)):
            if theirs.get(key) != ours.get(key):
                differs = f"{name}.{key} is {theirs.get(key)!s:.60}, this training's {ours.get(key)!s:.60}"
                raise PolicyError(f"policy {str(folder)!r}: {differs}")
    for name, tensor in tensors.items():
        if name not in arrays or arrays[name].shape != tuple(tensor.shape):
            got = arrays[name].shape if name in arrays else None
            raise PolicyError(f"policy {str(folder)!r}: {name} is {got}, this training's network {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(arrays[name]))


def _with_features(
    spec: PolicySpec, arrays: dict[str, np.ndarray], names: list[str]
) -> tuple[PolicySpec, dict[str, np.ndarray]]:
    """The folder's network on the features `names`, if the price of mixing is all that sets theirs apart.

    One that is no longer seen was 0: what it gave goes into the biases. One that is new has no weight.
    """
    theirs, last = list(spec.observation["features"]), MIXING.name
    gone = theirs == [*names, last]
    if not gone and [*theirs, last] != names:
        return spec, arrays
    arrays = dict(arrays)
    mean, scale = arrays["normalise.mean"], arrays["normalise.scale"]
    first = "hidden.0" if spec.architecture.get("layers") else "out"
    inputs = {first: first} if spec.architecture["kind"] == "mlp" else {"context": "row", "pool": "pool"}
    for layer, bias in inputs.items():
        weight = arrays[f"{layer}.weight"]
        if gone:
            arrays[f"{bias}.bias"] = arrays[f"{bias}.bias"] - weight[:, -1] * mean[-1] * scale[-1]
        arrays[f"{layer}.weight"] = weight[:, :-1] if gone else np.pad(weight, ((0, 0), (0, 1)))
    arrays["normalise.mean"] = mean[:-1] if gone else np.append(mean, np.float32(0))
    arrays["normalise.scale"] = scale[:-1] if gone else np.append(scale, np.float32(1))
    return dataclasses.replace(spec, observation={**spec.observation, "features": names}), arrays


def _actor(policy: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Architecture and weights of what decides, by their names in a folder; the tensors are the policy's own."""
    name, extractor = type(policy).__name__, getattr(policy, "features_extractor", None)
    if not isinstance(policy, ActorCriticPolicy | MaskableActorCriticPolicy) or isinstance(
        policy, RecurrentActorCriticPolicy
    ):
        raise PolicyError(f"model: expected a policy of PPO or MaskablePPO, got {name}")
    if isinstance(extractor, RowsExtractor):
        return _rows(policy)
    if not isinstance(extractor, Normaliser | FlattenExtractor):
        raise PolicyError(f"model: a folder has no place for the features extractor {type(extractor).__name__}")
    return _mlp(policy)


def _linear(name: str, layer: nn.Linear) -> dict[str, torch.Tensor]:
    found = {f"{name}.weight": layer.weight}
    return found if layer.bias is None else found | {f"{name}.bias": layer.bias}


def _normaliser(module: Any) -> dict[str, torch.Tensor]:
    if isinstance(module, Normaliser):
        return {"normalise.mean": module.mean, "normalise.scale": module.scale}
    size = num_features(module._observation_space)
    return {"normalise.mean": torch.zeros(size), "normalise.scale": torch.ones(size)}


def _mlp(policy: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    modules = list(policy.mlp_extractor.policy_net)
    layers = [m for m in modules if isinstance(m, nn.Linear)]
    kinds = {type(m) for m in modules} - {nn.Linear} or {nn.Tanh}
    names = [name for name, cls in ACTIVATIONS.items() if {cls} == kinds]
    if not names or not isinstance(policy.action_net, nn.Linear):
        raise PolicyError("model: expected an MLP with tanh or relu between its layers")
    tensors = _normaliser(policy.features_extractor) | _linear("out", policy.action_net)
    for i, layer in enumerate(layers):
        tensors |= _linear(f"hidden.{i}", layer)
    return {"kind": "mlp", "layers": len(layers), "activation": names[0]}, tensors


def _rows(policy: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    body, head = policy.features_extractor, policy.action_net
    tensors = _normaliser(body.normalise)
    for name in ("row", "context", "mix", "pool"):
        tensors |= _linear(name, getattr(body, name))
    for i, (qkv, mixed) in enumerate(zip(body.qkv, body.mixed, strict=True)):
        tensors |= _linear(f"attention.{i}.qkv", qkv) | _linear(f"attention.{i}.out", mixed)
    if hasattr(head, "row"):
        for name in ("row", "pool", "out"):
            tensors |= _linear(f"score.{name}", getattr(head, name))
        if head.close is not None:
            tensors |= _linear("out", head.close)
    else:
        tensors |= _linear("out", head.out)
    return {"kind": "rows", **body.settings}, tensors


def main() -> int:
    return fail_in_one_line(command, "interrupted")


def command() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("model", help="SB3 zip of PPO or MaskablePPO; only one you trust: it holds pickles")
    parser.add_argument("folder", help="policy folder to write")
    for name in ("repeat", "token-budget"):
        parser.add_argument(f"--{name}", help="as it was trained with, where the zip does not say")
    parser.add_argument("--vecnormalize", help="none: leave the statistics of VecNormalize beside the zip alone")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    path, folder = Path(given.pop("model")), given.pop("folder")
    options = {"allow_pickle": "true", **given}
    model = read_zip(path, options)
    if zip_normaliser(path, model, options.get("vecnormalize")) is not as_it_is:
        what = "a folder holds no VecNormalize statistics: evaluate the zip itself, or train with agents.train"
        raise PolicyError(f"policy {str(path)!r}: {what}")
    config = zip_config(str(path), model, options)
    print(finish(folder, *export(model.policy, config, training={"source": path.name})))


if __name__ == "__main__":
    from llmsched_gym.agents import export as module  # under its one name, not this copy of it

    leave(module.main())
